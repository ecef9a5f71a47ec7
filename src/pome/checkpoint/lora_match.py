"""The pairing of a LoRA adapter with a base: which tensors it changes, their orientation, ranks and scalings.

No torch, no tensor data.
"""

from __future__ import annotations

import math
import re

from pome.checkpoint.header import TensorEntry
from pome.checkpoint.lora import AdapterChange, LoraTensors, LowRank, check_rank, group_keys, refuse_shape
from pome.checkpoint.lora_config import MERGE_FIRST, LoraConfig
from pome.checkpoint.lora_experts import ExpertMatcher
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, PairingError, printable
from pome.roles.model_config import config_of, size_of
from pome.roles.pairing import pair_names
from pome.roles.roles import find_layout

_OWN_EXPERT = re.compile(r"experts\.\d+\.(gate_proj|up_proj|down_proj|w[123])$")


def read_adapter(ft: Checkpoint, base: Checkpoint, *, merges: bool) -> dict[str, AdapterChange]:
    """The change that the adapter `ft` makes to each tensor of BASE, by BASE's names.

    With `merges` BASE's tensors are to hold the changes, and what they cannot hold is refused.

    Raises CheckpointError for an adapter that is broken or of a kind not known here, and PairingError for one that
    does not fit BASE: keys that match no tensor, other shapes.
    """
    config = LoraConfig(ft)
    loras, replacements = group_keys(ft)
    return _Matcher(ft, base, config, loras, replacements, merges).match()


class _Matcher:
    """The state while one adapter is paired with one base."""

    def __init__(
        self,
        ft: Checkpoint,
        base: Checkpoint,
        config: LoraConfig,
        loras: list[LoraTensors],
        replacements: dict[str, TensorEntry],
        merges: bool,
    ) -> None:
        self.ft, self.base, self.config = ft, base, config
        self.loras, self.replacements, self.merges = loras, replacements, merges
        self.shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}
        self.unused: list[str] = []
        self.changes: dict[str, AdapterChange] = {}
        self.names = self._pair()

    def match(self) -> dict[str, AdapterChange]:
        for plain, entry in self.replacements.items():
            self._match_replacement(plain, entry)
        stacks: dict[str, list[LoraTensors]] = {}
        for lora in self.loras:
            name = self.names.get(f"{lora.module}.weight")
            if name is not None and lora.depth == 0 and len(self.shapes[name]) == 2:
                self._match_matrix(lora, name)
            else:
                stacks.setdefault(lora.module, []).append(lora)
        experts = ExpertMatcher(self.ft, self.base, self.config, self.names)
        for module, levels in stacks.items():
            changes = experts.match(module, sorted(levels, key=lambda lora: -lora.depth))
            if changes is None:
                self.unused += [entry.name for lora in levels for entry in lora.tensors.values()]
            for change in changes or ():
                self._put(change)
        if self.unused:
            shown = ", ".join(printable(key, 120) for key in self.unused[:3])
            more = f" and {len(self.unused) - 3} more" if len(self.unused) > 3 else ""
            raise PairingError(
                f"{printable(self.ft.source)}: {len(self.unused)} of the adapter's {len(self.ft.tensors)} keys match "
                f"no tensor of {printable(self.base.source)}: {shown}{more}; give as BASE the model it was trained on, "
                f"{MERGE_FIRST}"
            )
        return self.changes

    def _match_replacement(self, plain: str, entry: TensorEntry) -> None:
        name = self.names.get(plain)
        if name is None:
            self.unused.append(entry.name)
            return
        if self.shapes[name] != entry.shape:
            vocabulary = {part.role for part in find_layout(name, self.shapes[name], self.base.config).parts}
            why = "resized vocabularies are not supported; " if vocabulary <= {"embed", "head"} else ""
            raise PairingError(
                f"{self.ft.where(entry.name)}: its shape {list(entry.shape)} is not {list(self.shapes[name])} of "
                f"BASE's {printable(name)}; {why}is {printable(self.base.source)} the model it was trained on? "
                f"give that, {MERGE_FIRST}"
            )
        if self.merges and self._is_untied(name, entry):
            raise PairingError(
                f"{self.ft.where(entry.name)}: the adapter replaces the embedding and leaves the head, but BASE "
                f"stores one tensor for both; write an adapter (--out-format adapter), {MERGE_FIRST}"
            )
        self._put(AdapterChange(name, whole=entry.name))

    def _is_untied(self, name: str, entry: TensorEntry) -> bool:
        """Whether a module to save replaces an embedding that the head shares: PEFT leaves the head as it is.

        A LoRA of such an embedding stays shared.
        """
        module = entry.name.rpartition(".")[0]
        if not any(module.endswith(str(saved)) for saved in self.config.get("modules_to_save") or ()):
            return False
        config = self.base.config
        text = config_of(name, config)
        if size_of(text, "vocab_size") not in (None, self.shapes[name][0]):
            return False  # a table of positions or of token types
        roles = {
            one: {part.role for part in find_layout(one, shape, config).parts} for one, shape in self.shapes.items()
        }
        tied = {side.get("tie_word_embeddings") for side in (config, text) if side} - {None} != {False}
        return tied and roles[name] == {"embed"} and {"head"} not in roles.values()

    def _pair(self) -> dict[str, str]:
        """Names in the model -> names in BASE, which may lack a prefix or have another.

        The sides of a shape are compared without their order, for the orientation of a matrix is decided later.
        """
        wanted = {plain: entry.shape for plain, entry in self.replacements.items()}
        for lora in self.loras:
            a, b = lora.pair
            size = (b.shape[0], a.shape[1])
            wanted[f"{lora.module}.weight"] = size
            if f"{lora.module}.bias" not in wanted and "lora_B.bias" in lora.tensors:
                wanted[f"{lora.module}.bias"] = (b.shape[0],)
            for name in self.config.list_targets(lora.module):
                experts = a.shape[0] // self.config.resolve_rank(name)
                wanted[name] = (experts, *size)
        sorted_base = {name: tuple(sorted(shape)) for name, shape in self.shapes.items()}
        return pair_names(sorted_base, {name: tuple(sorted(shape)) for name, shape in wanted.items()})

    def _match_matrix(self, lora: LoraTensors, name: str) -> None:
        a, b = lora.pair
        out_in, shape = (b.shape[0], a.shape[1]), self.shapes[name]
        if lora.is_embedding:
            kind, flipped = "embedding", True
        elif self.config.is_target(f"{lora.module}.weight"):
            kind, flipped = "parameter", False
        else:
            # As in PEFT the kind of module decides, whatever fan_in_fan_out says; only a square matrix leaves a doubt.
            square = shape[0] == shape[1]
            told = bool(self.config.get("fan_in_fan_out")) or find_layout(name, shape, self.base.config).transposed
            kind, flipped = "linear", told if square else shape != out_in
            if _OWN_EXPERT.search(lora.module):
                kind = "parameter"  # transformers 5 holds single experts stacked, and PEFT merges into the stack
        if shape != (out_in[::-1] if flipped else out_in):
            refuse_shape(self.ft, self.base, lora, name, shape)
        key = f"{lora.module}.weight" if kind == "parameter" else lora.module
        rank, scaling = check_rank(self.ft, self.config, lora, key, 1)
        magnitude = lora.tensors.get("lora_magnitude_vector")
        if bool(self.config.get("use_dora")) != (magnitude is not None) or (
            magnitude is not None and math.prod(magnitude.shape) != out_in[0]
        ):
            raise CheckpointError(
                f"{self.ft.where(a.name)}: use_dora is {bool(self.config.get('use_dora'))}, but its "
                f"lora_magnitude_vector is {'absent' if magnitude is None else list(magnitude.shape)}; save or "
                "download the adapter again"
            )
        low = LowRank(
            key, a.name, b.name, rank, scaling, kind, flipped, magnitude=magnitude.name if magnitude else None
        )
        self._put(AdapterChange(name, low=low))
        bias = lora.tensors.get("lora_B.bias")
        if bias is not None:
            beside = self.names.get(f"{lora.module}.bias")
            if beside is None:
                self.unused.append(bias.name)
            else:
                self._put(AdapterChange(beside, bias=(bias.name, scaling)))

    def _put(self, change: AdapterChange) -> None:
        """Add a change to what the other keys of the adapter change in the same tensor."""
        name = change.name
        before = self.changes.get(name, AdapterChange(name))
        if before.low is not None and change.low is not None or before.bias is not None and change.bias is not None:
            where = printable(self.ft.source)
            raise CheckpointError(f"{where}: changes {printable(name)} twice; save one adapter alone")
        self.changes[name] = AdapterChange(
            name, change.whole or before.whole, change.low or before.low, change.bias or before.bias
        )
