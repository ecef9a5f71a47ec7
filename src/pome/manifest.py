"""Manifest of an output, `pome_manifest.json`: records of inputs, options, edits and files, to and from JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pome.errors import VerificationError, printable

FORMAT_VERSION = 1
CHECKSUM = "manifest_sha256"


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


@dataclass(frozen=True)
class TensorRecord:
    """One edited matrix. Norms are Frobenius norms; the README tells what each number means."""

    name: str
    part: str | None
    file: str
    role: str
    shape: tuple[int, int]  # (fan_out, fan_in)
    dtype: str
    rank: int
    k: int
    alpha: float
    beta: float
    sigma_max: float
    sigma_k: float
    sigma_next: float
    noise_floor: float
    delta_norm: float
    edit_norm: float
    energy_kept: float
    rounding: float
    objective: float
    orthogonality: float
    power_residual: float | None  # None in the manifests of releases that did not measure it
    solver: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class KeptRecord:
    """A tensor, or one matrix in it, that the selection matched but that was not edited."""

    name: str
    part: str | None
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

    def checksum(self) -> str:
        """SHA-256 over all that the manifest says, but for the checksum itself, which stands among the timings."""
        timing = {key: value for key, value in self.timing.items() if key != CHECKSUM}
        text = json.dumps({**self.to_mapping(), "timing": timing}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def sealed(self) -> Manifest:
        """The same with its checksum."""
        return dataclasses.replace(self, timing={**self.timing, CHECKSUM: self.checksum()})

    def to_mapping(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_mapping(), indent=1, allow_nan=False) + "\n"

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
                    "tensors": tuple(_read_tensor(item) for item in raw["tensors"]),
                    "kept": tuple(_read(KeptRecord, item) for item in raw["kept"]),
                    "merged": _read_texts(raw["merged"]),
                    "files": _read_files(raw["files"]),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise VerificationError(f"{where}: not a manifest of pome: {printable(str(error))}") from None


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


_Record = TypeVar("_Record", FileRecord, SideRecord, TensorRecord, KeptRecord)
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": (str,),
    "str | None": (str, type(None)),
}


def _read(record: type[_Record], raw: dict[str, Any]) -> _Record:
    """A record from an object with its fields. Raises TypeError for a field of another kind."""
    for known in dataclasses.fields(record):
        kinds = _KINDS.get(str(known.type))
        if kinds and (not isinstance(raw[known.name], kinds) or isinstance(raw[known.name], bool)):
            raise TypeError(f"{known.name} is {raw[known.name]!r}")
    return record(**raw)


def _read_tensor(raw: dict[str, Any]) -> TensorRecord:
    rows, columns = raw["shape"]
    warnings = _read_texts(raw["warnings"])
    return _read(TensorRecord, {"power_residual": None, **raw, "shape": (rows, columns), "warnings": warnings})


def _read_texts(raw: list[Any]) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(item, str) for item in raw):
        raise TypeError(f"{raw!r} is not a list of texts")
    return tuple(raw)


def _read_side(raw: dict[str, Any]) -> SideRecord:
    return _read(SideRecord, {**raw, "files": _read_files(raw["files"])})


def _read_files(raw: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: _read(FileRecord, item) for name, item in raw.items()}
