"""Stacked experts: which 3-D tensors hold gate, up and down of all experts of a layer, and how. No torch."""

from __future__ import annotations

from pome.roles.families import family_of
from pome.roles.layout import OTHER, Layout, Part, split_runs
from pome.roles.model_config import Config, hidden_size_of
from pome.roles.names import Path, Shape

# Stacked experts as transformers holds them -> their matrices, and the leaves of single experts in checkpoints.
STACKS = {
    "gate_up_proj": (("gate", "up"), (("gate_proj", "up_proj"), ("w1", "w3"))),
    "gate_proj": (("gate",), (("gate_proj",), ("w1",))),
    "up_proj": (("up",), (("up_proj",), ("w3",))),
    "down_proj": (("down",), (("down_proj",), ("w2",))),
}


def find_experts_layout(path: Path, shape: Shape, facts: Config | None) -> Layout:
    """The layout of stacked experts, each stored as a slice of that `shape` in a 3-D tensor."""
    leaf, around, family = path[-1], path[:-1], family_of(facts)
    if not around:
        return OTHER
    if leaf in ("input_linear", "output_linear"):
        fused, role, known = leaf == "input_linear", "down", around[-1] in ("block_sparse_moe", "mlp")
    else:
        fused, known = leaf in ("gate_up_proj", "w13_weight"), "expert" in around[-1] or around[-1] == "moe"
        role = "down" if leaf == "w2_weight" else leaf.removesuffix("_proj")
        if leaf in family.expert_names:
            fused, role = family.expert_names[leaf] == "gate_up", "down"
    if not known or not (fused or role in ("gate", "up", "down")):
        return OTHER
    transposed = _are_experts_in_out("down" if not fused and role == "down" else "up", shape, facts)
    if transposed is None:
        return OTHER
    if not fused:
        return Layout((Part(role),), transposed, stacked=True)
    axis = 1 if transposed else 0
    if shape[axis] % 2 or transposed and family.in_out_halves is None:
        return OTHER  # how (in, out) experts lay out their halves differs from one architecture to the next
    half = shape[axis] // 2
    if leaf.startswith("w13") or family.in_out_halves == "interleaved":
        parts = split_runs(axis, half, {"gate": 1, "up": 1}, "half")
    else:
        parts = split_runs(axis, 1, {"gate": half, "up": half}, "half")
    return Layout(parts, transposed, stacked=True)


def _are_experts_in_out(role: str, shape: Shape, facts: Config | None) -> bool | None:
    """Whether stacked experts are stored (E, in, out); None where neither the sizes nor the model type tell."""
    hidden, known = hidden_size_of(facts), family_of(facts).experts
    rows, columns = shape
    if hidden is None or hidden not in shape:
        return None
    if rows != columns:
        return (columns if role == "down" else rows) == hidden
    return None if known is None else known == "in_out"
