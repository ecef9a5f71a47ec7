"""Cells of the study, in the order in which they are run, and the run of one of them.

A cell is a base, a task, a tuning and a seed. Its first part scores the fixed edits, its second the rest of the grid.
A finished part is a file of the results, one JSON line an edit; of an unfinished one the lines so far are kept in the
cache, so that nothing is done twice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from study.data import folder
from study.edits import FIXED, Edit, Pair, list_wide, pome
from study.experts import find_routes, share_moved, split_experts
from study.reactions import load_reactions
from study.scoring import COMPRESSIONS, Scores, compress, is_finite, score_rows, set_weights
from study.tuning import (
    TUNINGS,
    Base,
    State,
    find_start,
    fine_tune,
    list_facts,
    load_base,
    load_data,
    load_other_text,
    make_hash,
)

RESULTS = Path(__file__).resolve().parent / "results"
REACTION_COUNT, LARGE_COUNT = 1200, 10000
TRAIN_COUNT = 80  # training examples that edits are scored on
COMPRESSED = [pome("up"), pome("ffn"), Edit("step", "ffn", bound=0.1)]
LARGE = [pome("up"), pome("attention"), pome("ffn"), pome("all"), Edit("truncate", "ffn", 0.25)]
COMPRESSED_TUNINGS = ("adamw", "bf16", "published")
VARIANTS = {"reactions": "bert_ft_10k_25s", "reactions-probe": "bert_ft"}
TASKS = ("sums", "records", "sentiment", "definitions")
SMOL_TASKS = ("sums", "sentiment", "definitions")
MAIN = ("adamw", "bf16", "adamw-short", "lora", "muon", "poet", "adamw-long", "adamw-full")
RATES = ("adamw-low", "adamw-high", "bf16-low", "bf16-high")
SEEDS = (0, 1, 2)
VERSION = 2  # of what a cell measures


@dataclass(frozen=True)
class Cell:
    """part: `fixed`, `wide`, `large` (few edits on many reactions) or `quick`."""

    base: str
    task: str
    tuning: str
    seed: int
    part: str = "fixed"

    @property
    def title(self) -> str:
        return ".".join((self.base, self.task, self.tuning, str(self.seed), self.part))

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.title}.jsonl"

    def list_edits(self, roles: set[str]) -> list[Edit]:
        if self.part == "quick":
            return [FIXED[0], FIXED[-1]]
        if self.part == "large":
            return LARGE
        return FIXED if self.part == "fixed" else [edit for edit in list_wide(roles) if edit not in FIXED]


def list_cells() -> list[Cell]:
    """All cells, the cheapest and most telling first."""

    def cross(base: str, tasks: Iterable[str], tunings: Iterable[str], *seeds: int) -> list[Cell]:
        return [Cell(base, task, how, seed) for seed in seeds for how in tunings for task in tasks]

    small = functools.partial(cross, "llama-4m", TASKS)
    llama = functools.partial(cross, "llama-12m", TASKS)
    smol = functools.partial(cross, "smollm2-135m", SMOL_TASKS, ("bf16", "adamw"))
    reactions = [Cell("rxnfp", task, "published", 0) for task in VARIANTS]
    extra = cross("llama-12m", ("sums",), ("reward", "neftune", "ema", "soap"), *SEEDS)
    mixture = cross("moe-8m", ("sums", "sentiment"), ("adamw",), *SEEDS)
    cells = small(MAIN, 0) + reactions + smol(0) + llama(MAIN[:2], 0) + smol(1) + small(MAIN[:5], 1, 2) + smol(2)
    cells += mixture[:1] + [wide(cell) for cell in small(MAIN[:2], 0)] + extra[:4] + mixture[:2]
    cells += [wide(cell) for cell in llama(MAIN[:2], 0)[::2] + small(MAIN[2:5], 0)] + small(MAIN[5:], 1, 2)
    cells += small(RATES, *SEEDS) + [wide(cell) for cell in small(RATES, 0)]
    cells += [wide(cell) for cell in smol(0) + reactions]
    cells += [dataclasses.replace(cell, part="large") for cell in reactions] + extra + mixture + llama(MAIN[2:5], 0)
    cells += [wide(cell) for cell in small(MAIN[5:], 0)] + llama(MAIN[:2], 1, 2)
    return list(dict.fromkeys(cells))


def wide(cell: Cell) -> Cell:
    return dataclasses.replace(cell, part="wide")


@dataclass(frozen=True)
class Bench:
    """A model whose weights may be set and that is then scored: on held-out or training examples, on other text.

    route tells which experts the held-out examples' tokens go to, if there are any.
    """

    model: Any
    pair: Pair
    score: Callable[[str], Scores]
    route: Callable[[], Tensor | None] = lambda: None


def open_cell(cell: Cell) -> Bench:
    """The pair of a cell, fine-tuned if it is not cached."""
    if cell.base == "rxnfp":
        found = load_reactions(VARIANTS[cell.task], LARGE_COUNT if cell.part == "large" else REACTION_COUNT)
        return Bench(found.model, Pair(found.base, found.tuned), found.score)
    base = keep_base(cell.base)
    which = cell.base, base, cell.task, cell.tuning, cell.seed
    state, tuned = split_experts(find_start(*which)), split_experts(fine_tune(*which))
    train, test = load_data(cell.base, base, cell.task)
    rows = {"test": test, "train": train[:TRAIN_COUNT], "other": load_other_text(base)}
    stored = getattr(torch, TUNINGS[cell.tuning].dtype)
    return Bench(
        base.model,
        Pair(state, tuned, stored),
        lambda split: score_rows(base.model, rows[split]),
        lambda: find_routes(base.model, test),
    )


@functools.lru_cache(maxsize=1)
def keep_base(name: str) -> Base:
    return load_base(name)


def find_part(cell: Cell) -> Path:
    """Where the lines of an unfinished cell are."""
    edits = [edit.name for edit in cell.list_edits({"gate", "up", "down"})]
    facts = () if cell.base == "rxnfp" else list_facts(cell.base, cell.task, cell.tuning, cell.seed)
    return folder() / f"part-{make_hash(VERSION, cell.title, edits, *facts)}"


def run_cell(cell: Cell, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Lines of a cell's part; those that an interrupted run left are taken from the cache."""
    part = find_part(cell)
    done = {row["edit"]: row for row in map(json.loads, part.read_text().splitlines())} if part.exists() else {}
    bench = open_cell(cell)
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    rows = []
    try:
        for name, measure in list_measures(cell, bench):
            if name not in done:
                row = {"base": cell.base, "task": cell.task, "tuning": cell.tuning, "seed": cell.seed, "edit": name}
                done[name] = row | measure()
                with part.open("a") as file:
                    file.write(json.dumps(done[name], allow_nan=False) + "\n")
                say(f"{cell.title}: {name}: loss {done[name]['score']:.4f}, right {done[name]['accuracy']:.3f}")
            rows.append(done[name])
    finally:
        set_weights(bench.model, before)
    return rows


def list_measures(cell: Cell, bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and measurement of each line."""
    pair, fixed = bench.pair, cell.part != "wide"
    languages = cell.base != "rxnfp"
    set_weights(bench.model, pair.tuned)
    routes = bench.route()

    def measure(weights: State, splits: tuple[str, ...]) -> dict[str, Any]:
        set_weights(bench.model, pair.tuned, weights)
        scores = bench.score("test")
        if not is_finite(scores):
            raise ArithmeticError(f"{cell.title}: the loss is not finite")
        found = scores.to_json()
        for split in splits:
            other = bench.score(split)
            found[f"{split}_loss"] = round(float(other.loss.mean()), 5)
            found[f"{split}_accuracy"] = round(float(other.right.mean()), 4)
        if routes is not None:
            now = bench.route()
            assert now is not None  # the same model
            found["routes_moved"] = round(share_moved(now, routes), 5)
        return found

    def edited(edit: Edit) -> dict[str, Any]:
        weights, departure = pair.apply(edit, cell.seed)
        grid = edit.kind == "pome" and edit.power == 0.0 and edit.rule == "ratio"
        splits = ("train", "other") if fixed and languages else ("train",) if languages and grid else ()
        return measure(weights, splits) | {"departure": None if math.isnan(departure) else round(departure, 5)}

    if fixed:
        splits = ("train", "other") if languages else ("train",) if cell.part == "fixed" else ()
        yield "base", lambda: measure(pair.base, splits)
        yield "fine-tuned", lambda: measure({}, splits) | {"matrices": pair.describe()}
    for edit in cell.list_edits(set(pair.roles.values())):
        if pair.select(edit.roles) or edit.roles == "model":
            yield edit.name, functools.partial(edited, edit)
    if cell.part == "fixed" and cell.seed == 0 and cell.tuning in COMPRESSED_TUNINGS:
        for chosen in (None, *COMPRESSED):
            for how in COMPRESSIONS:
                name = f"{chosen.name if chosen else 'fine-tuned'} + {how}"
                yield name, functools.partial(measure_compressed, pair, chosen, how, measure)


def measure_compressed(
    pair: Pair, edit: Edit | None, how: str, measure: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Scores after an edit (or none) and a compression of all matrices."""
    weights = pair.apply(edit)[0] if edit else {}
    return measure(weights | compress(pair.tuned | weights, pair.roles, how), ())


def finish(cell: Cell, rows: list[dict[str, Any]]) -> None:
    """Write a finished part to the results, whole."""
    RESULTS.mkdir(exist_ok=True)
    fresh = cell.path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    fresh.rename(cell.path)
    find_part(cell).unlink(missing_ok=True)
