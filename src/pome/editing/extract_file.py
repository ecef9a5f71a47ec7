"""The files of an extracted adapter: its tensors assembled from the scratch file, and its config."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pome.checkpoint.header import build_header, order_entries
from pome.checkpoint.source import Checkpoint
from pome.config.extraction import ExtractSpec
from pome.editing.lora_rewrite import name_alone
from pome.editing.unit import TORCH_DTYPES, to_bytes
from pome.output.durable import as_output_error, sync_file
from pome.output.extract_card import CAUSAL
from pome.planning.extract_plan import KEY, ExtractPlan, Lora, name_factors
from pome.planning.remainder import HEAD, Rest

# The release of PEFT from which on stacked experts are read in the orientation that is written here.
PEFT_VERSION = "0.19.0"
_PIECE = 8 << 20


@dataclass(frozen=True)
class Ranked:
    """A LoRA with the rank that it has in the file, and the ranks of its cells, which zeros fill up."""

    lora: Lora
    rank: int
    ranks: Mapping[str, int]  # by the cells' keys


@dataclass(frozen=True)
class Contents:
    """Contents of an extracted adapter: LoRAs, and whole tensors of FT (key in the file -> name in FT)."""

    ranked: tuple[Ranked, ...]
    saved: Mapping[str, str]
    modules: tuple[str, ...]  # modules_to_save
    has_biases: bool  # beside LoRAs, on their modules

    @property
    def loras(self) -> list[Lora]:
        return [one.lora for one in self.ranked]


def rank_loras(loras: Iterable[Lora], ranks: Mapping[str, int], spec: ExtractSpec) -> tuple[Ranked, ...]:
    """The LoRAs whose update is not zero, with their ranks. `ranks` are those of the cells by key, 0 where it is."""
    found = []
    for lora in loras:
        mine = {cell.unit.key: ranks[cell.unit.key] for cell in lora.cells}
        if any(mine.values()):
            found.append(Ranked(lora, max(mine.values()), mine))
    most = max((one.rank for one in found), default=0)
    return tuple(Ranked(one.lora, most if spec.uniform_rank else one.rank, one.ranks) for one in found)


def choose_contents(ranked: tuple[Ranked, ...], rests: Sequence[Rest], changed: set[str], tied: str | None) -> Contents:
    """An adapter with LoRAs, and all of the modules of which a tensor `changed`, as far as they may be saved.

    tied: the embedding of BASE that is its head as well. It is saved for both: PEFT takes the two apart.
    """
    adapted = {one.lora.module for one in ranked}
    modules = {rest.module for rest in rests if rest.may_save and rest.name in changed}
    saved = {}
    for rest in rests:
        if rest.may_save and rest.module in modules and (rest.module not in adapted or rest.name in changed):
            module, _, leaf = rest.parameter.rpartition(".")
            inner = ".base_layer" if module in adapted else ""
            saved[f"{KEY}{module}{inner}.{leaf}"] = rest.name
            if tied is not None and rest.partner == tied and not any(one.name == HEAD for one in rests):
                saved[KEY + HEAD] = rest.name
                modules.add(HEAD.rpartition(".")[0])
    return Contents(ranked, saved, tuple(sorted(modules - adapted)), bool(modules & adapted))


def make_adapter_config(contents: Contents, extraction: ExtractPlan, base: Checkpoint) -> bytes:
    """The adapter_config.json of an extracted adapter. Every scaling is 1, also for a reader of `lora_alpha / r` alone.

    `r` is the largest rank, which servers make room for; each LoRA of another rank has a pattern that matches it alone.
    """
    ranks = {one.lora.key: one.rank for one in contents.ranked}
    most = max(ranks.values(), default=1)
    alone = name_alone(list(ranks))
    pattern = {alone[key]: rank for key, rank in sorted(ranks.items()) if rank != most}
    parameters = extraction.names.list_parameters()
    modules = [name.rpartition(".")[0] for name in parameters]
    paths = {".".join(words[:at]) for words in (name.split(".") for name in modules) for at in range(1, len(words) + 1)}
    source, _, _ = base.source.partition("@") if base.on_hub else (base.source, "", "")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": "CAUSAL_LM" if find_model_class(base) == CAUSAL else None,
        "base_model_name_or_path": source,
        "revision": base.revision,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "lora_only" if contents.has_biases else "none",
        "fan_in_fan_out": any(lora.transposed for lora in contents.loras),
        "init_lora_weights": True,
        "target_modules": shorten([lora.key for lora in contents.loras if lora.is_module], paths, 1),
        "target_parameters": shorten([lora.key for lora in contents.loras if not lora.is_module], parameters, 2)
        or None,
        "modules_to_save": list(contents.modules) or None,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def find_model_class(base: Checkpoint) -> str | None:
    """The class of transformers that loads a base, by its config; None where that names none."""
    kinds = (base.config or {}).get("architectures")
    names = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return CAUSAL
    return next((name for name in names if name.isascii() and name.isidentifier()), None)


def shorten(targets: Sequence[str], names: Iterable[str], least: int) -> list[str]:
    """The shortest endings, of at least so many words, by which PEFT finds all `targets` and none else of `names`."""
    wanted = set(targets)
    others: Counter[str] = Counter()
    for name in set(names) - wanted:
        others.update(_list_endings(name))
    found: dict[str, None] = {}
    for target in targets:
        endings = _list_endings(target)[::-1]
        found[next((end for end in endings[least - 1 :] if not others[end]), target)] = None
    return sorted(found)


def _list_endings(name: str) -> list[str]:
    """The endings of a dotted name, longest first."""
    words = name.split(".")
    return [".".join(words[at:]) for at in range(len(words))]


def write_weights(contents: Contents, scratch: Path, ft: Checkpoint, target: Path) -> None:
    """Write adapter_model.safetensors from the factors in the scratch file, a tensor at a time. Raises OutputError."""
    makers: dict[str, tuple[str, tuple[int, ...], Callable[[], Iterable[bytes | bytearray]]]] = {}
    by_name = {one.lora.name: one for one in contents.ranked}
    with as_output_error(scratch), scratch.open("rb") as file:
        for lora, a, b in name_factors(contents.loras):
            one = by_name[lora.name]
            height, width = lora.shape
            all_ranks = one.rank * lora.experts
            makers[a] = lora.dtype, (all_ranks, width), partial(_make_factor, one, 1, file)
            makers[b] = lora.dtype, (height, all_ranks), partial(_make_factor, one, 0, file)
        for key, name in contents.saved.items():
            entry = ft.tensors[name][1]
            makers[key] = entry.dtype, entry.shape, partial(_read_pieces, ft, name)
        entries = order_entries((key, dtype, shape) for key, (dtype, shape, _) in makers.items())
        with as_output_error(target), target.open("wb") as out:
            out.write(build_header(entries, {"format": "pt"}))
            for key, _, _ in entries:
                for piece in makers[key][2]():
                    out.write(piece)
            out.flush()
            sync_file(out.fileno())


def _make_factor(one: Ranked, side: int, file: BinaryIO) -> Iterator[bytearray]:
    """B (side 0) or A (side 1) of a LoRA: all experts of it, each filled up with zeros to the rank."""
    yield to_bytes(load_lora(one, file.fileno())[side])


def load_lora(one: Ranked, fd: int) -> tuple[Tensor, Tensor]:
    """B (out, r E) and A (r E, in) of a LoRA from the scratch file."""
    lora, (height, width), dtype = one.lora, one.lora.shape, TORCH_DTYPES[one.lora.dtype]
    factors = {}
    for cell in lora.cells:
        k = one.ranks[cell.unit.key]
        if k:
            data = bytearray(os.pread(fd, k * (height + width) * dtype.itemsize, cell.offset))
            flat = torch.frombuffer(data, dtype=dtype)
            factors[cell.unit.expert or 0] = flat[: k * height].reshape(height, k), flat[k * height :].reshape(k, width)
    return stack_factors(factors, lora, one.rank)


def stack_factors(factors: Mapping[int, tuple[Tensor, Tensor]], lora: Lora, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r E), the experts interleaved, and A (r E, in), one after the other, from those of single experts."""
    height, width = lora.shape
    dtype = TORCH_DTYPES[lora.dtype]
    B, A = torch.zeros(height, rank, lora.experts, dtype=dtype), torch.zeros(lora.experts, rank, width, dtype=dtype)
    for expert, (b, a) in factors.items():
        B[:, : b.shape[1], expert], A[expert, : a.shape[0]] = b, a
    return B.flatten(1, 2), A.flatten(0, 1)


def _read_pieces(ft: Checkpoint, name: str) -> Iterator[bytearray]:
    _, entry = ft.tensors[name]
    for at in range(entry.start, entry.end, _PIECE):
        yield ft.read(name, at, min(_PIECE, entry.end - at))
