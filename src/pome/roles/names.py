"""Tensor names as paths of modules. No torch."""

from __future__ import annotations

Path = tuple[str, ...]
Shape = tuple[int, int]


def module_path(name: str) -> Path:
    """The path of the module that holds a tensor, without `.weight` and without wrappers of a linear layer."""
    tokens = name.split(".")
    if tokens[-1] == "weight":
        tokens.pop()
    # Wrappers around a linear layer: PEFT's, and the clipped or per-codebook ones of some multimodal models.
    if len(tokens) > 1 and tokens[-1] in ("base_layer", "linear"):
        tokens.pop()
    return tuple(tokens)


def words(*lines: str) -> frozenset[str]:
    """A set of names that are written with blanks between them."""
    return frozenset(" ".join(lines).split())


def invert(leaves: dict[str, str]) -> dict[str, str]:
    """Name -> role from role -> names."""
    return {leaf: role for role, names in leaves.items() for leaf in names.split()}
