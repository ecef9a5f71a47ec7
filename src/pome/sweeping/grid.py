"""Grid of a sweep: its candidates, and the order in which a search asks for their scores. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pome.choices import RANK_RULES, SEARCHES, SearchName
from pome.config.conflicts import RANK_OPTIONS, find_idle, merge_options, refuse_beside_method
from pome.config.options import RUN, Option, check_choice, check_count, check_text, documented, read_float, show
from pome.config.spec import EDIT_OPTIONS, EditSpec
from pome.errors import SpecError

LISTED = tuple(name for name, option in EDIT_OPTIONS.items() if option.axis)  # options of which a sweep takes a list
# The options that choose k are one axis together, named as in the manifest. A coordinate search begins with these.
RANK_AXIS = "cuts"
FIRST_AXES = ("beta", RANK_AXIS, "layers")
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
    def rank_choice(self) -> str:
        return describe_rank_choice(self.params)

    @property
    def label(self) -> str:
        rest = [name for name in self.params if name not in ("layers", "method") and name not in RANK_OPTIONS]
        rest = [name for name in rest if self.params[name] != 0]  # a power of 0 is the default and not shown
        words = [self.params[name] if EDIT_OPTIONS[name].choices else f"{name}={self.params[name]:g}" for name in rest]
        return " ".join(["+".join(self.params["layers"]), self.rank_choice, *words])


def describe_rank_choice(params: Mapping[str, Any]) -> str:
    """A word for how options choose k; for a method that chooses none, its name."""
    if "rank_rule" in find_idle(params.get("method")):
        return str(params["method"])
    rule = RANK_RULES[params.get("rank_rule") or ("fixed" if "rank" in params else "ratio")]
    return rule.describe(params[rule.number] if rule.number else None)


@dataclass(frozen=True)
class Grid:
    """Every combination of the alternatives on each axis, and the options that all candidates share. Raises SpecError.

    axes: the alternatives of each axis, by name, in the order in which they are nested. Those of `layers` are tuples as
    in EditSpec, those of RANK_AXIS options by name, all others values of the option that the axis is named for.
    """

    axes: dict[str, tuple[Any, ...]]
    shared: EditSpec
    search: str = "grid"

    def __post_init__(self) -> None:
        check_choice("search", self.search, SEARCHES)
        for at in self.combine():
            self.make(at)  # each is checked now, before hours of scoring

    def combine(self) -> Generator[dict[str, Any], None, None]:
        """Every combination, as one alternative by axis; the last axis changes first."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def make(self, at: Mapping[str, Any]) -> Candidate:
        """The candidate at one alternative of each axis; one for all that differ in what has no effect."""
        params: dict[str, Any] = {}
        for name, value in at.items():
            params |= value if name == RANK_AXIS else {name: list(value) if isinstance(value, tuple) else value}
        for name in find_idle(params["method"]):
            params.pop(name, None)
        values = {field.name: getattr(self.shared, field.name) for field in dataclasses.fields(EditSpec)}
        return Candidate(params, EditSpec.from_mapping(merge_options(values, params)))

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        return self.axes["layers"]

    @property
    def methods(self) -> frozenset[str]:
        """Every method that a matrix may be edited by."""
        overrides = (override.options.get("method") for override in self.shared.overrides)
        return frozenset({*self.axes["method"], *filter(None, overrides)})

    @property
    def size(self) -> int:
        """The most candidates that the search will ask for."""
        if self.search == "grid":
            return len({self.make(at).key for at in self.combine()})
        return 1 + sum(len(values) - 1 for values in self.axes.values())

    def to_mapping(self) -> dict[str, Any]:
        """The grid as a mapping, for the manifest and for people."""
        axes = {
            name: [list(value) if isinstance(value, tuple) else value for value in values]
            for name, values in self.axes.items()
        }
        return {**axes, "search": self.search}


@documented
def make_grid(
    options: Mapping[str, Any],
    search: Annotated[
        SearchName,
        Option(
            "Which candidates are scored, and in which order.",
            metavar="NAME",
            group=RUN,
            choices=SEARCHES,
            everyday=False,
        ),
    ] = "grid",
) -> Grid:  # fmt: skip
    """A grid from options of edit by name, in which those that are axes may be lists. Raises SpecError.

    `layers` lists alternatives; one of several roles is itself a list, or joins them with `+`. What chooses k is one
    list made of several options: every rank_ratio, every rank, every energy, and every other rank_rule.
    """
    given = dict(options)
    lists = {name: _split(given.pop(name)) for name in LISTED if name in given}
    axes: dict[str, tuple[Any, ...]] = {}
    for name in LISTED:
        if name in RANK_OPTIONS:
            axes.setdefault(RANK_AXIS, tuple(_list_rank_choices(lists)))
        else:
            default = EDIT_OPTIONS[name].default
            items = lists.get(name, list(default) if name == "layers" else [default])
            axes[name] = tuple(_read_value(name, item) for item in items)
            _check_axis(name, axes[name])
    shared = EditSpec.from_mapping(given)
    for name in find_idle(axes["method"][0]) if len(axes["method"]) == 1 else ():
        if name in lists:
            refuse_beside_method(name, axes["method"][0])
    for name, option in EDIT_OPTIONS.items():
        if "sweep" in option.hidden_in and getattr(shared, name) != option.default:
            raise SpecError(
                f"{name}: a sweep scores candidates in the fine-tuned model's own layout; leave it out, and give it to "
                "`pome edit` with the options that win",
                options=[name],
            )
    return Grid(axes, shared, search)


def _list_rank_choices(lists: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Every alternative for choosing k, as options by name."""
    named = [_read_value("rank_rule", item) for item in lists.get("rank_rule", [])]
    numbers = {
        rule.name: [_read_value(rule.number, item) for item in lists.get(rule.number, []) if item is not None]
        for rule in RANK_RULES.values()
        if rule.number
    }
    if not named and not any(numbers.values()):
        named = [EDIT_OPTIONS["rank_rule"].default]
    choices: list[dict[str, Any]] = []
    for name, values in numbers.items():
        number = str(RANK_RULES[name].number)
        if name in named and not values:
            if EDIT_OPTIONS[number].default is None:
                said = f"rank_rule: {name!r} needs {number}, the numbers of directions to keep"
                raise SpecError(said, options=["rank_rule", number])
            values = [EDIT_OPTIONS[number].default]
        # A number without a rule stands for the rule `ratio` or `fixed`.
        rule = {} if name in ("ratio", "fixed") else {"rank_rule": name}
        choices += [{**rule, number: value} for value in values]
    choices += [{"rank_rule": name} for name in named if name not in numbers]
    if len({json.dumps(choice) for choice in choices}) < len(choices):
        raise SpecError("rank_ratio, rank, energy, rank_rule: a value stands twice in the lists", options=RANK_OPTIONS)
    return choices


def _check_axis(name: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise SpecError(f"{name}: an empty list; give at least one value", options=[name])
    # gate+up is up+gate
    if len({frozenset(value) if isinstance(value, tuple) else value for value in values}) < len(values):
        raise SpecError(f"{name}: a value stands twice in the list", options=[name])


def _split(value: Any) -> list[Any]:
    """A list, from a list, from one value, or from a text with commas; a pattern may hold commas and stays whole."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    found: list[Any] = []
    for item in items:
        if isinstance(item, str) and not item.startswith("re:"):
            found += [text.strip() for text in item.split(",") if text.strip()]
        else:
            found.append(item)
    return found


def _read_value(name: str, item: Any) -> Any:
    """One alternative of an axis, from YAML, Python or a text of the command line."""
    if name == "layers":
        return _read_layers(item)
    kind = EDIT_OPTIONS[name].plain_type
    if kind is float:
        return _read_number(name, item)
    if kind is int:
        # Ten digits are more than any rank has; of thousands Python would make no number.
        whole = isinstance(item, str) and re.fullmatch(r"[0-9]{1,10}", item)
        return check_count(name, int(item) if whole else item)
    return check_text(name, item)


def _read_layers(item: Any) -> tuple[str, ...]:
    """The names that one alternative joins, each once."""
    names = item if isinstance(item, (list, tuple)) else [item]
    if not names or not all(isinstance(name, str) for name in names):
        raise SpecError(f"layers: {show(item)} is neither a role nor a list of them", options=["layers"])
    pieces: list[str] = []
    for name in names:
        pieces += [name] if name.startswith("re:") else [piece.strip() for piece in re.split(r"[+,]", name)]
    if not all(pieces):
        said = f"layers: {show(item)}: nothing beside a '+'; join roles as in gate+up"
        raise SpecError(said, options=["layers"])
    return tuple(dict.fromkeys(pieces))


def _read_number(name: str, item: Any) -> float:
    try:
        number = float(item) if isinstance(item, str) else read_float(item)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise SpecError(f"{name}: {show(item)} is not a number; a list is written 0.25,0.5", options=[name])
    return number


def walk(grid: Grid) -> Generator[list[Candidate], list[float | None], None]:
    """The candidates in the order of the search, in stages whose candidates do not depend on one another.

    Each stage is answered with their scores, higher being better, or None. `coordinate` goes along one axis at a time
    from the first value of each: the method, beta, how k is chosen, the layers, then every other axis. It asks for some
    candidates again, whose scores the caller knows.
    """
    if grid.search == "grid":
        yield list({candidate.key: candidate for candidate in map(grid.make, grid.combine())}.values())
        return
    at = {name: values[0] for name, values in grid.axes.items()}
    # The method decides which other axes there are, so it comes before them.
    first = ("method", *FIRST_AXES) if len(grid.axes["method"]) > 1 else FIRST_AXES
    for name in [*first, *(name for name in grid.axes if name not in first)]:
        values = grid.axes[name]
        scores = yield [grid.make({**at, name: value}) for value in values]
        scored = [(score, value) for score, value in zip(scores, values, strict=True) if score is not None]
        if scored:
            at[name] = max(scored, key=lambda pair: pair[0])[1]  # the first of equal ones
