"""Statistics of the study: paired intervals, corrections for the number of edits, a rule without data, a predictor.

The effect of an edit is its change in held-out loss, and that change as a share of what fine-tuning gained:
(L_edit - L_ft) / (L_base - L_ft). 0 leaves the model as good as it was, +1 loses all of the fine-tuning, below 0 is
better. So tasks with other losses can be told together.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pome.sweeping.bootstrap import compare
from pome.sweeping.scorers.base import Scored

Line = dict[str, Any]
DRAWS, SEED = 4000, 20261128
LEAST_GAIN = 0.02  # of the base's loss: a cell whose fine-tuning gained less says nothing about shares of it
# The half of the cells by which a rule is chosen, by task; the other half judges it.
CHOOSING = frozenset({"sums", "records", "reactions"})


@dataclass(frozen=True)
class Setting:
    """A base, a task and a way of fine-tuning; its seeds are repetitions."""

    base: str
    task: str
    tuning: str

    @property
    def chooses(self) -> bool:
        return self.task in CHOOSING and self.base != "smollm2-135m"

    def __str__(self) -> str:
        return f"{self.base}, {self.task}, {self.tuning}"


@dataclass(frozen=True)
class CellResult:
    """What was measured in one cell, by edit."""

    setting: Setting
    seed: int
    lines: Mapping[str, Line]

    @property
    def tuned(self) -> Line:
        return self.lines["fine-tuned"]

    @property
    def gain(self) -> float:
        """Held-out loss that fine-tuning took away, in nats."""
        return float(self.lines["base"]["score"] - self.tuned["score"])

    @property
    def has_gained(self) -> bool:
        """Whether fine-tuning gained enough for shares of it."""
        return self.gain >= LEAST_GAIN * float(self.lines["base"]["score"])

    @property
    def overfit(self) -> float:
        """Held-out less training loss of the fine-tuned model, as a share of the gain."""
        return float(self.tuned["score"] - self.tuned["train_loss"]) / self.gain

    def change(self, edit: str) -> float:
        """Change of the loss, in nats."""
        return float(self.lines[edit]["score"] - self.tuned["score"])

    def share(self, edit: str) -> float:
        """Change of the loss as a share of the gain."""
        return self.change(edit) / self.gain

    def feature(self, name: str, roles: Iterable[str] = ("up", "gate", "down")) -> float:
        """Median of a spectral feature over the matrices of some roles."""
        wanted = set(roles)
        return statistics.median(row[name] for row in self.tuned["matrices"] if row["role"] in wanted)


def read_results(folder: Path, large: bool = False) -> list[CellResult]:
    """All cells whose twelve edits are finished, or those with few edits on many examples. Raises ValueError for a line
    that lacks what every line has."""
    cells: dict[tuple[Setting, int], dict[str, Line]] = defaultdict(dict)
    for file in sorted(file for file in folder.glob("*.jsonl") if file.name.endswith(".large.jsonl") is large):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            missing = {"base", "task", "tuning", "seed", "edit", "score"} - line.keys()
            if missing:
                raise ValueError(f"{file.name}: a line lacks {', '.join(sorted(missing))}")
            cells[Setting(line["base"], line["task"], line["tuning"]), line["seed"]][line["edit"]] = line
    found = [CellResult(setting, seed, lines) for (setting, seed), lines in cells.items()]
    return [cell for cell in found if "fine-tuned" in cell.lines]


@dataclass(frozen=True)
class Verdict:
    """An edit in one cell: change of the loss with its 95 % interval, and the interval that holds for all edits of the
    cell at once (max-T bootstrap)."""

    change: float
    interval: tuple[float, float]
    joint: tuple[float, float]

    @property
    def word(self) -> str:
        """`better` or `worse` beyond noise, else `even`."""
        return "better" if self.joint[1] < 0 else "worse" if self.joint[0] > 0 else "even"


def judge(cell: CellResult, edits: Sequence[str], key: str = "loss") -> dict[str, Verdict]:
    """Paired bootstrap of the edits of a cell against its fine-tuned model, by groups of examples."""
    names = [name for name in edits if name in cell.lines]
    told = compare([to_scored(cell.lines[name][key]) for name in names], to_scored(cell.tuned[key]))
    found = {}
    for name, each in zip(names, told, strict=True):
        assert each.interval is not None and each.best_interval is not None
        found[name] = Verdict(each.delta, each.interval, each.best_interval)
    return found


def to_scored(values: Sequence[float]) -> Scored:
    return Scored(statistics.fmean(values), tuple(values))


@dataclass(frozen=True)
class Pooled:
    """An edit over many cells: mean effect with its 95 % interval, two-sided p, in how many cells the loss fell."""

    mean: float
    interval: tuple[float, float]
    p: float
    fell: int
    cells: int


def pool(cells: Sequence[CellResult], edit: str, key: str = "loss", relative: bool = True) -> Pooled | None:
    """Hierarchical bootstrap: settings are resampled, within them seeds, within them groups of examples. Each setting
    counts the same. `relative` gives shares of the gain."""
    by_setting: dict[Setting, list[Tensor]] = defaultdict(list)
    for cell in cells:
        if edit in cell.lines:
            pairs = torch.tensor(cell.lines[edit][key]) - torch.tensor(cell.tuned[key])
            by_setting[cell.setting].append(pairs.double() / (cell.gain if relative else 1.0))
    if not by_setting:
        return None
    generator = torch.Generator().manual_seed(SEED)
    draws = torch.stack([draw_mean(seeds, generator) for seeds in by_setting.values()])  # settings x DRAWS
    drawn = torch.randint(len(draws), draws.shape, generator=generator)
    means = draws.gather(0, drawn).mean(0)
    cell_means = [float(pairs.mean()) for seeds in by_setting.values() for pairs in seeds]
    mean = statistics.fmean(statistics.fmean(float(p.mean()) for p in seeds) for seeds in by_setting.values())
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    tail = min(float((means <= 0).double().mean()), float((means >= 0).double().mean()))
    p = min(1.0, 2.0 * max(tail, 1.0 / DRAWS))
    return Pooled(mean, (low, high), p, sum(value < 0 for value in cell_means), len(cell_means))


def draw_mean(seeds: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """DRAWS means of one setting: seeds with replacement, then groups of examples of each."""
    total = torch.zeros(DRAWS, dtype=torch.float64)
    chosen = torch.randint(len(seeds), (DRAWS, len(seeds)), generator=generator)
    for at in range(len(seeds)):
        drawn = torch.zeros(DRAWS, dtype=torch.float64)
        for i, pairs in enumerate(seeds):
            rows = torch.randint(len(pairs), (DRAWS, len(pairs)), generator=generator)
            drawn = torch.where(chosen[:, at] == i, pairs[rows].mean(1), drawn)
        total += drawn
    return total / len(seeds)


def correct_holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction: p values that hold for all edits at once."""
    found, most = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        most = max(most, min(1.0, (len(p) - rank) * p[name]))
        found[name] = most
    return found


def correlate_ranks(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties by their mean rank; nan where one side is constant."""
    a, b = (torch.tensor(rank(values), dtype=torch.float64) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else math.nan


def rank(values: Sequence[float]) -> list[float]:
    """Ranks from 1, the mean of their places for equal values."""
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered, 1)))}
    return [first[value] + (ordered.count(value) - 1) / 2.0 for value in values]


PREDICTORS = ("departure", "delta_over_weight", "stable_rank", "entropy_rank", "energy_half", "above_noise")


@dataclass(frozen=True)
class Rule:
    """Do the edit where the median of a spectral feature over the FFN's matrices is in an interval, else nothing."""

    edit: str
    feature: str = "departure"
    low: float = -math.inf
    high: float = math.inf

    @property
    def words(self) -> str:
        """What the rule says."""
        if self.low > self.high:
            return "leave every model alone"
        told = f"`{self.edit}`"
        if math.isinf(self.low) and math.isinf(self.high):
            return f"{told}, always"
        bound = f"at most {self.high:.3g}" if math.isinf(self.low) else f"at least {self.low:.3g}"
        return f"{told}, where the median {self.feature.replace('_', ' ')} is {bound}"

    def effect(self, cell: CellResult) -> float:
        """Share of the gain that it changes; 0 where it leaves the model alone."""
        return cell.share(self.edit) if self.low <= cell.feature(self.feature) <= self.high else 0.0


def choose_rule(cells: Sequence[CellResult], edits: Sequence[str]) -> Rule:
    """The rule with the best mean on the choosing half, each cell counting the same: an edit, and a feature at most or
    at least at a quartile of that half."""
    half = [cell for cell in cells if cell.setting.chooses]
    never = Rule(edits[0], low=math.inf, high=-math.inf)
    rules = [never, *map(Rule, edits)]
    for feature in PREDICTORS:
        values = torch.tensor([cell.feature(feature) for cell in half], dtype=torch.float64)
        for limit in torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).unique().tolist():
            rules += [Rule(edit, feature, high=limit) for edit in edits]
            rules += [Rule(edit, feature, low=limit) for edit in edits]
    return min(rules, key=lambda rule: statistics.fmean(rule.effect(cell) for cell in half))


SINGLE = frozenset({"up", "gate", "down", "q", "k", "v", "o", "embed"})


def list_role_effects(cells: Sequence[CellResult]) -> list[dict[str, Any]]:
    """One row for each cell and role that was edited alone: the features' medians and the share of the gain."""
    rows = []
    for cell in cells:
        roles = {row["role"] for row in cell.tuned["matrices"]}
        for role in sorted(roles & SINGLE):
            edit = f"{role}: pome K=0.5 beta=1"
            if edit in cell.lines:
                features = {name: cell.feature(name, [role]) for name in PREDICTORS}
                features["departure x delta/weight"] = features["departure"] * features["delta_over_weight"]
                rows.append({"cell": cell, "role": role, "effect": cell.share(edit), **features})
    return rows


def compare_choice(cell: CellResult) -> dict[str, Any] | None:
    """The edit with the least training loss beside the one with the least held-out loss (POME, appendix A.3)."""
    names = [n for n, line in cell.lines.items() if "pome" in n and "+" not in n and "train_loss" in line]
    if len(names) < 2:
        return None
    by_train = min(names, key=lambda name: cell.lines[name]["train_loss"])
    best = min(names, key=lambda name: cell.change(name))
    return {"cell": cell, "by_train": by_train, "best": best, "edits": len(names),
            "change_by_train": cell.change(by_train), "change_best": cell.change(best)}  # fmt: skip
