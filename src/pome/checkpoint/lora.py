"""The tensors of a PEFT LoRA adapter, and their changes of a base. No torch; tensor data only on demand.

A LoRA of a module adds `scaling * B A` to its weight, with A (r, in) and B (out, r). For stacked experts A is
(E * r, in), one expert after the other, and B is (out, r * E), the experts interleaved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import NoReturn

from pome.checkpoint.choice import FUSE_MLX
from pome.checkpoint.header import TensorEntry
from pome.checkpoint.lora_config import MERGE_FIRST, LoraConfig
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, PairingError, printable
from pome.roles.layout import Part

READABLE = ("F64", "F32", "F16", "BF16")

_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_LORA = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<tail>(\.[^.]+){0,2})"
)


@dataclass(frozen=True, slots=True)
class LowRank:
    """`scaling * B A` as the change of one stored tensor, of a part of one, or of the experts of one."""

    key: str  # by which PEFT finds rank and alpha: the module, or its parameter
    a: str  # names in the adapter's file
    b: str
    rank: int
    scaling: float
    kind: str  # `linear`, `embedding`, `parameter` or `expert`: PEFT rounds each in its own way
    flipped: bool  # stored the other way round: the change is (B A)^T
    experts: int = 1  # how many share A and B
    expert: int | None = None  # the one of them that this tensor belongs to; None for all of a stack, in order
    rows: tuple[int, int] | None = None  # of the product, where BASE has several tensors for the adapter's one module
    part: Part | None = None  # of the stored tensor, where BASE has one tensor for several modules of the adapter
    slot: int | None = None  # the expert of a stored stack that the LoRA of a single expert changes
    magnitude: str | None = None  # the tensor of a DoRA's magnitudes


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """The change of one tensor of BASE: `whole` replaces it, `tokens` replaces some rows, `lows` and `bias` are added.

    With `added` BASE has no such tensor, and `whole` is the tensor itself.
    """

    name: str
    whole: str | None = None
    tokens: tuple[str, tuple[int, ...]] | None = None  # the tensor of the new rows, and their numbers
    lows: tuple[LowRank, ...] = ()
    bias: tuple[str, float] | None = None  # lora_B's bias and its scaling
    added: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the delta is a product of factors and nothing else."""
        return not self.whole and not self.tokens and bool(self.lows) and not any(low.magnitude for low in self.lows)

    def of_expert(self, expert: int | None) -> AdapterChange:
        """The change of one expert of a stack."""
        return replace(self, lows=tuple(low for low in self.lows if low.slot is None or low.slot == expert))


@dataclass
class MatchedAdapter:
    """An adapter paired with a base."""

    changes: dict[str, AdapterChange] = field(default_factory=dict)  # by BASE's names
    others: dict[str, LowRank] = field(default_factory=dict)  # LoRAs that BASE has no place for, by their A
    unmatched: list[str] = field(default_factory=list)  # tensors of the adapter that only an adapter as output can hold
    unused: list[str] = field(default_factory=list)  # tensors of the adapter that fit nothing
    notes: list[str] = field(default_factory=list)

    @property
    def loras(self) -> list[LowRank]:
        """One for each pair of factors in the file."""
        return list(({low.a: low for change in self.changes.values() for low in change.lows} | self.others).values())

    def put(self, ft: Checkpoint, change: AdapterChange) -> None:
        """Add a change to those that other keys of the adapter `ft` make in the same tensor. Raises CheckpointError."""
        before = self.changes.get(change.name, AdapterChange(change.name))
        lows = before.lows + change.lows
        targets = {(low.part and low.part.label, low.slot) for low in lows}
        if len(targets) < len(lows) or (len(lows) > 1 and (None, None) in targets) or before.bias and change.bias:
            where = printable(ft.source)
            raise CheckpointError(f"{where}: changes {printable(change.name)} twice; save one adapter alone")
        self.changes[change.name] = AdapterChange(
            change.name,
            change.whole or before.whole,
            change.tokens or before.tokens,
            lows,
            change.bias or before.bias,
            change.added or before.added,
        )


@dataclass(frozen=True, slots=True)
class AdapterSlice:
    """A tensor of an adapter, or one expert's rows of it, as it is stored."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """The tensors of one LoRA by their kind. `depth` counts the `base_layer` wrappers around it."""

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


def read_change(ft: Checkpoint, change: AdapterChange, expert: int | None) -> dict[str, AdapterSlice]:
    """The bytes of the adapter tensors that one unit needs, by name.

    Of stacked factors these are A's rows of the one expert, and all of B.
    """
    data = {}
    for name in filter(None, (change.whole, change.tokens and change.tokens[0], change.bias and change.bias[0])):
        _, entry = ft.tensors[name]
        start, nbytes, shape = entry.start, entry.nbytes, entry.shape
        if name == change.whole and expert is not None:
            nbytes //= shape[0]
            start += expert * nbytes
            shape = shape[1:]
        data[name] = AdapterSlice(entry.dtype, shape, ft.read(name, start, nbytes))
    for low in change.lows:
        for name in filter(None, (low.a, low.b, low.magnitude)):
            _, entry = ft.tensors[name]
            start, nbytes, shape = entry.start, entry.nbytes, entry.shape
            mine = low.expert if low.expert is not None else expert
            if name == low.a and low.experts > 1 and mine is not None:
                nbytes //= low.experts
                start += mine * nbytes
                shape = (low.rank, *shape[1:])
            data[name] = AdapterSlice(entry.dtype, shape, ft.read(name, start, nbytes))
    return data


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter, grouped by their effect; names are those of the model."""

    loras: list[LoraTensors]
    replacements: dict[str, TensorEntry]  # tensors that replace BASE's
    tokens: dict[str, TensorEntry]  # module -> the rows of its trained tokens


def group_keys(ft: Checkpoint) -> AdapterTensors:
    """The tensors of an adapter sorted by their keys. Raises CheckpointError for keys that are no PEFT LoRA's."""
    found: dict[tuple[str, int], dict[str, TensorEntry]] = {}
    replacements: dict[str, TensorEntry] = {}
    tokens: dict[str, TensorEntry] = {}
    for key, (_, entry) in ft.tensors.items():
        if entry.dtype not in READABLE:
            raise CheckpointError(f"{ft.where(key)}: stored as {entry.dtype}; save the adapter in float32 or bfloat16")
        name = key.removeprefix("base_model.").removeprefix("model.") if key.startswith("base_model.") else key
        trained = _TOKENS.fullmatch(name)
        if trained is not None:
            _put_once(ft, tokens, trained["module"], entry)
            continue
        match = _LORA.fullmatch(name)
        if match is None:
            _refuse_other_lora(ft, key)
            name = name.replace(".token_adapter.base_layer.", ".")
            words = [word for word in name.split(".") if word != "base_layer"]
            if "modules_to_save" in words[:-1]:
                at = words.index("modules_to_save")
                # Before the adapter's name was left out of the keys it stood after this word.
                words[at : at + (2 if at + 3 <= len(words) and words[at + 1] == "default" else 1)] = []
            plain = ".".join(words)
            _put_once(ft, replacements, plain, entry)
            continue
        module = match["module"]
        depth = 0
        while module.endswith(".base_layer"):
            module, depth = module.removesuffix(".base_layer"), depth + 1
        leaf = match["tail"].rpartition(".")[2]
        kind = match["kind"] + (".bias" if leaf == "bias" else "")
        _put_once(ft, found.setdefault((module, depth), {}), kind, entry)
    loras = [LoraTensors(module, depth, tensors) for (module, depth), tensors in found.items()]
    for lora in loras:
        _check_lora(ft, lora)
    return AdapterTensors(loras, replacements, tokens)


def _refuse_other_lora(ft: Checkpoint, key: str) -> None:
    """Raise CheckpointError for the factors of a LoRA in a form that is not PEFT's."""
    leaf = key.split(".")[-1 if not key.endswith((".weight", ".default")) else -2]
    if leaf in ("lora_a", "lora_b"):
        raise CheckpointError(f"{ft.where(key)}: an adapter of MLX, not of PEFT; {FUSE_MLX}")
    if re.fullmatch(r"(?:.*[._])?lora_?(a|b|up|down|left|right)s?", leaf, re.IGNORECASE):
        raise CheckpointError(
            f"{ft.where(key)}: the factor of a LoRA in a form that PEFT does not write; {MERGE_FIRST}"
        )


def _put_once(ft: Checkpoint, table: dict[str, TensorEntry], key: str, entry: TensorEntry) -> None:
    if key in table:
        raise CheckpointError(
            f"{ft.where(entry.name)}: a second adapter's tensor beside {printable(table[key].name)}; save one adapter "
            "alone (save_pretrained(..., selected_adapters=[NAME]))"
        )
    table[key] = entry


def _check_lora(ft: Checkpoint, lora: LoraTensors) -> None:
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
    if len(a.shape) == 3 and len(b.shape) == 3 and a.shape[0] == b.shape[0]:
        raise CheckpointError(
            f"{ft.where(a.name)}: shapes {list(a.shape)} and {list(b.shape)}, factors of {a.shape[0]} experts in three "
            "dimensions, which PEFT does not write; store lora_A as (experts * r, in) and lora_B as (out, r * experts) "
            f"with the experts interleaved, {MERGE_FIRST}"
        )
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


def check_rank(ft: Checkpoint, config: LoraConfig, lora: LoraTensors, key: str, experts: int) -> tuple[int, float]:
    """(rank, scaling) of a LoRA by the config. Raises CheckpointError where its tensors have another rank."""
    a, _ = lora.pair
    rank, scaling = config.resolve(key)
    if a.shape[0] != rank * experts:
        of = f" for each of {experts} experts" if experts > 1 else ""
        raise CheckpointError(
            f"{ft.where(a.name)}: its rank is {a.shape[0]}, by adapter_config.json it is {rank}{of}; "
            "take both files from one save of the adapter"
        )
    return rank, scaling


def refuse_shape(
    ft: Checkpoint, base: Checkpoint, lora: LoraTensors, name: str, shape: tuple[int, ...], way_out: str = ""
) -> NoReturn:
    """Raise PairingError: the factors of a LoRA do not multiply to BASE's tensor `name`."""
    a, b = lora.pair
    raise PairingError(
        f"{ft.where(a.name)}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit BASE's "
        f"{printable(name)} {list(shape)}; {way_out}is {printable(base.source)} the model it was trained on? give that"
    )
