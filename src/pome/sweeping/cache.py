"""Decompositions of a sweep's matrices, cached in files: each is computed once, whatever k and alpha follow."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pome.kernel.decomposition import Decomposition, DecompositionCache, Undecided
from pome.output.durable import sync_file
from pome.planning.units import FLOAT64_ENTRIES, Plan, Unit, fan_out_in
from pome.roles.layout import Part


class DecompositionFolder:
    """Cache of decompositions in one folder, which is made if it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def find_cache(self, unit: Unit, part: Part) -> DecompositionCache:
        """The cache of one matrix. Several threads may ask, each for another matrix."""
        name = f"{unit.key}\n{unit.label(part)}"
        return _FileCache(self.folder, hashlib.sha256(name.encode()).hexdigest()[:32])


class _FileCache(MutableMapping[str, Decomposition | Undecided]):
    """Cache of one matrix: a file for each solver. A file that a crash left torn counts as absent."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        self.stem = stem

    def _path(self, key: str) -> Path:
        return self.folder / f"{self.stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.safetensors"

    def __getitem__(self, key: str) -> Decomposition | Undecided:
        device = key.rpartition("@")[2]
        try:
            with safe_open(self._path(key), framework="pt") as file:
                said = file.metadata()
                # Clones: tensors in a mapped file lie at odd addresses, where products take other paths and round
                # differently.
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            raise KeyError(key) from None
        if "undecided" in said:
            return Undecided(said["undecided"])
        tensors = {name.removesuffix(".T"): t.mT if name.endswith(".T") else t for name, t in found.items()}
        fields: dict[str, Any] = {name: t if name == "sigma" else t.to(device) for name, t in tensors.items()}
        fields |= {name: int(said[name]) for name in ("rank", "strong", "tail")}
        fields |= {name: float.fromhex(said[name]) for name in ("noise", "missed")}
        return Decomposition(**fields)

    def __setitem__(self, key: str, decomposition: Decomposition | Undecided) -> None:
        tensors: dict[str, Tensor] = {}
        if isinstance(decomposition, Undecided):
            said = {"undecided": str(decomposition)}
        else:
            for name in ("sigma", "V", "U", "residual"):
                tensor = getattr(decomposition, name)
                # The layout in memory (rows or columns first) is kept: a product's rounding depends on it.
                if tensor is not None and tensor.is_contiguous():
                    tensors[name] = tensor.cpu()
                elif tensor is not None:
                    tensors[f"{name}.T"] = tensor.cpu().mT.contiguous()
            said = {name: str(getattr(decomposition, name)) for name in ("rank", "strong", "tail")}
            said |= {name: getattr(decomposition, name).hex() for name in ("noise", "missed")}
        path = self._path(key)
        made = path.with_suffix(f".{secrets.token_hex(4)}.new")  # workers on several machines may make the same one
        save_file(tensors, made, said)
        with open(made, "rb") as file:
            sync_file(file.fileno())
        made.rename(path)

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[str]:
        raise TypeError("the names of the files are hashes of the keys")

    def __len__(self) -> int:
        return len(list(self.folder.glob(f"{self.stem}-*.safetensors")))


def count_bytes(plans: list[Plan], methods: Collection[str]) -> int:
    """Disk space in bytes that the decompositions of these plans' matrices take by these methods: short side squared,
    and a residual; of W_ft both sides' vectors."""
    sizes: dict[tuple[str, str | None], int] = {}
    for plan in plans:
        for unit, part in plan.matrices():
            m, n = fan_out_in(unit, part)
            short, lows = min(m, n), unit.change.lows if unit.change else ()
            equalize = (8 if m * n <= FLOAT64_ENTRIES else 5) * short * short
            if lows:
                equalize = 8 * max(low.rank for low in lows) * (m + n)
            of_method = {"equalize": equalize, "equivalence": 8 * short * (m + n)}
            sizes[unit.key, unit.label(part)] = sum(of_method[method] for method in methods)
    return sum(sizes.values())
