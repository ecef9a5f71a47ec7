"""Numbers of layers and of experts that FT and BASE must share to be paired by number. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, printable
from pome.roles.model_config import Config, config_of, expert_count_of, size_of

_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
# Of models with an encoder and a decoder, which may be of different depths.
_DEPTH_OF_SIDE = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_hidden_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers"),
}


def refuse_other_counts(
    pairs: Mapping[str, str],
    base: Checkpoint,
    ft: Checkpoint,
    configs: tuple[Config | None, Config | None],
    spec: EditSpec,
) -> None:
    """Raise PairingError where a pair lies in stacks of different depth, or in layers of different numbers of experts.

    `pairs` are FT's edited tensors and their partners, `configs` those that BASE and FT have themselves: where one has
    none, the highest number in the names of a stack tells its depth.
    """
    stacks: dict[tuple[str, str], tuple[str, str]] = {}
    for name, other in pairs.items():
        stacks.setdefault((_stack_of(name), _stack_of(other)), (name, other))
    for (ours, theirs), (name, other) in stacks.items():
        if not ours or not theirs:
            continue
        told = [_find_depth(n, config) for n, config in ((name, configs[1]), (other, configs[0]))]
        if None in told:
            told = [_count_layers(side, stack) for side, stack in ((ft, ours), (base, theirs))]
        if told[0] != told[1] and not spec.allow_other_depth:
            raise PairingError(
                f"{printable(ft.source)}: {_say(told[0])} in {printable(ours)}, and BASE {printable(base.source)} has "
                f"{_say(told[1])} (num_hidden_layers): a layer's number says nothing of where it comes from; give the "
                "model that FT was trained from, or pair layers by number all the same with --allow-other-depth"
            )
        experts = [expert_count_of(config_of(n, config)) for n, config in ((name, configs[1]), (other, configs[0]))]
        if "expert" in name and None not in experts and experts[0] != experts[1]:
            raise PairingError(
                f"{ft.where(name)}: FT has {experts[0]} experts in a layer, BASE {experts[1]}: an expert's number says "
                "nothing of where it comes from; leave the experts out with --exclude"
            )


def _say(count: int | None) -> str:
    return f"{count} layers"


def _stack_of(name: str) -> str:
    """The words before the first number, such as `model.layers`; nothing outside of layers."""
    head, number, _ = re.split(r"\.(\d+)\.", name, maxsplit=1) if re.search(r"\.\d+\.", name) else ("", "", "")
    return head if number else ""


def _find_depth(name: str, config: Config | None) -> int | None:
    """The number of layers that a config gives to the stack of a tensor."""
    facts = config_of(name, config)
    sides = [side for side in _DEPTH_OF_SIDE if side in name.split(".")]
    return size_of(facts, *(_DEPTH_OF_SIDE[sides[0]] if len(sides) == 1 else _DEPTH))


def _count_layers(side: Checkpoint, stack: str) -> int:
    """One more than the highest number of a layer in a stack."""
    start = stack + "."
    numbers = [name[len(start) :].partition(".")[0] for name in side.tensors if name.startswith(start)]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
