"""POET layers put into a model and taken out again, and the parameter groups for an optimiser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pome.errors import SelectionError, SpecError
from pome.poet.config import DEFAULT_EXCLUDE, PoetConfig, patterns
from pome.poet.draws import draw_weight, given_spectrum
from pome.poet.layer import PoetLinear, make_plain, make_poet

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WrappedLayer:
    """One layer in POET training: (fan_out, fan_in), block sizes of both sides, trainable numbers of its rotations."""

    name: str
    shape: tuple[int, int]
    block_in: int
    block_out: int
    parameters: int


@dataclass(frozen=True)
class Report:
    """What `wrap` did: layers wrapped, matrices kept with the reason, trainable numbers of the model."""

    wrapped: tuple[WrappedLayer, ...]
    kept: dict[str, str] = field(default_factory=dict)
    trainable_before: int = 0
    trainable_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.wrapped)} layers in POET training, {len(self.kept)} matrices kept, "
            f"trainable numbers {self.trainable_before:,} -> {self.trainable_after:,}"
        ]
        lines += [f"kept {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def wrap(model: nn.Module, config: PoetConfig | None = None) -> Report:
    """POET layers in place of the linear layers of `model`, in place.

    With `init="keep"` (the default) the function of the model stays as it was. The weights of wrapped layers are
    frozen and rotations take their place as trainable parameters; biases, norms, embeddings and heads train on as
    before. Make the optimiser after this call.

    Heads and embeddings are kept unless `config.exclude` says otherwise. A layer whose weight is tied to another
    module is kept; one that `config.include` names raises `SpecError`. Raises `SpecError` for a model that is
    wrapped already, `SelectionError` where no layer is left to wrap.
    """
    config = config or PoetConfig()
    if not hasattr(torch, "get_autocast_dtype"):
        raise SpecError(f"POET needs torch 2.4 or later; this is {torch.__version__}")
    if poet_layers(model):
        raise SpecError("the model is in POET training already; call unwrap first")
    before = _trainable(model)
    kept: dict[str, str] = {}
    chosen: list[tuple[str, nn.Module, bool]] = []
    owners = _owners_of_weights(model)
    parents = _parents(model)
    head = _output_head(model) if config.exclude is None else None
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            kept.update(_bare_matrices(name, module))
            continue
        if module.weight.ndim < 2:
            continue
        reason = _reason_to_keep(name, module, config, head, parents.get(id(module)), owners)
        if reason is None:
            chosen.append((name, module, _is_conv1d(module)))
        else:
            kept[name] = reason
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3])
        raise SelectionError(f"no linear layer to wrap ({reasons or 'the model has no linear layer'})")
    _check_options(chosen, config)  # before the first change, so that an error leaves the model as it was
    layers = []
    for name, module, transposed in chosen:
        if config.init != "keep":
            _reinitialise(name, module, transposed, config)
        layers.append(make_poet(module, name, config, transposed))
    wrapped = tuple(
        WrappedLayer(
            layer.poet_name,
            (layer.fan_out, layer.fan_in),
            layer.poet_blocks_in.size,
            layer.poet_blocks_out.size,
            layer.poet_in.numel() + layer.poet_out.numel(),
        )
        for layer in layers
    )
    return Report(wrapped, kept, before, _trainable(model))


def unwrap(model: nn.Module) -> list[str]:
    """Plain layers under the original keys in place of the POET layers of `model`, in place; their names.

    What Q still holds is folded into the weights, so the function stays.
    """
    layers = poet_layers(model)
    names = [layer.poet_name for layer in layers]
    for layer in layers:
        make_plain(layer)
    return names


def poet_layers(model: nn.Module) -> list[PoetLinear]:
    """Layers of `model` in POET training, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, PoetLinear)]


def parameter_groups(
    model: nn.Module, *, lr: float, poet_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser: matrices, vectors without decay, rotations without decay.

    `poet_lr` is the rate of the rotations (default `lr`); the paper used 1e-3 for blocks of 256 or half the
    dimension, 2e-3 for 128 or a quarter, 4e-3 for 64 or an eighth. Decay on Q would pull towards the last merge.
    """
    own = {id(parameter) for layer in poet_layers(model) for parameter in (layer.poet_in, layer.poet_out)}
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr, "weight_decay": weight_decay},
        {"params": [], "lr": lr, "weight_decay": 0.0},
        {"params": [], "lr": lr if poet_lr is None else poet_lr, "weight_decay": 0.0, "poet": True},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            place = 2 if id(parameter) in own else 0 if parameter.ndim >= 2 else 1
            groups[place]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _reason_to_keep(
    name: str,
    module: nn.Module,
    config: PoetConfig,
    head: nn.Module | None,
    parent: nn.Module | None,
    owners: dict[int, list[str]],
) -> str | None:
    """Why a module with a matrix is not wrapped; None if it is."""
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return f"{type(module).__name__} is not a plain linear layer"
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"{type(parent).__name__} reads the weight past the layer's forward"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (a hook of accelerate, say)"
    if config.include is not None and not any(re.search(pattern, name) for pattern in patterns(config.include)):
        return "include does not match it"
    excluded = (DEFAULT_EXCLUDE,) if config.exclude is None else patterns(config.exclude)
    if module is head or any(re.search(pattern, name) for pattern in excluded):
        return "head or embedding" if config.exclude is None else "excluded"
    if weight.dtype not in _FLOATS or type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return f"its weight is a {weight.dtype} {type(weight).__name__}"
    if weight.is_meta:
        return "its weight is on the meta device"
    if 0 in weight.shape:
        return "its weight is empty"
    others = [other for other in owners[id(weight)] if other != (f"{name}.weight" if name else "weight")]
    if others:
        if config.include is not None:
            raise SpecError(
                f"include matches {name}, whose weight is tied to {others[0]}; "
                "untie it, or leave it out by include or exclude"
            )
        return f"its weight is tied to {others[0]}"
    return None


def _is_conv1d(module: nn.Module) -> bool:
    # Known by name, so that transformers need not be there. Its weight is stored as (fan_in, fan_out).
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _owners_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter object is registered; a module that is used twice counts once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return owners


def _parents(model: nn.Module) -> dict[int, nn.Module]:
    return {id(child): module for module in model.modules() for child in module.children()}


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Module) else None


def _bare_matrices(name: str, module: nn.Module) -> dict[str, str]:
    """Matrices that a module holds under other names than `weight`, such as stacked experts."""
    return {
        f"{name}.{key}" if name else key: f"a parameter of {type(module).__name__}, not of a linear layer"
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 2
    }


def _check_options(chosen: list[tuple[str, nn.Module, bool]], config: PoetConfig) -> None:
    for name, module, _ in chosen:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if config.rounding == "stochastic" and weight.dtype == torch.float16:
            raise SpecError(
                f"{name}: stochastic rounding is for bfloat16, the weight is float16; use rounding='nearest'"
            )
        if not isinstance(config.init, str):
            given_spectrum(config.init, min(weight.shape), name)


@torch.no_grad()
def _reinitialise(name: str, module: nn.Module, transposed: bool, config: PoetConfig) -> None:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    fan_out, fan_in = weight.shape[::-1] if transposed else weight.shape
    drawn = draw_weight(config.init, fan_out, fan_in, config.seed, name)
    weight.copy_(drawn.mT if transposed else drawn)


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
