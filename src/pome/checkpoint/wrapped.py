"""Weights that a training wrapper changes before the model computes with them, known by the tensors beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Wrapped:
    """One stored matrix that is not the weight which the model computes with."""

    stored: str  # its name
    wrapper: str  # what changes it
    tensor: str  # a tensor of the wrapper
    next_step: str


_MERGE = "call merge_and_unload() of PEFT and save the model again"
_REMOVE = "call torch.nn.utils.parametrize.remove_parametrizations and save the model again"
# A tensor of the wrapper -> the matrix that it changes (with the groups of the match), its name, the next step.
_MARKS = (
    (r"(.*?)poet_counts", r"\1weight", "POET's rotations", "call pome.poet.unwrap(model) and save the model again"),
    (r"(.*?)(?:lora_\w+|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|ia3_\w+|vera_\w+)(?:\..*)?", r"\1base_layer.weight",
     "an adapter that is not merged", _MERGE),
    (r"(.*?)lora_[AB](?:\..*)?", r"\1weight", "a LoRA that is not merged", _MERGE),
    (r"(.*?parametrizations\.\w+\.original1?)", r"\1", "a parametrization of torch", _REMOVE),
    (r"(.*?)weight_g", r"\1weight_v", "weight normalization",
     "call torch.nn.utils.remove_weight_norm and save the model again"),
)  # fmt: skip
_MARK = re.compile(r"poet_counts|(?:lora|hada|lokr|oft|ia3|vera)_|\.parametrizations\.|weight_g")  # in all of them


def find_wrapped(names: Iterable[str]) -> list[Wrapped]:
    """Every stored matrix of a checkpoint that a training wrapper changes, with a tensor of the wrapper."""
    known = dict.fromkeys(names)
    found = []
    for name in filter(_MARK.search, known):
        for pattern, changed, wrapper, step in _MARKS:
            match = re.fullmatch(pattern, name)
            if match and (stored := match.expand(changed)) in known:
                found.append(Wrapped(stored, wrapper, name, step))
    return found
