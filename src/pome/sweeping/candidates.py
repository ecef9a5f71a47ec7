"""Candidates of a sweep made one after the other out of one copy: what differs is patched, nothing else moves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pome.config.spec import EditSpec
from pome.editing.lora_merge import Data, make_patch, read_unit, see_ft
from pome.editing.session import Opened
from pome.editing.unit import FLOAT64_ENTRIES, TORCH_DTYPES
from pome.engines.local import map_units
from pome.kernel.spectrum import Decomposition, DecompositionCache, Undecided
from pome.output.durable import as_output_error
from pome.planning.units import Plan, Unit, fan_out_in
from pome.roles.roles import Part

Write = Callable[[Unit, bytes | bytearray], None]


class DecompositionFolder:
    """The decompositions of a sweep's matrices, in files of one folder: found once, whatever k and alpha follow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def find_cache(self, unit: Unit, part: Part) -> DecompositionCache:
        """What is known of one matrix; may be asked from several threads, for different matrices."""
        name = f"{unit.key}\n{unit.label(part)}"
        return _FileCache(self.folder, hashlib.sha256(name.encode()).hexdigest()[:32])


class _FileCache(MutableMapping[str, Decomposition | Undecided]):
    """The files of one matrix, one for each solver. A file that a crash left torn counts as absent."""

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
        return Decomposition(**fields, noise=float.fromhex(said["noise"]))

    def __setitem__(self, key: str, decomposition: Decomposition | Undecided) -> None:
        tensors: dict[str, Tensor] = {}
        if isinstance(decomposition, Undecided):
            said = {"undecided": str(decomposition)}
        else:
            for name in ("sigma", "V", "U", "residual"):
                tensor = getattr(decomposition, name)
                # Rows or columns first, as it was: a product's rounding depends on that.
                if tensor is not None and tensor.is_contiguous():
                    tensors[name] = tensor.cpu()
                elif tensor is not None:
                    tensors[f"{name}.T"] = tensor.cpu().mT.contiguous()
            said = {name: str(getattr(decomposition, name)) for name in ("rank", "strong", "tail")}
            said["noise"] = decomposition.noise.hex()
        path = self._path(key)
        made = path.with_suffix(".new")
        save_file(tensors, made, said)
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        made.rename(path)

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[str]:
        raise TypeError("the files know only hashes of their keys")

    def __len__(self) -> int:
        return len(list(self.folder.glob(f"{self.stem}-*.safetensors")))


def count_bytes(plans: list[Plan]) -> int:
    """Bytes that the decompositions of these plans' matrices take: the short side squared, and its residual."""
    sizes: dict[tuple[str, str | None], int] = {}
    for plan in plans:
        for unit, part in plan.matrices():
            m, n = fan_out_in(unit, part)
            short, lows = min(m, n), unit.change.lows if unit.change else ()
            if lows:
                sizes[unit.key, unit.label(part)] = 8 * max(low.rank for low in lows) * (m + n)
            else:
                sizes[unit.key, unit.label(part)] = (8 if m * n <= FLOAT64_ENTRIES else 5) * short * short
    return sum(sizes.values())


Marks = dict[str, tuple[int, int, int]]  # path below a folder -> inode, size and time of the file


def mark_files(folder: Path) -> Marks:
    """What tells of each file below a folder whether somebody writes or replaces it."""
    marks = {}
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for path in (Path(root, name) for name in (*names, *links)):
            info = path.lstat()
            marks[str(path.relative_to(folder))] = info.st_ino, info.st_size, info.st_mtime_ns
    return marks


def keep_marked(folder: Path, marks: Marks) -> set[str]:
    """Remove what is not as it was marked; the names of the marked files that are gone now. Raises OutputError."""
    with as_output_error(folder):
        now = mark_files(folder)
        same = {name for name, mark in now.items() if marks.get(name) == mark}
        for name in now.keys() - same:
            (folder / name).unlink()
        for root, _, _ in os.walk(folder, topdown=False):
            if root != str(folder) and not os.listdir(root):
                os.rmdir(root)
    return marks.keys() - same


class Maker:
    """Makes one candidate after the other by `write`, which takes all bytes of a unit.

    What the target holds is known only after it was written: at first every unit of `plans` counts as dirty.
    """

    def __init__(
        self, opened: Opened, plans: list[Plan], devices: list[str], caches: DecompositionFolder, write: Write
    ) -> None:
        self.opened = opened
        self.devices = devices
        self.caches = caches
        self.write = write
        self.dirty = {unit.key: unit for plan in plans for unit in plan.units}  # not known to hold FT's bytes

    def make(self, plan: Plan, spec: EditSpec) -> None:
        """The candidate of a spec and its plan. Raises NumericalError; the target is then neither, and is mended by
        the next call."""
        wanted = {unit.key for unit in plan.units}
        self._restore([unit for key, unit in self.dirty.items() if key not in wanted])
        units = list(plan.units)
        before = dict(self.dirty)
        self.dirty |= {unit.key: unit for unit in units}

        def work(unit: Unit, data: Data, device: str) -> None:
            patch = make_patch(unit, data, spec, device, self.caches.find_cache)
            if patch.data is not None:
                self.write(unit, patch.data)
            elif unit.key in before:
                self.write(unit, see_ft(unit, data))

        for _ in map_units(units, self.devices, self._read, work):
            pass

    def restore(self) -> None:
        """The fine-tuned model itself, as PEFT would merge it where it is an adapter."""
        self._restore(list(self.dirty.values()))

    def _restore(self, units: list[Unit]) -> None:
        def work(unit: Unit, data: Data, device: str) -> Unit:
            self.write(unit, see_ft(unit, data))
            return unit

        for unit in map_units(units, self.devices[:1], self._read, work):
            del self.dirty[unit.key]

    def _read(self, unit: Unit) -> Data:
        return read_unit(unit, self.opened.ft, self.opened.base)


def find_targets(model: Any, opened: Opened, plans: list[Plan]) -> dict[str, Tensor] | None:
    """Unit key -> the entries of a loaded model that hold it, or None where one unit has none.

    A name, a shape and the values must agree: a library that fuses, splits or transposes weights while it loads them
    does not hold what the checkpoint holds, and must load each candidate from the disk.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    targets: dict[str, Tensor] = {}
    for plan in plans:
        for unit in plan.units:
            names = (unit.name, prefix + unit.name, unit.name.removeprefix(prefix))
            parameter = next((parameters[name] for name in names if name in parameters), None)
            if parameter is None:
                return None
            if unit.key in targets:
                continue
            held = parameter.data if unit.expert is None else parameter.data[unit.expert]
            if held.shape.numel() != unit.shape[0] * unit.shape[1] or held.shape[-1] != unit.shape[1]:
                return None
            data = see_ft(unit, read_unit(unit, opened.ft, opened.base))
            if not torch.equal(held.reshape(unit.shape), _view(unit, data).to(held)):
                return None
            targets[unit.key] = held
    return targets


def write_into(targets: dict[str, Tensor]) -> Write:
    """What writes a unit's bytes into a loaded model, in its own dtype."""

    def write(unit: Unit, data: bytes | bytearray) -> None:
        target = targets[unit.key]
        target.copy_(_view(unit, data).reshape(target.shape))

    return write


def _view(unit: Unit, data: bytes | bytearray) -> Tensor:
    writable = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(writable, dtype=TORCH_DTYPES[unit.out_dtype]).reshape(unit.shape)
