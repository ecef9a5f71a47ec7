"""A fine-tune's model card with what a new one must carry over and what not, and the card of an output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

FT_CARD = """---
language: en
license: llama2
license_link: LICENSE
tags: [math, pome]
datasets: [org/data, /home/me/data]
pipeline_tag: text-generation
base_model: /home/me/llama
extra_gated_prompt: Be kind
model-index:
- name: ft
  results: []
---
# Tuned

This model is a fine-tuned version of [/home/me/llama](https://huggingface.co//home/me/llama) on ~/data/gsm8k/train,
see https://example.org/a/b and `and/or` 1/2, </div>.
"""


def read_card(out: Path) -> Any:
    return ModelCard((out / "README.md").read_text())
