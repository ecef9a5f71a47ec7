"""Compare what `pome.roles.roles` says of a model's checkpoint with what its weights really do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from pome.roles.layout import Layout, Part
from pome.roles.roles import find_layouts
from support.tiny_models import tiny_config, tiny_model
from support.true_roles import (
    ATTENTION,
    FFN,
    ROUTES,
    SEVERAL,
    Truth,
    find_attention_truth,
    find_ffn_truth,
    mixes,
    parents,
    saved_tags,
    tag,
)


@dataclass
class Verdict:
    """Of one architecture: how many matrices are right, unknown, wrong or unproved, and which."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)

    def add(self, kind: str, verdict: str, what: str) -> None:
        self.counts[kind, verdict] += 1
        if verdict != "right":
            getattr(self, verdict).append(what)


def judge(model: Any, inputs: dict[str, Any]) -> Verdict:
    """The verdict over the checkpoint of a model as it is saved and as its modules are named."""
    truths = find_attention_truth(model, inputs)
    truths |= find_ffn_truth(model, inputs)
    config = json.loads(model.config.to_json_string(use_diff=True))
    tagged, names = tag(model)
    verdict = Verdict()
    told = Teller(model, truths, names)
    saved = saved_tags(model, tagged)
    for spelled in (saved, {name: tags for name, tags in tagged.items() if name not in saved}):
        layouts = find_layouts({name: tuple(tags.shape) for name, tags in spelled.items()}, config)
        for name, tags in spelled.items():
            if tags.ndim in (2, 3):
                layout = layouts[name]
                for part in layout.parts:
                    kind, outcome, why = told.judge_part(tags, layout, part)
                    if outcome:
                        verdict.add(kind, outcome, f"{name} {tuple(tags.shape)}: {part.role} {why}")
    return verdict


def take_part(tags: Tensor, layout: Layout, part: Part) -> Tensor:
    """The matrix of a part (or of each expert), (..., fan_out, fan_in), by the rule that the layout's module states."""
    if part.block is not None:
        axis = tags.ndim - 2 + part.block.axis
        tags = tags.unflatten(axis, (part.block.count, part.block.period))
        tags = tags.narrow(axis + 1, part.block.start, part.block.size).flatten(axis, axis + 1)
    return tags.transpose(-1, -2) if layout.transposed else tags


class Teller:
    """Tells for tagged entries of a checkpoint which parameters they are of, and what these do."""

    def __init__(self, model: Any, truths: dict[str, Truth], names: dict[int, str]) -> None:
        self.truths, self.names = truths, names
        self.modules = dict(model.named_modules())
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.head = head.weight if head is not None and hasattr(head, "weight") else None

    def judge_part(self, tags: Tensor, layout: Layout, part: Part) -> tuple[str, str, str]:
        """Kind of role, verdict and reason; an empty verdict when there is nothing to say."""
        matrices = take_part(tags, layout, part)
        matrices = matrices if matrices.ndim == 3 and layout.stacked else matrices[None]
        alone = sum(other.role == part.role for other in layout.parts) == 1
        outcomes = {self.judge_matrix(matrix, part.role, alone) for matrix in matrices}
        order = ("wrong", "unknown", "unproved", "right", "")
        return min(outcomes, key=lambda outcome: order.index(outcome[1]))

    def judge_matrix(self, matrix: Tensor, role: str, alone: bool) -> tuple[str, str, str]:
        parameters = sorted({self.names[int(i)] for i in (matrix // SEVERAL).unique()})
        told = [self.truths.get(name) for name in parameters]
        found = {r for truth in told if truth for r in self.roles_in(matrix, parameters, truth)} - {"dead"}
        if role in FFN:
            if found == {role} and len(parameters) == 1 and told[0]:
                return "ffn", *self.judge_order(matrix, parameters[0], told[0], role, alone)
            if found or any(self.is_elsewhere(name) for name in parameters):
                return "ffn", "wrong", f"is {sorted(found)}"
            return "ffn", "unproved", ""
        if found & set(FFN):
            in_layer = any(token.isdigit() for name in parameters for token in name.split("."))
            outcome = "wrong" if role != "other" else "unknown" if in_layer else ""
            return "ffn", outcome, f"is {sorted(found)}"
        if role in ATTENTION:
            if found - {"after"}:
                right = found == {role} and self.judge_order(matrix, parameters[0], told[0], role, alone)[0] == "right"
                return "attention", "right" if right else "wrong", f"is {sorted(found)}"
            if not all(mixes(self.modules, self.owner(name)) or self.beside_attention(name) for name in parameters):
                return "attention", "wrong", "is in no attention module"
            return "attention", "right" if found == {"after"} and role == "o" else "unproved", ""
        if role == "other":
            return ("attention", "unknown", f"is {sorted(found)}") if found & set(ATTENTION) else ("", "", "")
        return role, *self.judge_by_module(parameters, role)

    def roles_in(self, matrix: Tensor, parameters: list[str], truth: Truth) -> Iterator[str]:
        name = next(name for name in parameters if self.truths.get(name) is truth)
        index = list(self.names.values()).index(name)
        of_it = matrix[(matrix // SEVERAL) == index] % SEVERAL
        where = np.unravel_index(of_it.numpy(), self.shapes[name])
        for row in np.unique(where[len(self.shapes[name]) + truth.out]):
            yield truth.roles[row]

    def judge_order(self, matrix: Tensor, name: str, truth: Truth, role: str, alone: bool) -> tuple[str, str]:
        """Right when rows of the matrix are rows of the map, columns its inputs, and none is missing."""
        shape = self.shapes[name]
        where = np.unravel_index((matrix % SEVERAL).numpy(), shape)
        out, inn = where[len(shape) + truth.out], where[len(shape) + truth.inn]
        upright = (out == out[:, :1]).all() and (inn == inn[:1]).all() and len(np.unique(out[:, 0])) == len(out)
        whole = matrix.shape[0] == sum(r in (role, "dead") for r in truth.roles) or "dead" in truth.roles
        if role in FFN and alone and not (whole and matrix.shape[1] == shape[truth.inn]):
            return "wrong", "is not the whole matrix"
        return ("right", "") if upright else ("wrong", "is another way round")

    def owner(self, name: str) -> str:
        return name.rpartition(".")[0]

    def beside_attention(self, name: str) -> bool:
        """An output projection may stand in a module next to the attention itself, as BERT's does."""
        around = self.owner(name).rpartition(".")[0].rpartition(".")[0]
        return any(mixes(self.modules, f"{around}.{n}") for n, _ in self.modules[around].named_children())

    def is_elsewhere(self, name: str) -> bool:
        """Whether a parameter surely is no feed-forward matrix."""
        module = self.modules[self.owner(name)]
        return isinstance(module, nn.Embedding) or mixes(self.modules, self.owner(name))

    def judge_by_module(self, parameters: list[str], role: str) -> tuple[str, str]:
        right = True
        for name in parameters:
            module = self.modules[self.owner(name)]
            kinds = [type(module).__name__] + [type(self.modules[n]).__name__ for n in parents(self.owner(name))]
            if role == "embed":
                right &= isinstance(module, nn.Embedding) or "Embedding" in kinds[0]
            elif role == "head":
                own = self.head is not None and dict(module.named_parameters()).get("weight") is self.head
                right &= own or not any(part.isdigit() for part in name.split("."))
            else:
                few = self.shapes[name][0] < 16 or self.shapes[name][-1] < 16
                right &= any(ROUTES.search(kind) for kind in kinds) or few
        return ("right", "") if right else ("wrong", "by its module")


def inputs_of(model: Any) -> dict[str, Any]:
    """Eight tokens for a text model; what takes images or sound is not run as a whole."""
    if model.main_input_name != "input_ids":
        return {}
    tokens = torch.arange(3, 11)[None]
    both = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if both else {})}


# Kind -> the mapping of transformers, and which of its architectures are covered: all, or the main ones.
KINDS = {
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", ""),
    "encoder": (
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "albert bert deberta deberta-v2 distilbert electra funnel modernbert mpnet roberta xlm-roberta",
    ),
    "encoder-decoder": (
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "bart fsmt led m2m_100 marian mbart mt5 pegasus switch_transformers t5 umt5",
    ),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "clip deit dinov2 siglip swin vit"),
    "speech": ("MODEL_FOR_CTC_MAPPING_NAMES", "hubert wav2vec2 wav2vec2-conformer wavlm"),
}


@dataclass(frozen=True)
class Row:
    """One architecture of the table; no verdict where its model cannot be built small."""

    kind: str
    model_type: str
    verdict: Verdict | None
    reason: str = ""

    @property
    def complete(self) -> bool:
        """Whether every feed-forward matrix is right and there is at least one."""
        counts = self.verdict.counts if self.verdict else Counter()
        missed = sum(counts["ffn", outcome] for outcome in ("unknown", "unproved", "wrong"))
        return counts["ffn", "right"] > 0 and missed == 0

    @property
    def has_ffn(self) -> bool:
        """Whether anything in it is, or is called, a feed-forward matrix."""
        return self.verdict is not None and any(kind == "ffn" for kind, _ in self.verdict.counts)


def survey(kind: str) -> Iterator[Row]:
    """The architectures of one kind, in the order of transformers."""
    mapping, main = KINDS[kind]
    for model_type, class_name in getattr(modeling_auto, mapping).items():
        if main and model_type not in main.split():
            continue
        class_name = class_name if isinstance(class_name, str) else class_name[0]
        try:
            model = tiny_model(class_name, tiny_config(model_type)).double()
        except Exception as error:  # a config or a model of any make may refuse to be small, each in its own way
            yield Row(kind, model_type, None, type(error).__name__)
            continue
        yield Row(kind, model_type, judge(model, inputs_of(model)))


def format_table(rows: list[Row]) -> str:
    """The survey as Markdown: a summary by kind, then one line for each architecture."""
    lines = [
        "# Roles by rule against what the weights do",
        "",
        f"transformers {transformers.__version__}; `python scripts/survey_roles.py --out tests/roles/roles_survey.md`.",
        "Counted are matrices of tiny models, in the spelling of `save_pretrained` and in that of the modules.",
        "",
        "| kind | architectures | built | with an FFN | FFN all right | FFN right | unknown | unproved | wrong |"
        " attention right | unknown | unproved | wrong |",
        "|---|" + "---:|" * 12,
    ]
    for kind in dict.fromkeys(row.kind for row in rows):
        of_it = [row for row in rows if row.kind == kind]
        total = sum((row.verdict.counts for row in of_it if row.verdict), Counter())
        built, with_ffn, complete = (sum(map(f, of_it)) for f in (is_built, has_ffn, is_complete))
        lines.append(f"| {kind} | {len(of_it)} | {built} | {with_ffn} | {complete} | {format_counts(total)} |")
    lines += [
        "",
        "| kind | architecture | FFN right | unknown | unproved | wrong |"
        " attention right | unknown | unproved | wrong |",
        "|---|---|" + "---:|" * 8,
    ]
    for row in rows:
        counts = format_counts(row.verdict.counts) if row.verdict else f"not built: {row.reason}" + " |" * 7
        lines.append(f"| {row.kind} | {row.model_type} | {counts} |")
    return "\n".join(lines) + "\n"


def is_built(row: Row) -> bool:
    return row.verdict is not None


def has_ffn(row: Row) -> bool:
    return row.has_ffn


def is_complete(row: Row) -> bool:
    return row.complete


def format_counts(counts: Counter) -> str:
    outcomes = ("right", "unknown", "unproved", "wrong")
    return " | ".join(str(counts[kind, outcome]) for kind in ("ffn", "attention") for outcome in outcomes)
