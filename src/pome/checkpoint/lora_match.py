"""Which tensors of a base an adapter changes, and how: names, orientations, ranks and scalings. No tensor data."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pome.checkpoint.header import TensorEntry
from pome.checkpoint.lora import MERGE_FIRST, Change, Lora, LowRank, refuse_unknown_kinds, sort_keys
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, PairingError, printable
from pome.roles.families import family_of
from pome.roles.model_config import config_of, size_of
from pome.roles.pairing import pair_names
from pome.roles.roles import find_layout

# Fused experts as transformers holds them -> the leaves of single experts as checkpoints store them.
_SPLIT = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_OWN_EXPERT = re.compile(r"experts\.\d+\.(gate_proj|up_proj|down_proj|w[123])$")


def read_adapter(ft: Checkpoint, base: Checkpoint, *, merges: bool) -> dict[str, Change]:
    """What the adapter `ft` does to each tensor of BASE that it touches, by BASE's names.

    With `merges` BASE's tensors are to hold the changes, and it is refused what they cannot hold.

    Raises CheckpointError for an adapter that is broken or of a kind not known here, and PairingError for one that
    does not fit BASE: keys that match no tensor, other shapes.
    """
    config = ft.adapter_config or {}
    refuse_unknown_kinds(ft, config)
    loras, wholes = sort_keys(ft)
    return _Fitting(ft, base, config, loras, wholes, merges).fit()


class _Fitting:
    """One adapter being fitted to one base."""

    def __init__(
        self,
        ft: Checkpoint,
        base: Checkpoint,
        config: Mapping[str, Any],
        loras: list[Lora],
        wholes: dict[str, TensorEntry],
        merges: bool,
    ) -> None:
        self.ft, self.base, self.config = ft, base, config
        self.loras, self.wholes, self.merges = loras, wholes, merges
        self.shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}
        self.unused: list[str] = []
        self.changes: dict[str, Change] = {}
        self.targets = [str(target) for target in config.get("target_parameters") or ()]
        self.names = self._pair()

    def fit(self) -> dict[str, Change]:
        for plain, entry in self.wholes.items():
            name = self.names.get(plain)
            if name is None:
                self.unused.append(entry.name)
                continue
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
            self._put(name, Change(name, whole=entry.name))
        stacks: dict[str, list[Lora]] = {}
        for lora in self.loras:
            name = self.names.get(f"{lora.module}.weight")
            if name is not None and lora.depth == 0 and len(self.shapes[name]) == 2:
                self._fit_matrix(lora, name)
            else:
                stacks.setdefault(lora.module, []).append(lora)
        for module, levels in stacks.items():
            self._fit_experts(module, sorted(levels, key=lambda lora: -lora.depth))
        if self.unused:
            shown = ", ".join(printable(key, 120) for key in self.unused[:3])
            more = f" and {len(self.unused) - 3} more" if len(self.unused) > 3 else ""
            raise PairingError(
                f"{printable(self.ft.source)}: {len(self.unused)} of the adapter's {len(self.ft.tensors)} keys match "
                f"no tensor of {printable(self.base.source)}: {shown}{more}; give as BASE the model it was trained on, "
                f"{MERGE_FIRST}"
            )
        return self.changes

    def _is_untied(self, name: str, entry: TensorEntry) -> bool:
        """Whether a module to save takes the place of an embedding that the head shares: PEFT leaves the head alone.

        What a LoRA of the embedding brings along stays shared.
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
        """Names in the model -> names in BASE, which may lack a prefix, or have another.

        Shapes are compared without their order: which way round a matrix is stored is a question for later.
        """
        wanted = {plain: entry.shape for plain, entry in self.wholes.items()}
        for lora in self.loras:
            a, b = lora.pair
            size = (b.shape[0], a.shape[1])
            wanted[f"{lora.module}.weight"] = size
            if f"{lora.module}.bias" not in wanted and "lora_B.bias" in lora.tensors:
                wanted[f"{lora.module}.bias"] = (b.shape[0],)
            for name in self._list_parameters(lora.module):
                experts = a.shape[0] // max(self._rank_of(name), 1)
                wanted[name] = (experts, *size)
        sorted_base = {name: tuple(sorted(shape)) for name, shape in self.shapes.items()}
        return pair_names(sorted_base, {name: tuple(sorted(shape)) for name, shape in wanted.items()})

    def _list_parameters(self, module: str) -> list[str]:
        """The parameters of a module that the config targets by name."""
        found = []
        for target in self.targets:
            around, _, leaf = target.rpartition(".")
            if not around or module == around or module.endswith("." + around):
                found.append(f"{module}.{leaf}")
        return list(dict.fromkeys(found))

    def _is_targeted(self, name: str) -> bool:
        return any(name == target or name.endswith("." + target) for target in self.targets)

    def _fit_matrix(self, lora: Lora, name: str) -> None:
        a, b = lora.pair
        out_in, shape = (b.shape[0], a.shape[1]), self.shapes[name]
        if lora.is_embedding:
            kind, flipped = "embedding", True
        elif self._is_targeted(f"{lora.module}.weight"):
            kind, flipped = "parameter", False
        else:
            # As PEFT, which corrects fan_in_fan_out by the kind of module; only a square matrix leaves a doubt.
            square = shape[0] == shape[1]
            told = bool(self.config.get("fan_in_fan_out")) or find_layout(name, shape, self.base.config).transposed
            kind, flipped = "linear", told if square else shape != out_in
            if _OWN_EXPERT.search(lora.module):
                kind = "parameter"  # transformers 5 holds single experts stacked, and PEFT merges into the stack
        if shape != (out_in[::-1] if flipped else out_in):
            self._refuse_shape(lora, name)
        key = f"{lora.module}.weight" if kind == "parameter" else lora.module
        rank, scaling = self._check_rank(lora, key, 1)
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
        self._put(name, Change(name, low=low))
        bias = lora.tensors.get("lora_B.bias")
        if bias is not None:
            beside = self.names.get(f"{lora.module}.bias")
            if beside is None:
                self.unused.append(bias.name)
            else:
                self._put(beside, Change(beside, bias=(bias.name, scaling)))

    def _fit_experts(self, module: str, levels: list[Lora]) -> None:
        """LoRAs of the parameters of one module, innermost first: found by shape, stacked in BASE or one by one."""
        params = [name for name in self._list_parameters(module) if self._find_stored(name)]
        fits = [
            order
            for order in itertools.permutations(params, len(levels))
            if all(self._matches(lora, name) for lora, name in zip(levels, order, strict=True))
        ]
        if not fits:
            if params:
                self._refuse_shape(levels[0], self._find_stored(params[0])[0][0])
            self.unused += [entry.name for lora in levels for entry in lora.tensors.values()]
            return
        if len(fits) > 1:
            where = self.ft.where(levels[0].pair[0].name)
            raise PairingError(f"{where}: fits several parameters of {printable(module)}; {MERGE_FIRST}")
        for lora, name in zip(levels, fits[0], strict=True):
            self._fit_parameter(lora, name)

    def _fit_parameter(self, lora: Lora, name: str) -> None:
        a, b = lora.pair
        extra = sorted(lora.tensors.keys() - {"lora_A", "lora_B"})
        if extra:
            raise CheckpointError(f"{self.ft.where(a.name)}: {', '.join(extra)} on stacked experts; {MERGE_FIRST}")
        stored = self._find_stored(name)
        stacked = len(stored) == 1 and len(stored[0]) == 1 and len(self.shapes[stored[0][0]]) == 3
        experts = self.shapes[stored[0][0]][0] if stacked else len(stored)
        rank, scaling = self._check_rank(lora, name, experts)
        low = LowRank(name, a.name, b.name, rank, scaling, "parameter", False, experts)
        if stacked:
            tensor = stored[0][0]
            rows, columns = self.shapes[tensor][1:]
            # PEFT takes the first axis after the experts for `in` where transformers marks them as (E, in, out).
            if rows == columns and not family_of(config_of(tensor, self.base.config)).marked_in_out:
                raise PairingError(
                    f"{self.ft.where(a.name)}: the experts of {printable(tensor)} are square, and releases of PEFT "
                    f"differ in which side is which; {MERGE_FIRST}"
                )
            flipped = rows == columns or (b.shape[0], a.shape[1]) != (rows, columns)
            self._put(tensor, Change(tensor, low=replace(low, flipped=flipped)))
            return
        for expert, leaves in enumerate(stored):
            at = 0
            for leaf in leaves:
                rows = self.shapes[leaf][0]
                part = replace(low, expert=expert, rows=(at, at + rows) if len(leaves) > 1 else None)
                self._put(leaf, Change(leaf, low=part))
                at += rows

    def _find_stored(self, name: str) -> list[tuple[str, ...]]:
        """Where BASE stores a stacked parameter: in one tensor, or each expert's own (halves in order); or nowhere."""
        fused = self.names.get(name) or (name if name in self.shapes else None)
        if fused is not None:
            return [(fused,)]
        module, _, leaf = name.rpartition(".")
        for around in self._list_prefixes(module):
            for leaves in _SPLIT.get(leaf, ()):
                stored = []
                for expert in itertools.count():
                    tensors = tuple(f"{around}.{expert}.{one}.weight" for one in leaves)
                    if not all(tensor in self.shapes and len(self.shapes[tensor]) == 2 for tensor in tensors):
                        break
                    stored.append(tensors)
                if stored:
                    return stored
        return []

    def _list_prefixes(self, module: str) -> Iterator[str]:
        """A module of experts by the names that it may have in BASE."""
        prefixes = {(old, new) for old, new in self.names.items() if old != new}
        changes = {(old[: -len(end)], new[: -len(end)]) for old, new in prefixes if (end := _common_end(old, new))}
        for old, new in [("", ""), *sorted(changes)]:
            if module.startswith(old):
                moved = new + module[len(old) :]
                yield moved
                yield re.sub(r"\.mlp\.experts$", ".block_sparse_moe.experts", moved)

    def _matches(self, lora: Lora, name: str) -> bool:
        a, b = lora.pair
        stored = self._find_stored(name)
        shape = self.shapes[stored[0][0]]
        size = (b.shape[0], a.shape[1])
        if len(shape) == 3:
            return a.shape[0] % shape[0] == 0 and size in (shape[1:], shape[:0:-1])
        rows = sum(self.shapes[leaf][0] for leaf in stored[0])
        return a.shape[0] % len(stored) == 0 and size == (rows, shape[1])

    def _rank_of(self, key: str) -> int:
        rank = _choose(self.config.get("rank_pattern"), key, self.config.get("r"), self.ft)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise CheckpointError(f"{printable(self.ft.source)}/adapter_config.json: r {rank!r} is not a whole number")
        return rank

    def _check_rank(self, lora: Lora, key: str, experts: int) -> tuple[int, float]:
        """(r, scaling) of a LoRA by the config, which must agree with its tensors."""
        a, _ = lora.pair
        rank = self._rank_of(key)
        if a.shape[0] != rank * experts:
            of = f" for each of {experts} experts" if experts > 1 else ""
            raise CheckpointError(
                f"{self.ft.where(a.name)}: its rank is {a.shape[0]}, by adapter_config.json it is {rank}{of}; "
                "take both files from one save of the adapter"
            )
        alpha = _choose(self.config.get("alpha_pattern"), key, self.config.get("lora_alpha"), self.ft)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(
                f"{printable(self.ft.source)}/adapter_config.json: lora_alpha {alpha!r} is not a number"
            )
        return rank, alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _put(self, name: str, change: Change) -> None:
        before = self.changes.get(name, Change(name))
        if before.low is not None and change.low is not None or before.bias is not None and change.bias is not None:
            where = printable(self.ft.source)
            raise CheckpointError(f"{where}: changes {printable(name)} twice; save one adapter alone")
        self.changes[name] = Change(
            name, change.whole or before.whole, change.low or before.low, change.bias or before.bias
        )

    def _refuse_shape(self, lora: Lora, name: str) -> None:
        a, b = lora.pair
        raise PairingError(
            f"{self.ft.where(a.name)}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit BASE's "
            f"{printable(name)} {list(self.shapes[name])}; is {printable(self.base.source)} the model it was trained "
            "on? give that"
        )


def _common_end(old: str, new: str) -> str:
    """The longest common ending of whole words."""
    count = 0
    for one, other in zip(reversed(old.split(".")), reversed(new.split(".")), strict=False):
        if one != other:
            break
        count += 1
    return ".".join(old.split(".")[-count:]) if count else ""


def _choose(patterns: object, key: str, default: object, ft: Checkpoint) -> Any:
    """The value of the first pattern (a regular expression for the end of a name) that fits, as PEFT chooses it."""
    if not isinstance(patterns, Mapping):
        return default
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", key):
                return value
        except (re.error, RecursionError, OverflowError):
            raise CheckpointError(
                f"{printable(ft.source)}/adapter_config.json: {printable(str(pattern))} is not a regular expression; "
                "mend the pattern"
            ) from None
    return default
