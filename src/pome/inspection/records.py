"""Records of an inspection: a `Matrix` for every matrix of a pair, and the `Survey` of all. No torch."""

from __future__ import annotations

import dataclasses
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pome.manifest import KeptRecord

# The weights that are held against BASE's: FT's, and what an edit by each method gives.
CHANGED = ("fine_tuned", "equalized", "equivalence")


@dataclass(frozen=True)
class Weights:
    """What `--weights` measures of one matrix: of BASE, of FT, and of two edits before they are rounded to a dtype.

    All is dimensionless. `equalized` is the edit by the options that were given, with this `k` and `alpha`, and
    `equivalence` the nearest matrix to FT's with BASE's singular values.

    spectral_drift: of `fine_tuned`, `equalized` and `equivalence`, norm(s(W) - s(W_base)) / norm(W_base) of singular
    values in descending order, at least 0. None where W_base is zero; that of `equivalence` where one side is zero.
    hyperspherical_energy: of these and of `base`, the mean over pairs of rows of 1 / norm(u_i - u_j), u_i a row (an
    output unit) over its norm; at least 1/2 (`pome.kernel.energy` has the source). The pairs are the same for all: None
    where no pair is left, or no such edit. rows: rows looked at, a seeded sample where the matrix has more.
    zero_rows: those among them that are zero in one of the weights, left out. identical_pairs: pairs of the same
    direction in one of the weights, left out.
    """

    k: int
    alpha: float
    spectral_drift: dict[str, float | None]
    hyperspherical_energy: dict[str, float | None]
    rows: int
    zero_rows: int
    identical_pairs: int


@dataclass(frozen=True)
class Matrix:
    """One matrix of a pair. Norms are Frobenius norms, `sigma` all singular values of the delta, descending; what is
    relative to the base's own size is None where that is zero.

    energy: share of delta_norm^2 in the leading quarter, half and three quarters of the directions. noise_floor:
    largest singular value that rounding to FT's dtype leaves in a delta; noise_share: its energy beside the delta's.
    above_noise: directions that it does not explain. changed: share of entries that differ (None for an adapter).
    k: by each rule; alpha: alpha_0 by each scale, at the k of the default rule; edit_ratio: norm of that edit beside
    the delta's. rounding: ESTIMATE of the share of a default edit that FT's dtype destroys. align_left, align_right:
    share of the delta's energy in the base's leading `align_r` output and input directions; drift: relative change of
    the base's leading singular values. weights: None unless they were asked for.
    """

    name: str
    part: str | None
    role: str
    place: str  # the layer: the name up to its first number
    shape: tuple[int, int]
    dtype: str
    base_norm: float
    delta_norm: float
    relative_norm: float | None
    rank: int
    stable_rank: float
    effective_rank: float
    energy: dict[str, float]
    noise_floor: float
    noise_share: float
    above_noise: int
    changed: float | None
    k: dict[str, int]
    alpha: dict[str, float]
    edit_ratio: dict[str, float]
    rounding: float
    align_r: int
    align_left: float
    align_right: float
    drift: float | None
    spectral_norm: float  # of the base's matrix
    sigma: array[float]
    weights: Weights | None = None

    @property
    def title(self) -> str:
        """Its name, with the part of the tensor that it is."""
        return f"{self.name} ({self.part})" if self.part else self.name

    def to_json(self) -> dict[str, Any]:
        """Field by field in JSON's types; singular values with the digits that they are good for."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        weights = {"weights": dataclasses.asdict(self.weights)} if self.weights else {}
        del values["weights"]
        return {**values, "shape": list(self.shape), "sigma": [float(f"{s:.6g}") for s in self.sigma], **weights}


@dataclass(frozen=True)
class Survey:
    """A pair looked at: its matrices in the order of the files, and those that have no delta to look at."""

    base: str
    fine_tuned: str
    matrices: tuple[Matrix, ...]
    kept: tuple[KeptRecord, ...]

    def to_json(self) -> Iterator[str]:
        """The document of `--json`, in pieces: of a large model the whole would be gigabytes in memory."""
        yield f'{{"base": {json.dumps(self.base)}, "fine_tuned": {json.dumps(self.fine_tuned)}, "tensors": ['
        for i, matrix in enumerate(self.matrices):
            yield (",\n" if i else "\n") + json.dumps(matrix.to_json(), allow_nan=False)
        kept = [dataclasses.asdict(record) for record in self.kept]
        yield f'\n], "kept": {json.dumps(kept)}}}\n'


def find_place(name: str) -> str:
    """`model.layers.7` of `model.layers.7.mlp.up_proj.weight`; a name without a number is its own place."""
    match = re.match(r"(.*?(?:^|[._])\d+)(?=[._]|$)", name)
    return match[1] if match else name.removesuffix(".weight")


def sort_places(places: Sequence[str]) -> list[str]:
    """Places without repetition, layers in the order of their numbers."""

    def key(place: str) -> list[tuple[int, str]]:
        # Numbers by length and digits: of thousands of digits, which a name may have, Python makes no number.
        words = re.split(r"(\d+)", place)
        return [(len(word.lstrip("0")), word.lstrip("0")) if word.isdecimal() else (0, word) for word in words]

    return sorted(dict.fromkeys(places), key=key)
