"""Merge of the rotations into the weights every few optimiser steps, with the optimiser's state of them reset."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pome.errors import SpecError
from pome.poet.cayley import skew_symmetric
from pome.poet.layer import PoetLinear
from pome.poet.wrapping import poet_layers

_COUNTERS = ("steps", "since_merge", "merges")


class Merger:
    """Merge then reinitialise: call `step` after each step of the optimiser.

    Every `every` optimiser steps the rotations are folded into the weights, Q becomes zero, and the optimiser forgets
    what it kept for exactly these parameters: moments, step counts, copies of the parameters. Every `resample_every`
    merges the blocks are drawn anew. `max_norm` merges early once the spectral norm of a block of Q exceeds it.
    `ramp`: after a merge the learning rate of the rotations rises linearly to its value over this many steps, since
    an adaptive optimiser without moments takes a full step in every entry at once.

    `optimizer` is a torch optimiser, a wrapper of one (accelerate, `ZeroRedundancyOptimizer`), or several. Under DDP
    every rank has a merger of its own; nothing is sent, since all ranks hold the same Q. Raises `SpecError` for a
    value out of range, for a rotation that no optimiser holds, and for an optimiser whose state cannot be reset.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        every: int = 200,
        resample_every: int = 1,
        max_norm: float | None = None,
        ramp: int = 0,
    ) -> None:
        for option, value, least in (("every", every, 1), ("resample_every", resample_every, 1), ("ramp", ramp, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(f"{option} is {value!r}; give an integer of at least {least}")
        if max_norm is not None and not max_norm > 0:
            raise SpecError(f"max_norm is {max_norm!r}; give a positive number, or None")
        self.every, self.resample_every, self.max_norm, self.ramp = every, resample_every, max_norm, ramp
        self.steps = self.since_merge = self.merges = 0
        self._model = model
        self._given = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        self._optimizers = [_innermost(each) for each in self._given]
        self._check_optimizers()
        if ramp:
            for each in self._optimizers:
                self._install_ramp(each)

    def step(self) -> bool:
        """Counts one step of the optimiser and merges when due; True if it merged.

        A step that a gradient scaler of accelerate skipped does not count.
        """
        if any(getattr(each, "step_was_skipped", False) for each in self._given):
            return False
        self.steps += 1
        self.since_merge += 1
        if self.since_merge < self.every and not self._is_beyond_norm():
            return False
        self.merge()
        return True

    def merge(self) -> None:
        """Folds the rotations into the weights now. Pending gradients of the rotations are dropped."""
        layers = self._layers()
        self.merges += 1
        self.since_merge = 0
        for layer in layers:
            layer.fold()
            if self.merges % self.resample_every == 0:
                layer.redraw()
        parameters = [parameter for layer in layers for parameter in (layer.poet_in, layer.poet_out)]
        for each in self._optimizers:
            _forget(each, parameters)

    def state_dict(self) -> dict[str, int]:
        """Counters: optimiser steps, steps since the last merge, merges."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes the counters of `state_dict`. Load the states of the model and the optimiser before it."""
        if set(state) != set(_COUNTERS) or not all(isinstance(value, int) for value in state.values()):
            raise SpecError(f"the state of a Merger holds {', '.join(_COUNTERS)}; this one holds {', '.join(state)}")
        layers = self._layers()
        if any(layer.merges != state["merges"] for layer in layers):
            raise SpecError(
                f"the merger's state is after {state['merges']} merges, the model after {layers[0].merges}; "
                "load the model's state of the same checkpoint first"
            )
        for name in _COUNTERS:
            setattr(self, name, state[name])

    def _layers(self) -> list[PoetLinear]:
        layers = poet_layers(self._model)
        if not layers:
            raise SpecError("the model has no POET layer; call wrap before making a Merger")
        return layers

    def _check_optimizers(self) -> None:
        held = {
            id(parameter) for each in self._optimizers for group in each.param_groups for parameter in group["params"]
        }
        for each in self._optimizers:
            if isinstance(each, torch.optim.LBFGS):
                raise SpecError("LBFGS keeps one state for all parameters, which a merge cannot reset")
        decayed = {
            id(parameter)
            for each in self._optimizers
            for group in each.param_groups
            for parameter in group["params"]
            if group.get("weight_decay")
        }
        for layer in self._layers():
            for side in ("in", "out"):
                parameter = getattr(layer, f"poet_{side}")
                if id(parameter) in decayed:
                    warnings.warn(
                        f"weight decay acts on {layer.poet_name}.poet_{side} and pulls it towards the last merge; "
                        "make the optimiser from parameter_groups(model, ...)",
                        stacklevel=3,
                    )
                    decayed = set()
                if parameter.requires_grad and id(parameter) not in held:
                    raise SpecError(
                        f"no optimiser holds {layer.poet_name}.poet_{side}; make the optimiser after wrap, "
                        "for example from parameter_groups(model, ...)"
                    )

    @torch.no_grad()
    def _is_beyond_norm(self) -> bool:
        if self.max_norm is None:
            return False
        return any(
            spectral_norm_exceeds(part, size, self.max_norm)
            for layer in self._layers()
            for upper, blocks in ((layer.poet_in, layer.poet_blocks_in), (layer.poet_out, layer.poet_blocks_out))
            for part, size in blocks.split(upper)
        )

    def _install_ramp(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales the rate of the rotations' groups for the time of a step, so that no scheduler sees it."""
        own = {id(parameter) for layer in self._layers() for parameter in (layer.poet_in, layer.poet_out)}
        groups = []
        for number, group in enumerate(optimizer.param_groups):
            inside = [id(parameter) in own for parameter in group["params"]]
            if any(inside) and not all(inside):
                raise SpecError(
                    f"ramp: group {number} of the optimiser holds more than rotations; use parameter_groups"
                )
            if any(inside):
                groups.append(number)
        rates: list[Any] = []

        def lower(given: Any, args: Any, kwargs: Any) -> None:
            rates[:] = [given.param_groups[number]["lr"] for number in groups]
            share = min(1.0, (self.since_merge + 1) / self.ramp) if self.merges else 1.0
            for number, rate in zip(groups, rates, strict=True):
                given.param_groups[number]["lr"] = rate * share

        def restore(given: Any, args: Any, kwargs: Any) -> None:
            for number, rate in zip(groups, rates, strict=True):
                given.param_groups[number]["lr"] = rate

        optimizer.register_step_pre_hook(lower)
        optimizer.register_step_post_hook(restore)


def spectral_norm_exceeds(upper: Tensor, size: int, bound: float) -> bool:
    """Whether the spectral norm of a skew-symmetric block exceeds `bound`; upper triangles (blocks, entries).

    The norm of the upper triangle is an upper bound of it, since the singular values come in pairs. Blocks that this
    does not clear are decided by their singular values.
    """
    if upper.shape[1] == 0:
        return False
    suspects = upper[upper.norm(dim=1) > bound]
    if not suspects.shape[0]:
        return False
    return bool((torch.linalg.matrix_norm(skew_symmetric(suspects, size), 2) > bound).any())


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside wrappers, which keep it as `optimizer` or `optim`."""
    while True:
        inner = next((getattr(optimizer, name) for name in ("optimizer", "optim") if hasattr(optimizer, name)), None)
        if not isinstance(inner, torch.optim.Optimizer):
            break
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SpecError(f"{type(optimizer).__name__} is not a torch optimiser")
    return optimizer


def _forget(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Drops the state of `parameters`; the optimiser makes it anew, as in its first step, from the zeroed Q."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in parameters:
        if parameter not in optimizer.state:
            continue
        if isinstance(optimizer, torch.optim.Adagrad):  # The only one of torch that makes its state when constructed.
            state, group = optimizer.state[parameter], groups[id(parameter)]
            state["step"].zero_()
            state["sum"].fill_(group.get("initial_accumulator_value", 0))
        else:
            del optimizer.state[parameter]
