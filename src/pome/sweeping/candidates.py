"""Candidate models of a sweep, made one after the other out of one copy: only the units that differ are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pome.config.spec import EditSpec
from pome.editing.lora_merge import Data, make_patch, read_unit, see_ft
from pome.editing.session import Opened
from pome.editing.unit import TORCH_DTYPES
from pome.editing.workers import map_on_devices
from pome.engines.local import map_units
from pome.planning.split import count_cores
from pome.planning.units import Plan, Unit
from pome.sweeping.cache import DecompositionFolder

Write = Callable[[Unit, bytes | bytearray], None]


class Maker:
    """Editor of the one copy that a sweep scores, on disk or in memory. `write` takes all bytes of a unit.

    A unit is dirty when it is not known to hold FT's bytes: at first every unit of `plans` is.
    """

    def __init__(
        self, opened: Opened, plans: list[Plan], devices: list[str], caches: DecompositionFolder, write: Write
    ) -> None:
        self.opened = opened
        self.devices = devices
        self.cores = count_cores()
        self.caches = caches
        self.write = write
        self.dirty = {unit.key: unit for plan in plans for unit in plan.units}

    def make(self, plan: Plan, spec: EditSpec) -> None:
        """Make the copy the candidate of a spec and its plan. Raises NumericalError.

        After an error some units are edited and some are not; the next call sets all of them.
        """
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

        for _ in map_on_devices(units, self.devices, self.cores, self._read, work):
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
            if parameter is None or not _is_tied(parameter, unit, parameters, prefix):
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


def _is_tied(parameter: Tensor, unit: Unit, parameters: dict[str, Tensor], prefix: str) -> bool:
    """Whether every copy of a tied weight is this parameter in the loaded model too, or is not there."""
    names = [name for copy in unit.copies for name in (copy.name, prefix + copy.name, copy.name.removeprefix(prefix))]
    return all(parameters[name] is parameter for name in names if name in parameters)


def write_into(targets: dict[str, Tensor]) -> Write:
    """Writer of a unit's bytes into a loaded model, in the model's dtype."""

    def write(unit: Unit, data: bytes | bytearray) -> None:
        target = targets[unit.key]
        target.copy_(_view(unit, data).reshape(target.shape))

    return write


def _view(unit: Unit, data: bytes | bytearray) -> Tensor:
    writable = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(writable, dtype=TORCH_DTYPES[unit.out_dtype]).reshape(unit.shape)
