"""Tensor names as paths of modules, and the wrappers in them that carry no meaning. No torch."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable

Path = tuple[str, ...]
Shape = tuple[int, int]

# Modules that training puts around others: compilation, activation checkpointing, FSDP, DDP, PEFT. They hold no weight
# of their own and may stand anywhere in a name.
WRAPPERS = frozenset(
    ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_forward_module", "module",
     "base_layer")
)  # fmt: skip


def strip_wrappers(name: str) -> str:
    """A name without the wrappers inside it."""
    tokens = name.split(".")
    left = [token for token in tokens if token not in WRAPPERS]
    return name if len(left) in (0, len(tokens)) else ".".join(left)


def strip_all_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Name -> itself without wrappers, or as it is where two names of one checkpoint would become one."""
    stripped = {name: strip_wrappers(name) for name in names}
    counts = Counter(stripped.values())
    return {name: short if counts[short] == 1 else name for name, short in stripped.items()}


def module_path(name: str) -> Path:
    """The path of the module that holds a tensor, without `.weight` and without wrappers."""
    tokens = strip_wrappers(name).split(".")
    if tokens[-1] == "weight":
        tokens.pop()
    # The clipped or per-codebook linear layers of some multimodal models.
    if len(tokens) > 1 and tokens[-1] == "linear":
        tokens.pop()
    return tuple(tokens)


# A model of 100,000 tensors has a few words and numbers, which stand in many names.
@functools.lru_cache(1 << 14)
def match_word(pattern: re.Pattern[str], word: str) -> bool:
    """Whether a pattern matches the whole of a word of a path."""
    return pattern.fullmatch(word) is not None


def words(*lines: str) -> frozenset[str]:
    """A set of names that are written with blanks between them."""
    return frozenset(" ".join(lines).split())


def invert(leaves: dict[str, str]) -> dict[str, str]:
    """Name -> role from role -> names."""
    return {leaf: role for role, names in leaves.items() for leaf in names.split()}
