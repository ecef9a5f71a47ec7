"""Tensors of FT that no LoRA holds: to be compared with BASE's, and whether an adapter may hold them. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pome.checkpoint.source import Checkpoint
from pome.choices import GROUPS
from pome.planning.extract_plan import ExtractPlan
from pome.planning.selection import EDITABLE, find_tensor_layouts
from pome.roles.layout import Layout, Part
from pome.roles.model_config import config_of, size_of
from pome.roles.pairing import pair_names

SAVE = "--save-modules takes them along"
HEAD = "lm_head.weight"  # of the models of transformers that continue a text
_HEADLESS = re.compile(r"(?<!LMHead)Model$|Classification$|QuestionAnswering$")


@dataclass(frozen=True)
class Rest:
    """A tensor of FT that no LoRA holds, or not all of it.

    partner: its name in BASE. parameter: its name in the model. taken: of a stack the parts of each slice that a LoRA
    holds, of a matrix those of slice None. may_save: whether an adapter may hold it whole; `reason` says how, or why
    not.
    """

    name: str
    partner: str | None
    parameter: str
    role: str
    layout: Layout
    taken: Mapping[int | None, frozenset[Part]]
    may_save: bool
    reason: str

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]


def list_rest(extraction: ExtractPlan, base: Checkpoint, ft: Checkpoint) -> Iterator[Rest]:
    """The tensors of FT that the LoRAs of an extraction do not wholly hold."""
    taken: dict[str, dict[int | None, set[Part]]] = {}
    pieces = [piece for cell in extraction.cells for piece in cell.pieces]
    for piece in pieces:
        taken.setdefault(piece.unit.name, {}).setdefault(piece.unit.expert, set()).add(piece.part)
    shapes = [{name: entry.shape for name, (_, entry) in side.tensors.items()} for side in (base, ft)]
    partners = pair_names(*shapes)
    modules = _Modules(extraction, base, ft)
    for name, layout in find_tensor_layouts(ft).items():
        _, entry = ft.tensors[name]
        mine = {at: frozenset(parts) for at, parts in taken.get(name, {}).items()}
        slices = range(entry.shape[0]) if layout.stacked else (None,)
        if all(mine.get(at) == frozenset(layout.parts) for at in slices):
            continue
        role = "+".join(dict.fromkeys(part.role for part in layout.parts))
        partner = partners.get(name)
        parameter = extraction.names.find(partner or name).name
        obstacle = modules.find_obstacle(name, partner, parameter, role)
        yield Rest(name, partner, parameter, role, layout, mine, obstacle is None, obstacle or SAVE)


class _Modules:
    """The modules that may go along whole: those that hold nothing else and that no LoRA is of."""

    def __init__(self, extraction: ExtractPlan, base: Checkpoint, ft: Checkpoint) -> None:
        self.ft = ft
        self.adapted = {lora.module for lora in extraction.loras}
        self.parameters = set(extraction.names.list_parameters())
        self.modules = {name.rpartition(".")[0] for name in self.parameters}
        paths = [name.split(".") for name in self.modules]
        self.containers = {".".join(words[:at]) for words in paths for at in range(len(words))}
        self.shared, self.has_known_head = find_shared_tables(base)

    def find_obstacle(self, name: str, partner: str | None, parameter: str, role: str) -> str | None:
        """Reason why an adapter cannot hold a tensor whole, or None."""
        module, _, leaf = parameter.rpartition(".")
        if set(role.split("+")) & {*GROUPS["ffn"], *GROUPS["attention"]}:
            return "it is not selected; --layers takes it into a LoRA"
        if self.ft.tensors[name][1].dtype not in EDITABLE:
            return "it holds no weights of a module"
        if partner is None and (name != HEAD or HEAD in self.parameters):
            return "BASE has no such tensor"
        if partner in self.shared and not self.has_known_head:
            return "the model shares it with other modules, and PEFT would take it apart from them"
        if leaf == "bias" and module in self.adapted:
            return None
        if module in self.adapted | self.containers:
            return "a parameter of a module that holds others, which no adapter holds alone"
        if leaf == "bias" and f"{module}.weight" not in self.parameters and partner is not None:
            return "a bias beside a weight that the model shares with another module"
        if not module or any(other != module and other.endswith(module) for other in self.modules):
            return "PEFT would take another module of a like name for its own"
        return None


def find_shared_tables(base: Checkpoint) -> tuple[frozenset[str], bool]:
    """The embeddings of BASE that other modules of the model may share; and whether there is one, shared by the head
    alone."""
    config = base.config or {}
    kinds = config.get("architectures")
    kinds = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
    headless = bool(kinds) and all(_HEADLESS.search(kind) for kind in kinds)
    roles = {name: {part.role for part in layout.parts} for name, layout in find_tensor_layouts(base).items()}
    has_head = {"head"} in roles.values()
    many = bool(config.get("is_encoder_decoder"))
    if not many and (headless or has_head or config.get("tie_word_embeddings") is False):
        return frozenset(), False
    tables = frozenset(
        name
        for name, found in roles.items()
        if found == {"embed"} and base.tensors[name][1].shape[0] == size_of(config_of(name, config), "vocab_size")
    )
    known = not many and any(
        kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for kind in kinds
    )
    return tables, known and len(tables) == 1
