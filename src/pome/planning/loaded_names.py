"""Names in the model: the module or parameter that transformers loads a stored tensor of a base into. No torch.

Most checkpoints have the model's own names. Where transformers renames or packs while it loads, `roles.families` says
so. An adapter must have the model's names: PEFT drops the keys of a name that the model lacks.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pome.checkpoint.source import Checkpoint
from pome.errors import PairingError, printable
from pome.roles.experts import STACKS
from pome.roles.families import family_of
from pome.roles.model_config import config_of

_SINGLE = re.compile(r"(?P<around>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)\.weight")
_HEADS = ("lm_head", "score", "classifier", "cls", "qa_outputs")
_OF_IMAGES_AND_SOUNDS = frozenset({"image_size", "num_channels", "num_mel_bins", "patch_size"})
# Leaves that PEFT takes for those of routed experts, in models whose experts transformers packs.
_EXPERT_LEAVES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def refuse_unknown_names(base: Checkpoint) -> None:
    """Raise PairingError for a model that is no language model alone.

    transformers renames the modules of most models of several parts, and of images and sounds, while it loads them
    (its `conversion_mapping`, version 5). PEFT would drop LoRAs of the stored names, and say so in a warning at most.
    """
    config = base.config or {}
    parts = [key for key, value in config.items() if isinstance(value, Mapping) and value.get("model_type")]
    if parts or not _OF_IMAGES_AND_SOUNDS.isdisjoint(config):
        raise PairingError(
            f"{printable(base.source)}: a {printable(str(config.get('model_type')))}, whose modules have other names "
            "once transformers has loaded it; adapters are made of language models alone, use pome edit for a full "
            "checkpoint"
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """Target of a stored tensor in the model.

    name: of the parameter. expert: the slice of a stack that a single expert becomes. rows: (first, all) rows of that
    slice, where others stand beside it.
    """

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class LoadedNames:
    """The names in the model of one base. `pairs` maps names of FT to names of BASE."""

    def __init__(self, base: Checkpoint, pairs: Mapping[str, str]) -> None:
        refuse_unknown_names(base)
        self.config = base.config
        self.shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}
        self.prefix = self._find_prefix(pairs)

    def find(self, name: str) -> Loaded:
        """The parameter that a stored tensor becomes, or becomes a slice of."""
        moved = self._rename(name)
        single = _SINGLE.fullmatch(name)
        if single is None or not self.packs_experts(name):
            return Loaded(moved)
        around, leaf = single["around"], single["leaf"]
        for stack, (_, kinds) in STACKS.items():
            for leaves in kinds:
                beside = [f"{around}.{single['expert']}.{one}.weight" for one in leaves]
                if leaf not in leaves or not all(one in self.shapes for one in beside):
                    continue
                heights = [self.shapes[one][0] for one in beside]
                first = sum(heights[: leaves.index(leaf)])
                module = self._rename(name).removesuffix(f".{single['expert']}.{leaf}.weight")
                return Loaded(f"{module}.{stack}", int(single["expert"]), (first, sum(heights)))
        return Loaded(moved)

    def list_parameters(self) -> list[str]:
        """The names in the model of all tensors of BASE."""
        return list(dict.fromkeys(self.find(name).name for name in self.shapes))

    def packs_experts(self, name: str) -> bool:
        """Whether transformers holds the experts of the model in stacks, however they are stored."""
        return family_of(config_of(name, self.config)).experts is not None

    def is_module(self, name: str) -> bool:
        """Whether a parameter is targeted by its module. Else PEFT is told the parameter itself.

        In models with packed experts PEFT reads some names of dense modules as names of the experts.
        """
        if not name.endswith(".weight"):
            return False
        return not (name.split(".")[-2] in _EXPERT_LEAVES and self.packs_experts(name))

    def count_experts(self, name: str) -> int:
        """How many experts the stack has that the tensor `name` is in or becomes part of."""
        single = _SINGLE.fullmatch(name)
        if single is None:
            return self.shapes[name][0]
        return self._single_counts[single["around"], single["leaf"]]

    @functools.cached_property
    def _single_counts(self) -> Counter[tuple[str, str]]:
        singles = filter(None, map(_SINGLE.fullmatch, self.shapes))
        return Counter((single["around"], single["leaf"]) for single in singles)

    def _rename(self, name: str) -> str:
        moved = name if name.split(".")[0] in _HEADS else self.prefix + name
        for pattern, replacement in family_of(config_of(name, self.config)).renames:
            moved = re.sub(pattern, replacement, moved)
        return moved

    def _find_prefix(self, pairs: Mapping[str, str]) -> str:
        """The prefix of the names in the model before those of BASE: as FT has it, or as its family does."""
        longer = [ft.removesuffix(base) for ft, base in pairs.items() if ft != base and ft.endswith(f".{base}")]
        if longer:
            return longer[0]
        prefix = family_of(self.config).prefix
        kinds = (self.config or {}).get("architectures")
        kinds = map(str, kinds) if isinstance(kinds, list) else ()
        headed = any("LMHead" in kind or not kind.endswith("Model") for kind in kinds)
        if not prefix or not headed or any(name.startswith(f"{prefix}.") for name in self.shapes):
            return ""
        return f"{prefix}."
