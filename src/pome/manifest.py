"""Manifest of an output, `pome_manifest.json`: records of inputs, options, edits and files, to and from JSON."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import stat
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pome.errors import VerificationError, printable

FORMAT_VERSION = 1
# Entries of `timing` that are not times. They are there because they may differ between two runs.
CHECKSUM = "manifest_sha256"
SPECTRUM_POINTS = 24
INPUTS = "inputs_stat"  # size and time of the inputs' files: while they stay the same none need be hashed


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SideRecord:
    """One input: as the user named it, the Hub commit it resolved to (or None), and its files."""

    source: str
    revision: str | None
    files: dict[str, FileRecord]

    @property
    def on_hub(self) -> bool:
        """Whether it was given as a Hub repository."""
        return self.revision is not None

    @property
    def repository(self) -> str | None:
        """Its Hub id without a revision; None for what lies on this machine."""
        return self.source.partition("@")[0] if self.on_hub else None

    def name(self, otherwise: str) -> str:
        """An argument of a command: the Hub id with the commit, or a word for what lies on this machine."""
        return f"{self.repository}@{self.revision}" if self.on_hub else otherwise


# Fields that the manifests of earlier releases lack.
_LATER: dict[str, Any] = {"power_residual": None, "method": "equalize", "spectral_drift": None, "distance": None}


@dataclass(frozen=True)
class TensorRecord:
    """One edited matrix. Norms are Frobenius norms; the README tells what each number means.

    departure: norm of (edited - fine-tuned weight) over delta_norm, before the weight is rounded to the output dtype.
    spectrum: (index from 1, singular value of the delta) at about 24 indices from 1 to the rank, or to k + 1 where the
    rank is not known, evenly spaced in their logarithm. With the method `equivalence` the values are those of W_base,
    and None is what says how a delta was cut and scaled; spectral_drift and distance are of that method alone.
    """

    name: str
    part: str | None
    file: str
    role: str
    shape: tuple[int, int]  # (fan_out, fan_in)
    dtype: str
    method: str
    rank: int | None  # None too where few directions were asked for and found without it
    k: int | None
    alpha: float | None
    beta: float
    sigma_max: float | None
    sigma_k: float | None
    sigma_next: float | None
    noise_floor: float
    delta_norm: float
    edit_norm: float
    energy_kept: float | None
    departure: float
    spectral_drift: float | None
    distance: float | None
    rounding: float
    objective: float
    orthogonality: float
    power_residual: float | None  # None in the manifests of releases that did not measure it
    solver: str
    warnings: tuple[str, ...]
    spectrum: tuple[tuple[int, float], ...]

    @property
    def title(self) -> str:
        """Its name, with the part of the tensor that it is."""
        return f"{self.name} ({self.part})" if self.part else self.name

    def to_mapping(self) -> dict[str, Any]:
        """The record in JSON's types, but for tuples, which JSON writes as lists. (asdict() would copy each number.)"""
        return dict(vars(self))

    @classmethod
    def from_mapping(cls, raw: dict[str, Any]) -> TensorRecord:
        """A record from JSON's types. Raises TypeError, ValueError or KeyError for what is no record."""
        rows, columns = raw["shape"]
        texts, points = _read_texts(raw["warnings"]), _read_points(raw["spectrum"])
        read = {"shape": (rows, columns), "warnings": texts, "spectrum": points}
        return _read(cls, {**_LATER, **raw, **read})


@dataclass(frozen=True)
class KeptRecord:
    """A tensor, or one matrix in it, that the selection matched but that was not edited."""

    name: str
    part: str | None
    reason: str


@dataclass(frozen=True)
class LostRecord:
    """A tensor of FT, or a matrix in it, that differs from BASE's and that an extracted adapter does not hold.

    norm: Frobenius norm of the change. share: over the norm of BASE's tensor; 1 where BASE has none.
    """

    name: str
    part: str | None
    role: str
    norm: float
    share: float
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The record of one run. Only `created` and `timing` may differ between two runs of the same command."""

    format_version: int
    pome_version: str
    created: str
    base: SideRecord
    fine_tuned: SideRecord
    spec: dict[str, Any]
    tensors: tuple[TensorRecord, ...]
    kept: tuple[KeptRecord, ...]
    merged: tuple[str, ...]  # tensors of BASE that an adapter changes and that are, wholly or in part, not edited
    not_copied: dict[str, str]  # files of FT that the output leaves out, and why
    files: dict[str, FileRecord]  # every file of the output but the manifest itself
    timing: dict[str, float | str] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None  # how `pome sweep` came to these options
    notices: tuple[str, ...] = ()  # guesses, files left out and warnings; the key is absent where there are none
    # Of an extracted adapter: tensors that it holds whole, and changes that it does not hold. Absent where none are.
    saved: tuple[str, ...] = ()
    lost: tuple[LostRecord, ...] = ()

    @property
    def template(self) -> str:
        """Whose bytes an output has where it was not edited: `FT`, or `BASE` where FT is an adapter merged into it."""
        adapter = "adapter_model.safetensors" in self.fine_tuned.files
        return "BASE" if adapter and self.spec.get("out_format") == "full" else "FT"

    def checksum(self) -> str:
        """SHA-256 over all that the manifest says, but for the checksum itself, which stands among the timings."""
        timing = {key: value for key, value in self.timing.items() if key != CHECKSUM}
        text = json.dumps({**self.to_mapping(), "timing": timing}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def sealed(self) -> Manifest:
        """The same with its checksum."""
        return dataclasses.replace(self, timing={**self.timing, CHECKSUM: self.checksum()})

    def to_mapping(self) -> dict[str, Any]:
        """The manifest in JSON's types, but for tuples in the records of matrices, which JSON writes as lists."""
        others = dataclasses.asdict(dataclasses.replace(self, tensors=()))
        mapping = {**others, "tensors": [record.to_mapping() for record in self.tensors]}
        return {key: value for key, value in mapping.items() if value or key not in _ABSENT_IF_EMPTY}

    def to_json(self) -> str:
        """The file: indented, but for the records of matrices, one line each."""
        mapping = self.to_mapping()
        lines = [json.dumps(record, allow_nan=False) for record in mapping["tensors"]]
        text = json.dumps({**mapping, "tensors": []}, indent=1, allow_nan=False)
        listed = "[\n  " + ",\n  ".join(lines) + "\n ]" if lines else "[]"
        return text.replace('\n "tensors": []', f'\n "tensors": {listed}', 1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read a manifest back. Raises VerificationError naming what is missing or of the wrong kind."""
        try:
            raw = json.loads(text, parse_constant=_read_number, parse_float=_read_number)
            if not isinstance(raw, dict):
                raise TypeError("it is not an object")
            if raw.get("format_version") != FORMAT_VERSION:
                raise TypeError(f"format_version is {raw.get('format_version')!r}, this pome reads {FORMAT_VERSION}")
            for key in ("spec", "not_copied", "timing"):
                if not isinstance(raw[key], dict):
                    raise TypeError(f"{key} is not an object")
            if not isinstance(raw.get("sweep", {}), (dict, type(None))):
                raise TypeError("sweep is not an object")
            return cls(
                **{
                    **raw,
                    "base": _read_side(raw["base"]),
                    "fine_tuned": _read_side(raw["fine_tuned"]),
                    "tensors": tuple(map(TensorRecord.from_mapping, raw["tensors"])),
                    "kept": tuple(_read(KeptRecord, item) for item in raw["kept"]),
                    "merged": _read_texts(raw["merged"]),
                    "files": _read_files(raw["files"]),
                    "notices": _read_texts(raw.get("notices", [])),
                    "saved": _read_texts(raw.get("saved", [])),
                    "lost": tuple(_read(LostRecord, item) for item in raw.get("lost", [])),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise VerificationError(f"{where}: not a manifest of pome: {printable(str(error))}") from None


def show_median(records: Iterable[TensorRecord], field: str, form: str) -> str:
    """The median of a field over the records that have it, for a table; `-` where none has."""
    known = [value for record in records if (value := getattr(record, field)) is not None]
    return format(statistics.median(known), form) if known else "-"


def sample_spectrum(sigma: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """(index from 1, singular value with six digits) at about SPECTRUM_POINTS indices of a descending spectrum."""
    return tuple((index, float(f"{sigma[index - 1]:.6g}")) for index in spread_indices(len(sigma), SPECTRUM_POINTS))


def spread_indices(n: int, count: int) -> list[int]:
    """At most `count` whole numbers from 1 to n, both included, as evenly spaced in their logarithm as can be."""
    if n <= count:
        return list(range(1, n + 1))
    return sorted({round(n ** (i / (count - 1))) for i in range(count)})


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file. Raises VerificationError."""
    try:
        # O_NONBLOCK: a FIFO in its place must not hang the reader, nor a device feed it for ever.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise VerificationError(f"{printable(str(path))}: not a regular file; is this an output of pome?")
            return Manifest.from_json(file.read(), str(path))
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror}; is this an output of pome?") from None


def _read_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number that a manifest holds")
    return number


_ABSENT_IF_EMPTY = ("notices", "saved", "lost")
_Record = TypeVar("_Record", FileRecord, SideRecord, TensorRecord, KeptRecord, LostRecord)
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": (str,),
    "str | None": (str, type(None)),
}


@functools.cache
def _list_kinds(record: Any) -> list[tuple[str, tuple[type, ...]]]:
    """The fields of a record that hold one plain value, with the types it may have."""
    return [(known.name, _KINDS[str(known.type)]) for known in dataclasses.fields(record) if str(known.type) in _KINDS]


def _read(record: type[_Record], raw: dict[str, Any]) -> _Record:
    """A record from an object with its fields. Raises TypeError for a field of another kind."""
    kind: Any = record
    for name, kinds in _list_kinds(kind):
        if not isinstance(raw[name], kinds) or isinstance(raw[name], bool):
            raise TypeError(f"{name} is {raw[name]!r}")
    return record(**raw)


def _read_texts(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, (list, tuple)) or not all(isinstance(item, str) for item in raw):
        raise TypeError(f"{raw!r} is not a list of texts")
    return tuple(raw)


def _read_points(raw: Any) -> tuple[tuple[int, float], ...]:
    points = tuple((index, sigma) for index, sigma in raw)
    if not ({type(index) for index, _ in points} <= {int} and {type(sigma) for _, sigma in points} <= {int, float}):
        raise TypeError("spectrum is not a list of [index, singular value]")
    return points


def _read_side(raw: dict[str, Any]) -> SideRecord:
    return _read(SideRecord, {**raw, "files": _read_files(raw["files"])})


def _read_files(raw: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: _read(FileRecord, item) for name, item in raw.items()}
