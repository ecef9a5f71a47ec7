"""Lists of choices: rank rules, scales, dtypes, engines, formats, roles, searches, commands. No torch.

Each stands here once, with what it means and how tables and pages name it. Everything else reads these lists: the
command line, YAML, the kernel, the reports and the documentation. A type (`ScaleName`) names the same choices for
type checkers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar


@dataclass(frozen=True)
class Choice:
    """One value that an option may take, and what it means in a few words."""

    name: str
    means: str


@dataclass(frozen=True)
class RankRuleChoice(Choice):
    """A rule that chooses k, the number of directions to keep.

    number: the option that gives the rule its number, or None. A name with a number of its own in `label` is formatted
    with it, as `K=0.5`. heading: the name in a table's narrow column.
    """

    number: str | None = None
    label: str = ""
    heading: str = ""

    def describe(self, number: float | None = None) -> str:
        """The rule in a word, with its number."""
        return self.label.format(number) if self.label else self.name


ChoiceRow = TypeVar("ChoiceRow", bound=Choice)


def _by_name(rows: Iterable[ChoiceRow]) -> dict[str, ChoiceRow]:
    return {row.name: row for row in rows}


RankRuleName = Literal["ratio", "fixed", "energy", "noise-floor", "gavish-donoho", "effective"]
RANK_RULES = _by_name(
    [
        RankRuleChoice("ratio", "a share of the rank", "rank_ratio", "K={:g}"),
        RankRuleChoice("fixed", "a number of directions", "rank", "k={}"),
        RankRuleChoice("energy", "a share of the squared norm", "energy", "energy={:g}"),
        RankRuleChoice("noise-floor", "directions above what storage rounding explains"),
        RankRuleChoice("gavish-donoho", "optimal hard threshold", heading="g.-donoho"),
        RankRuleChoice("effective", "entropy rank"),
    ]
)

MethodName = Literal["equalize", "equivalence"]


@dataclass(frozen=True)
class MethodChoice(Choice):
    """A method, and the options that have no effect with it."""

    without: tuple[str, ...] = ()


METHODS = _by_name(
    [
        MethodChoice("equalize", "W_base + alpha U_k S_k^power V_k^T of the delta (POME)"),
        MethodChoice(
            "equivalence",
            "the nearest matrix to W_ft with W_base's singular values (POET)",
            ("rank", "rank_ratio", "energy", "rank_rule", "scale", "power"),
        ),
    ]
)

ScaleName = Literal["frobenius", "unit", "rms", "mean", "spectral"]
SCALES = _by_name(
    [
        Choice("frobenius", "norm_F(D)/sqrt(k)"),
        Choice("unit", "1"),
        Choice("rms", "sqrt(fan_out/fan_in)"),
        Choice("mean", "mean of the kept singular values"),
        Choice("spectral", "the largest of them"),
    ]
)

PresetName = Literal["paper"]


@dataclass(frozen=True)
class PresetChoice(Choice):
    """A preset, and the options that it stands for."""

    options: Mapping[str, Any] = field(default_factory=dict)


PRESETS = _by_name(
    [
        PresetChoice(
            "paper",
            "`up` alone, half of the directions, beta 1.5: above the fine-tuned model in both models where the "
            "paper tried it (its Table 13)",
            {"layers": ("up",), "rank_ratio": 0.5, "scale": "frobenius", "beta": 1.5, "power": 0.0},
        ),
    ]
)

DtypeName = Literal["keep", "float32", "bfloat16", "float16"]
DTYPES = _by_name(
    [
        Choice("keep", "the dtype of the fine-tuned tensor"),
        Choice("float32", "4 bytes"),
        Choice("bfloat16", "2 bytes, the range of float32"),
        Choice("float16", "2 bytes, at most 65504"),
    ]
)

EngineName = Literal["local", "ray"]
ENGINES = _by_name([Choice("local", "this machine"), Choice("ray", "a Ray cluster, or Ray on this machine")])

OutFormatName = Literal["full", "adapter"]
OUT_FORMATS = _by_name([Choice("full", "a full checkpoint"), Choice("adapter", "an adapter again")])

SearchName = Literal["grid", "coordinate"]
SEARCHES = _by_name(
    [
        Choice("grid", "every combination"),
        Choice(
            "coordinate",
            "one axis after the other (method, beta, k, roles, scale), each at the best so far",
        ),
    ]
)

MOST_POWER = 8.0  # of the singular values: a larger one leaves nothing but the first direction

ROLES = ("gate", "up", "down", "q", "k", "v", "o", "embed", "head", "router", "other")
GROUPS = {"ffn": ("gate", "up", "down"), "attention": ("q", "k", "v", "o")}

# In the order of the help. Each is a module of `pome.cli.commands`.
COMMANDS = ("edit", "inspect", "extract", "sweep", "estimate", "verify", "batch")
