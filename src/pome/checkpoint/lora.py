"""A PEFT LoRA adapter seen as changes of the stored tensors of a base. No torch, no tensor data but on demand.

A LoRA of a module changes its weight by `scaling * B A`, A (r, in) and B (out, r). Of stacked experts A is
(E * r, in), the experts one after the other, and B (out, r * E), the experts interleaved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pome.checkpoint.header import TensorEntry
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, printable

MERGE_FIRST = "or merge it with PEFT (merge_and_unload, save_pretrained) and give the merged model as FT"
READABLE = ("F64", "F32", "F16", "BF16")

# Options of a LoRA that change nothing in what it computes, or that are followed here. Any other may.
_KNOWN = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora",
    "qalora_group_size", "runtime_config", "lora_bias", "target_parameters",
})  # fmt: skip
_SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
# Initialisations that trained weights do not remember, and those that also change BASE's when the adapter is loaded.
_FORGOTTEN = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LORA = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<tail>(\.[^.]+){0,2})"
)


@dataclass(frozen=True, slots=True)
class LowRank:
    """`scaling * B A` as the change of one stored tensor, or of the experts of one."""

    key: str  # by which PEFT finds rank and alpha: the module, or its parameter
    a: str  # names in the adapter's file
    b: str
    rank: int
    scaling: float
    kind: str  # `linear`, `embedding` or `parameter`: PEFT rounds each in its own way
    flipped: bool  # stored the other way round: the change is (B A)^T
    experts: int = 1  # how many share A and B
    expert: int | None = None  # the one that this tensor belongs to; None for all of a stack, in order
    rows: tuple[int, int] | None = None  # of B, where two modules are stored that the adapter has as one
    magnitude: str | None = None  # DoRA's


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one tensor of BASE: replaced by `whole`, then changed by `low`, then by a LoRA's bias."""

    name: str
    whole: str | None = None
    low: LowRank | None = None
    bias: tuple[str, float] | None = None  # lora_B's bias and its scaling


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of an adapter, or a slice of one, as it is stored."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray


@dataclass(frozen=True, slots=True)
class Lora:
    """The tensors of one LoRA by their kind; `depth` counts the wrappers inside which it lies."""

    module: str
    depth: int
    tensors: dict[str, TensorEntry]

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding_A" in self.tensors

    @property
    def pair(self) -> tuple[TensorEntry, TensorEntry]:
        kinds = ("lora_embedding_A", "lora_embedding_B") if self.is_embedding else ("lora_A", "lora_B")
        return self.tensors[kinds[0]], self.tensors[kinds[1]]


def read_change(ft: Checkpoint, change: Change, expert: int | None) -> dict[str, Piece]:
    """What a unit needs of each adapter tensor, by name: of stacked factors A's rows of one expert, and all of B."""
    data = {}
    low = change.low
    names = [change.whole, change.bias[0] if change.bias else None]
    names += [low.a, low.b, low.magnitude] if low else []
    for name in filter(None, names):
        _, entry = ft.tensors[name]
        start, nbytes, shape = entry.start, entry.nbytes, entry.shape
        mine = low.expert if low is not None and low.expert is not None else expert
        if low is not None and name == low.a and low.experts > 1 and mine is not None:
            nbytes //= low.experts
            start += mine * nbytes
            shape = (low.rank, *shape[1:])
        elif name == change.whole and expert is not None:
            nbytes //= shape[0]
            start += expert * nbytes
            shape = shape[1:]
        data[name] = Piece(entry.dtype, shape, ft.read(name, start, nbytes))
    return data


def refuse_unknown_kinds(ft: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for an adapter that is no LoRA, or one whose merge is not known here."""
    where = f"{printable(ft.source)}/adapter_config.json"
    kind = str(config.get("peft_type"))
    if kind.upper() != "LORA":
        raise CheckpointError(f"{where}: peft_type {printable(kind)}, not LORA; {MERGE_FIRST}")
    for key, value in config.items():
        if value and key not in _KNOWN:
            raise CheckpointError(f"{where}: {printable(key)} is set, a LoRA of a kind not known here; {MERGE_FIRST}")
    for key in _SWITCHES:
        if config.get(key) is not None and not isinstance(config[key], bool):
            raise CheckpointError(
                f"{where}: {key} is {printable(repr(config[key]))}, neither true nor false; correct it as the adapter "
                "was trained"
            )
    start = str(config.get("init_lora_weights"))
    if start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights {printable(start)}, which changes BASE's weights too; save the adapter again "
            f"with save_pretrained(..., path_initial_model_for_weight_conversion=...), {MERGE_FIRST}"
        )
    if start.lower() not in _FORGOTTEN:
        raise CheckpointError(
            f"{where}: init_lora_weights {printable(start)}, a LoRA of a kind not known here; {MERGE_FIRST}"
        )


def sort_keys(ft: Checkpoint) -> tuple[list[Lora], dict[str, TensorEntry]]:
    """LoRAs by module, and the tensors that stand in the place of BASE's, by the names they have in the model."""
    found: dict[tuple[str, int], dict[str, TensorEntry]] = {}
    wholes: dict[str, TensorEntry] = {}
    for key, (_, entry) in ft.tensors.items():
        if entry.dtype not in READABLE:
            raise CheckpointError(f"{ft.where(key)}: stored as {entry.dtype}; save the adapter in float32 or bfloat16")
        name = key.removeprefix("base_model.").removeprefix("model.") if key.startswith("base_model.") else key
        match = _LORA.fullmatch(name)
        if match is None:
            words = [word for word in name.split(".") if word != "base_layer"]
            if "modules_to_save" in words[:-1]:
                at = words.index("modules_to_save")
                # Before the adapter's name was left out of the keys it stood after this word.
                words[at : at + (2 if at + 3 <= len(words) and words[at + 1] == "default" else 1)] = []
            plain = ".".join(words)
            _put_once(ft, wholes, plain, entry)
            continue
        module = match["module"]
        depth = 0
        while module.endswith(".base_layer"):
            module, depth = module.removesuffix(".base_layer"), depth + 1
        leaf = match["tail"].rpartition(".")[2]
        kind = match["kind"] + (".bias" if leaf == "bias" else "")
        _put_once(ft, found.setdefault((module, depth), {}), kind, entry)
    loras = [Lora(module, depth, tensors) for (module, depth), tensors in found.items()]
    for lora in loras:
        _check_lora(ft, lora)
    return loras, wholes


def _put_once(ft: Checkpoint, table: dict[str, TensorEntry], key: str, entry: TensorEntry) -> None:
    if key in table:
        raise CheckpointError(
            f"{ft.where(entry.name)}: a second adapter's tensor beside {printable(table[key].name)}; save one adapter "
            "alone (save_pretrained(..., selected_adapters=[NAME]))"
        )
    table[key] = entry


def _check_lora(ft: Checkpoint, lora: Lora) -> None:
    name = next(iter(lora.tensors.values())).name
    whole_pair = {"lora_A", "lora_B"} <= lora.tensors.keys() or {"lora_embedding_A", "lora_embedding_B"} <= (
        lora.tensors.keys()
    )
    if not whole_pair or {"lora_A", "lora_embedding_A"} <= lora.tensors.keys():
        raise CheckpointError(
            f"{ft.where(name)}: module {printable(lora.module)} has {', '.join(sorted(lora.tensors))}, not a pair of "
            "lora_A and lora_B; save or download the adapter again"
        )
    a, b = lora.pair
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(
            f"{ft.where(a.name)}: shapes {list(a.shape)} and {list(b.shape)}, the LoRA of a convolution or one saved "
            f"in shards; {MERGE_FIRST}"
        )
    if a.shape[0] != b.shape[1] or not all(a.shape + b.shape):
        raise CheckpointError(
            f"{ft.where(a.name)}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not multiply; save or download "
            "the adapter again"
        )
