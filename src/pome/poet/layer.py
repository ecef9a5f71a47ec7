"""Linear layer whose weight is rotated on both sides, R_out^T W R_in^T, without a product of the weight's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pome.errors import SpecError
from pome.poet.cayley import Terms
from pome.poet.config import PoetConfig
from pome.poet.draws import draw_index, draw_probe, generator, round_stochastically
from pome.poet.rotation import Blocks, apply_blocks, rotate, rotations

SIDES = ("in", "out")
_FORMAT = 1
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class PoetLinear(nn.Module):
    """A linear layer in POET training: y = (x R_in) W^T R_out + b on rows x, W frozen.

    An `nn.Linear` or a `Conv1D` of transformers becomes one by a change of its class, so hooks, names and the
    parameter objects stay. Every tensor that it adds is named `poet_...`:

    - `poet_in`, `poet_out`: the strict upper triangles of Q of one side, flat, the only new parameters; float32,
      or float64 for a float64 weight, whatever `Module.to` is told.
    - `poet_index_in`, `poet_index_out`: the rotated dimensions, block after block. They are stored, since another
      version of torch may draw other permutations from the same seed.
    - `poet_counts`: format, draws, merges, neumann_terms (-1 for exact), correct, sampling, both block sizes.
    - `poet_probe_in`, `poet_probe_out`, `poet_norm`, `poet_spectrum`: what `measure` compares with.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    poet_in: nn.Parameter
    poet_out: nn.Parameter
    poet_index_in: Tensor
    poet_index_out: Tensor
    poet_inverse_in: Tensor | None
    poet_inverse_out: Tensor | None
    poet_counts: Tensor
    poet_probe_in: Tensor
    poet_probe_out: Tensor
    poet_norm: Tensor
    poet_spectrum: Tensor | None
    poet_name: str
    poet_config: PoetConfig
    poet_plain: type[nn.Module]
    poet_trainable: bool
    poet_transposed: bool
    poet_blocks_in: Blocks
    poet_blocks_out: Blocks

    @property
    def fan_in(self) -> int:
        return self.weight.shape[0 if self.poet_transposed else 1]

    @property
    def fan_out(self) -> int:
        return self.weight.shape[1 if self.poet_transposed else 0]

    @property
    def draws(self) -> int:
        return int(self.poet_counts[1])

    @property
    def merges(self) -> int:
        return int(self.poet_counts[2])

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        terms, correct = self.poet_config.neumann_terms, self.poet_config.correct
        rows = x.reshape(-1, x.shape[-1])
        rows = rotate(rows, self.poet_in, self.poet_index_in, self.poet_inverse_in, self.poet_blocks_in, terms, correct)
        rows = F.linear(rows, self.weight.mT if self.poet_transposed else self.weight)
        rows = rotate(
            rows, self.poet_out, self.poet_index_out, self.poet_inverse_out, self.poet_blocks_out, terms, correct
        )
        if self.bias is not None:
            rows = rows + self.bias.to(rows.dtype)
        return rows.view(*x.shape[:-1], rows.shape[-1])

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """R_out^T W R_in^T as (fan_out, fan_in), in the precision of Q."""
        wide = self.poet_in.dtype
        weight = (self.weight.mT if self.poet_transposed else self.weight).to(wide)
        back = [value.mT for value in self.rotation_blocks("in")]
        weight = apply_blocks(weight, back, self.poet_index_in, self.poet_inverse_in)
        return apply_blocks(weight.mT, self.rotation_blocks("out"), self.poet_index_out, self.poet_inverse_out).mT

    def rotation_blocks(self, side: str) -> list[Tensor]:
        """E = R - I of the blocks of one side, each (blocks, b, b)."""
        upper, blocks = (self.poet_in, self.poet_blocks_in) if side == "in" else (self.poet_out, self.poet_blocks_out)
        return [
            made.value for made in rotations(upper, blocks, self.poet_config.neumann_terms, self.poet_config.correct)
        ]

    @torch.no_grad()
    def fold(self) -> None:
        """Merge: the weight takes up the rotation, Q becomes zero, the function stays.

        Raises `SpecError` where this process does not hold the whole layer.
        """
        for tensor, numbers in (
            (self.poet_in, self.poet_blocks_in.parameters),
            (self.poet_out, self.poet_blocks_out.parameters),
            (self.weight, self.poet_probe_in.numel() * self.poet_probe_out.numel()),
        ):
            if tensor.numel() != numbers or type(tensor.data) is not Tensor:
                raise SpecError(
                    f"{self.poet_name} is sharded over processes; a merge needs it whole (DDP keeps it whole)"
                )
        weight = self.effective_weight()
        for side, probe in zip(SIDES, self.rotated_probes(), strict=True):
            getattr(self, f"poet_probe_{side}").copy_(probe)
        if self.poet_config.rounding == "stochastic" and self.weight.dtype == torch.bfloat16:
            source = generator(self.poet_config.seed, self.poet_name, "rounding", self.merges)
            weight = round_stochastically(weight, source)
        self.weight.copy_(weight.mT if self.poet_transposed else weight)
        self.poet_counts[2] += 1
        for parameter in (self.poet_in, self.poet_out):
            parameter.zero_()
            parameter.grad = None

    @torch.no_grad()
    def rotated_probes(self) -> tuple[Tensor, Tensor]:
        """Probe vectors under the accumulated rotation of the input side and of the output side, with Q as it is."""
        back = [value.mT.float() for value in self.rotation_blocks("in")]
        forth = [value.float() for value in self.rotation_blocks("out")]
        return (
            apply_blocks(self.poet_probe_in[None], back, self.poet_index_in, self.poet_inverse_in)[0],
            apply_blocks(self.poet_probe_out[None], forth, self.poet_index_out, self.poet_inverse_out)[0],
        )

    def start_probes(self) -> tuple[Tensor, Tensor]:
        """Probe vectors of both sides as they were at wrap."""
        seed, name = self.poet_config.seed, self.poet_name
        device = self.weight.device
        return (
            draw_probe(seed, name, "in", self.fan_in).to(device),
            draw_probe(seed, name, "out", self.fan_out).to(device),
        )

    @torch.no_grad()
    def redraw(self) -> None:
        """New random blocks. Only valid while Q is zero, right after `fold`."""
        self.poet_counts[1] += 1
        config, number = self.poet_config, self.draws
        for side, dimension in zip(SIDES, (self.fan_in, self.fan_out), strict=True):
            blocks = self.poet_blocks_in if side == "in" else self.poet_blocks_out
            drawn = draw_index(config.seed, self.poet_name, side, number, dimension, blocks)
            getattr(self, f"poet_index_{side}").copy_(drawn)
        self._invert()

    def _invert(self) -> None:
        for side in SIDES:
            inverse = getattr(self, f"poet_inverse_{side}")
            if inverse is not None:
                inverse.copy_(getattr(self, f"poet_index_{side}").argsort())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PoetLinear:
        """Moves as `nn.Module` does, but leaves `poet_...` tensors in float32 where the module goes to 16 bits."""
        own = [*self._parameters.items(), *self._buffers.items()]
        kept = {id(tensor) for name, tensor in own if tensor is not None and name.startswith("poet_")}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) in kept and tensor.is_floating_point():
                probe = fn(tensor.detach().new_empty(0))
                if probe.dtype in _LOW_PRECISION:
                    return tensor.to(probe.device)
            return fn(tensor)

        apply: Callable[..., Any] = super()._apply
        apply(move, recurse)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        counts = state_dict.get(prefix + "poet_counts")
        mine = _settings(self.poet_config, self.poet_blocks_in, self.poet_blocks_out)
        if counts is not None and (counts[0].item() != _FORMAT or counts[3:].tolist() != mine):
            error_msgs.append(
                f"{prefix[:-1]}: this layer was wrapped with (neumann_terms, correct, full sampling, block sizes) "
                f"{mine}, the state was saved with {counts[3:].tolist()}; wrap with the options of the saved run"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        with torch.no_grad():
            self._invert()

    def extra_repr(self) -> str:
        config = self.poet_config
        return (
            f"in_features={self.fan_in}, out_features={self.fan_out}, bias={self.bias is not None}, "
            f"sampling={config.sampling}, blocks={self.poet_blocks_in.size}x{self.poet_blocks_out.size}, "
            f"neumann_terms={config.neumann_terms}"
        )


def _settings(config: PoetConfig, blocks_in: Blocks, blocks_out: Blocks) -> list[int]:
    """Options on which the meaning of a saved Q depends, as integers."""
    terms: Terms = config.neumann_terms
    numbers = [-1 if terms == "exact" else terms, int(config.correct), int(config.sampling == "full")]
    return [*numbers, blocks_in.size, blocks_out.size]


def make_poet(module: nn.Module, name: str, config: PoetConfig, transposed: bool) -> PoetLinear:
    """`module` as a `PoetLinear`, in place. Its weight must be a dense floating-point matrix that nothing else uses."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    plain = type(module)
    object.__setattr__(module, "__class__", PoetLinear)
    layer = cast(PoetLinear, module)
    layer.poet_plain = plain
    layer.poet_name, layer.poet_config, layer.poet_transposed = name, config, transposed
    layer.poet_trainable = weight.requires_grad
    weight.requires_grad_(False)
    weight.grad = None
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = weight.device
    for side, dimension in zip(SIDES, (layer.fan_in, layer.fan_out), strict=True):
        size = config.block_of(dimension)
        blocks = Blocks(size if config.sampling == "full" else dimension, size)
        setattr(layer, f"poet_blocks_{side}", blocks)
        upper = nn.Parameter(torch.zeros(blocks.parameters, dtype=wide, device=device))
        upper.requires_grad_(blocks.parameters > 0)
        layer.register_parameter(f"poet_{side}", upper)
        index = draw_index(config.seed, name, side, 0, dimension, blocks).to(device)
        layer.register_buffer(f"poet_index_{side}", index)
        inverse = index.argsort() if blocks.dimensions == dimension else None
        layer.register_buffer(f"poet_inverse_{side}", inverse, persistent=False)
        layer.register_buffer(f"poet_probe_{side}", draw_probe(config.seed, name, side, dimension).to(device))
    numbers = _settings(config, layer.poet_blocks_in, layer.poet_blocks_out)
    layer.register_buffer("poet_counts", torch.tensor([_FORMAT, 0, 0, *numbers], device=device))
    values = weight.detach().to(wide)
    layer.register_buffer("poet_norm", values.norm())
    layer.register_buffer("poet_spectrum", torch.linalg.svdvals(values) if config.track_spectrum else None)
    return layer


def make_plain(layer: PoetLinear) -> nn.Module:
    """The layer as it was before `make_poet`, with what Q holds folded into the weight, in place."""
    layer.fold()
    layer.weight.requires_grad_(layer.poet_trainable)
    for name in [name for name in layer._parameters if name.startswith("poet_")]:
        del layer._parameters[name]
    for name in [name for name in layer._buffers if name.startswith("poet_")]:
        del layer._buffers[name]
        layer._non_persistent_buffers_set.discard(name)
    plain = layer.poet_plain
    for name in [name for name in layer.__dict__ if name.startswith("poet_")]:
        del layer.__dict__[name]
    object.__setattr__(layer, "__class__", plain)
    return layer
