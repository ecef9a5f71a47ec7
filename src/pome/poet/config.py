"""Options of POET training: how rotations are sampled, parameterised and initialised."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pome.errors import SpecError

Patterns = str | Sequence[str]
# A function of the user's: the number of singular values -> a sequence or tensor of that many values.
SpectrumFunction = Callable[[int], Any]

SAMPLINGS = ("block", "full")
ROUNDINGS = ("nearest", "stochastic")
INITS = ("keep", "normalized", "standard", "xavier", "uniform", "power-law")
# Output heads and whatever is named an embedding. `wrap` adds the head that a transformers model names itself.
DEFAULT_EXCLUDE = r"(^|\.)(lm_head|embed_out|[^.]*embed[^.]*|heads?|score|classifier|qa_outputs|cls)(\.|$)"


@dataclass(frozen=True)
class PoetConfig:
    """Options of POET (arXiv 2506.08001) for `wrap`.

    `sampling`: `block` rotates all dimensions in random blocks (POET-BS), `full` one random subset of them (POET-FS).
    `block_size`: an integer, or a fraction of the dimension (rounded down, at least 1). A block larger than the
    dimension is cut to it; what is left over in `block` becomes one smaller block.
    `neumann_terms`: terms of the Neumann series of (I - Q)^-1 after the identity, or `exact` for a batched solve.
    0 leaves R = I + Q, which is not orthogonal at first order; the paper reports that training diverges with it.
    `correct`: one Newton-Schulz step on the truncated R, in the forward pass and in the merge. Without it (as in
    the paper) each merge scales the weight by 1 - theta^4 for an eigenvalue i theta of Q (`neumann_terms=3`).
    `init`: `keep` leaves the weights as they are. For training from scratch: `normalized` (Gaussian rows of norm 1),
    `standard` (standard deviation 0.02), `xavier` (Glorot, uniform), `uniform` (all singular values 1), `power-law`
    (singular value i proportional to i^(-1/2), mean square 1), or a function from the number of singular values to
    the singular values.
    `include`, `exclude`: regular expressions searched in module names; `exclude` replaces the default, which is
    heads and embeddings. `seed`: of the permutations and inits.
    `rounding`: how a merged bfloat16 weight is rounded. `track_spectrum`: keep the singular values of each layer,
    so that `measure` can give the spectral drift; costs one SVD a layer when wrapping.

    Raises `SpecError` for a value out of range.
    """

    sampling: Literal["block", "full"] = "block"
    block_size: int | float = 256
    neumann_terms: int | Literal["exact"] = 3
    correct: bool = True
    init: str | SpectrumFunction = "keep"
    include: Patterns | None = None
    exclude: Patterns | None = None
    seed: int = 0
    rounding: Literal["nearest", "stochastic"] = "nearest"
    track_spectrum: bool = False

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise SpecError(f"sampling is {self.sampling!r}; choose one of {', '.join(SAMPLINGS)}")
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int | float):
            raise SpecError(f"block_size is {size!r}; give an integer of at least 1, or a fraction in (0, 1]")
        if isinstance(size, int) and size < 1:
            raise SpecError(f"block_size is {size}; an integer must be at least 1")
        if isinstance(size, float) and not 0 < size <= 1:
            raise SpecError(f"block_size is {size}; a fraction must lie in (0, 1]")
        terms = self.neumann_terms
        if terms != "exact" and (isinstance(terms, bool) or not isinstance(terms, int) or terms < 0):
            raise SpecError(f"neumann_terms is {terms!r}; give an integer of at least 0, or 'exact'")
        if isinstance(self.init, str) and self.init not in INITS:
            raise SpecError(f"init is {self.init!r}; choose one of {', '.join(INITS)}, or give a function")
        if not isinstance(self.init, str) and not callable(self.init):
            raise SpecError(f"init is {self.init!r}; choose one of {', '.join(INITS)}, or give a function")
        if self.rounding not in ROUNDINGS:
            raise SpecError(f"rounding is {self.rounding!r}; choose one of {', '.join(ROUNDINGS)}")
        for option in ("include", "exclude"):
            for pattern in patterns(getattr(self, option)):
                _check_pattern(option, pattern)

    def block_of(self, dimension: int) -> int:
        """Block size on a side of `dimension` features."""
        size = self.block_size
        wanted = size if isinstance(size, int) else max(1, int(size * dimension))
        return min(wanted, dimension)


def patterns(given: Patterns | None) -> tuple[str, ...]:
    """Regular expressions as a tuple: none, one, or several."""
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def _check_pattern(option: str, pattern: str) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise SpecError(f"{option} holds {pattern!r}; give regular expressions that are not empty")
    try:
        re.compile(pattern)
    except re.error as error:
        raise SpecError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
