#!/usr/bin/env python3
"""Make a real pair of language models in bfloat16: SmolLM2-135M, and the same after some steps of training.

    scripts/make_smollm2_pair.py FOLDER [--steps N] [--rate R] [--seed N]

makes FOLDER/base, the published model dequantised from 4 bits (scripts/real_weights.py), and FOLDER/ft, fine-tuned with
AdamW in float32 on the text of this repository's README and stored in bfloat16, as training jobs do. The loss before
each step is printed. A pair to try the tool on, not a better model: the README is some two thousand tokens.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import transformers

from real_weights import smollm2

README = Path(__file__).resolve().parent.parent / "README.md"
LENGTH, BATCH = 128, 2


def fine_tune(base: Path, target: Path, text: str, steps: int, rate: float) -> None:
    """Train the model in the folder `base` on random windows of `text`, and save it with its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    # Weights of 0.2 lie 1e-3 apart in bfloat16: at a tenth of this rate nearly all of the update would be rounded away.
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.folder.mkdir(parents=True)
    base = arguments.folder / "base"
    shutil.copytree(smollm2(), base)
    fine_tune(base, arguments.folder / "ft", README.read_text(), arguments.steps, arguments.rate)


if __name__ == "__main__":
    main()
