"""What `pome sweep` tries: the candidates, and the order in which a search asks for their scores. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pome.config.spec import EditSpec, check_count, check_text, merge_options, nearest, read_float, show
from pome.errors import SpecError

SEARCHES = ("grid", "coordinate")
AXES = ("layers", "rank_ratio", "rank", "rank_rule", "energy", "scale", "beta")  # options that take a list
FINE_TUNED, BASE = "fine-tuned", "base"  # scored beside the candidates, always


@dataclass(frozen=True)
class Candidate:
    """One edit to be scored. `params` are the options that the sweep varies or fixes for it, by name."""

    params: dict[str, Any]
    spec: EditSpec

    @property
    def key(self) -> str:
        return json.dumps(self.params, sort_keys=True)

    @property
    def cut(self) -> str:
        return name_cut(self.params)

    @property
    def label(self) -> str:
        return f"{'+'.join(self.params['layers'])} {self.cut} {self.params['scale']} beta={self.params['beta']:g}"


def name_cut(params: Mapping[str, Any]) -> str:
    """How options choose k, in a word."""
    if "rank" in params:
        return f"k={params['rank']}"
    if "rank_ratio" in params:
        return f"K={params['rank_ratio']:g}"
    rule: str = params["rank_rule"]
    return f"energy={params['energy']:g}" if rule == "energy" else rule


@dataclass(frozen=True)
class Grid:
    """Every combination of the lists, and the options that all candidates share. Raises SpecError.

    layers: alternatives, each a tuple as in EditSpec. cuts: alternatives for choosing k, as options by name.
    """

    layers: tuple[tuple[str, ...], ...]
    cuts: tuple[dict[str, Any], ...]
    scales: tuple[str, ...]
    betas: tuple[float, ...]
    shared: EditSpec
    search: str = "grid"

    def __post_init__(self) -> None:
        if check_text("search", self.search) not in SEARCHES:
            raise SpecError(
                f"search: {show(self.search)} is not one of {', '.join(SEARCHES)}{nearest(self.search, SEARCHES)}"
            )
        for layers, cut, scale, beta in itertools.product(self.layers, self.cuts, self.scales, self.betas):
            self.make(layers, cut, scale, beta)  # each is checked now, before hours of scoring

    def make(self, layers: tuple[str, ...], cut: Mapping[str, Any], scale: str, beta: float) -> Candidate:
        params = {"layers": list(layers), **cut, "scale": scale, "beta": beta}
        values = {field.name: getattr(self.shared, field.name) for field in dataclasses.fields(EditSpec)}
        spec = EditSpec.from_mapping(merge_options(values, {**params, "layers": layers}))
        return Candidate(params, spec)

    @property
    def size(self) -> int:
        """The most candidates that the search will ask for."""
        axes = [len(self.layers), len(self.cuts), len(self.scales), len(self.betas)]
        return math.prod(axes) if self.search == "grid" else 1 + sum(axis - 1 for axis in axes)

    def to_mapping(self) -> dict[str, Any]:
        """For the manifest and for people."""
        return {
            "layers": [list(item) for item in self.layers],
            "cuts": [dict(item) for item in self.cuts],
            "scale": list(self.scales),
            "beta": list(self.betas),
            "search": self.search,
        }


def make_grid(options: Mapping[str, Any], search: str = "grid") -> Grid:
    """A grid from options by name, in which those of AXES may be lists. Raises SpecError.

    `layers` lists alternatives; one of several roles is itself a list, or joins them with `+`. What chooses k is one
    list made of several options: every rank_ratio, every rank, every energy, and every other rank_rule.
    """
    given = dict(options)
    layers = tuple(_read_layers(item) for item in _listed(given.pop("layers", ["up"])))
    scales = tuple(check_text("scale", item) for item in _listed(given.pop("scale", ["frobenius"])))
    betas = tuple(_read_number("beta", item) for item in _listed(given.pop("beta", [1.0])))
    cuts = tuple(_list_cuts({name: given.pop(name) for name in AXES if name in given}))
    combinations = [frozenset(item) for item in layers]  # gate+up is up+gate
    axes: tuple[tuple[str, Sequence[Any]], ...] = (("layers", combinations), ("scale", scales), ("beta", betas))
    for name, axis in axes:
        if not axis:
            raise SpecError(f"{name}: an empty list; give at least one value")
        if len(set(axis)) < len(axis):
            raise SpecError(f"{name}: a value stands twice in the list")
    shared = EditSpec.from_mapping(given)
    if shared.dtype != "keep" or shared.out_format != "full":
        name = "dtype" if shared.dtype != "keep" else "out_format"
        raise SpecError(
            f"{name}: a sweep scores candidates in the fine-tuned model's own layout; leave it out, and give it to "
            "`pome edit` with the options that win"
        )
    return Grid(layers, cuts, scales, betas, shared, search)


def _list_cuts(given: dict[str, Any]) -> list[dict[str, Any]]:
    rules = [check_text("rank_rule", item) for item in _listed(given.get("rank_rule", []))]
    ratios = [_read_number("rank_ratio", item) for item in _listed(given.get("rank_ratio", []))]
    energies = [_read_number("energy", item) for item in _listed(given.get("energy", []))]
    ranks = [_read_whole(item) for item in _listed([] if given.get("rank") is None else given["rank"])]
    if "ratio" in rules or not (ratios or ranks or energies or rules):
        ratios = ratios or [0.5]
    if "energy" in rules:
        energies = energies or [0.9]
    if "fixed" in rules and not ranks:
        raise SpecError("rank_rule: 'fixed' needs rank, the numbers of directions to keep")
    cuts: list[dict[str, Any]] = [{"rank_ratio": ratio} for ratio in ratios]
    cuts += [{"rank": rank} for rank in ranks]
    cuts += [{"rank_rule": "energy", "energy": energy} for energy in energies]
    cuts += [{"rank_rule": rule} for rule in rules if rule not in ("ratio", "fixed", "energy")]
    if len({json.dumps(cut) for cut in cuts}) < len(cuts):
        raise SpecError("rank_ratio, rank, energy, rank_rule: a value stands twice in the lists")
    return cuts


def _listed(value: Any) -> list[Any]:
    """A list, from a list, from one value, or from a text with commas; a pattern may hold commas and stays whole."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    found: list[Any] = []
    for item in items:
        if isinstance(item, str) and not item.startswith("re:"):
            found += [text.strip() for text in item.split(",") if text.strip()]
        else:
            found.append(item)
    return found


def _read_layers(item: Any) -> tuple[str, ...]:
    """The names that one alternative joins, each once."""
    names = item if isinstance(item, (list, tuple)) else [item]
    if not names or not all(isinstance(name, str) for name in names):
        raise SpecError(f"layers: {show(item)} is neither a role nor a list of them")
    pieces: list[str] = []
    for name in names:
        pieces += [name] if name.startswith("re:") else [piece.strip() for piece in re.split(r"[+,]", name)]
    if not all(pieces):
        raise SpecError(f"layers: {show(item)}: nothing beside a '+'; join roles as in gate+up")
    return tuple(dict.fromkeys(pieces))


def _read_number(name: str, item: Any) -> float:
    try:
        number = float(item) if isinstance(item, str) else read_float(item)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise SpecError(f"{name}: {show(item)} is not a number; a list is written 0.25,0.5")
    return number


def _read_whole(item: Any) -> int:
    # Ten digits are more than any rank has; of thousands Python would make no number.
    return check_count("rank", int(item) if isinstance(item, str) and re.fullmatch(r"[0-9]{1,10}", item) else item)


def walk(grid: Grid) -> Generator[Candidate, float | None, None]:
    """The candidates in the order of the search; each is answered with its score, higher being better, or None.

    `coordinate` goes along one axis at a time from the first value of each: beta, how k is chosen, the layers, the
    scale. It asks for some candidates again, whose scores the caller knows.
    """
    if grid.search == "grid":
        for layers, cut, scale, beta in itertools.product(grid.layers, grid.cuts, grid.scales, grid.betas):
            yield grid.make(layers, cut, scale, beta)
        return
    axes: dict[str, tuple[Any, ...]] = {
        "beta": grid.betas, "cut": grid.cuts, "layers": grid.layers, "scale": grid.scales
    }  # fmt: skip
    at = {name: values[0] for name, values in axes.items()}
    for name, values in axes.items():
        best: tuple[float, Any] | None = None
        for value in values:
            score = yield grid.make(**{**at, name: value})
            if score is not None and (best is None or score > best[0]):
                best = (score, value)
        if best is not None:
            at[name] = best[1]
