"""Conflicts between options of edit: which option leaves which without effect or overrides a file. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from pome.choices import METHODS, RANK_RULES
from pome.config.options import Option
from pome.errors import SpecError

# The rules that take a number, and the option that gives it; those that are None unless given come first.
NUMBER_OF = {rule.name: rule.number for rule in RANK_RULES.values() if rule.number}
# The options that together choose k. One of them given on the command line sets aside what a file says of the others.
RANK_OPTIONS = frozenset({"rank_rule", *NUMBER_OF.values()})


def merge_options(file: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options over a file's values; an option that chooses k sets aside all that the file says of choosing k, and a
    method all that has no effect with it."""
    dropped = RANK_OPTIONS if RANK_OPTIONS & options.keys() else frozenset()
    dropped = dropped.union(find_idle(options.get("method")))
    return {**{k: v for k, v in file.items() if k not in dropped}, **options}


def find_idle(method: object) -> tuple[str, ...]:
    """The options that have no effect with a method."""
    return METHODS[method].without if isinstance(method, str) and method in METHODS else ()


def refuse_beside_method(name: str, method: object) -> NoReturn:
    """Raise SpecError for an option that has no effect with a method."""
    said = f"{name}: has no effect with method {method!r}, which keeps no number of directions and has no scale"
    raise SpecError(f"{said}; leave it out", options=[name, "method"])


def check_conflicts(spec: Any, known: Mapping[str, Option]) -> None:
    """Refuse the options of an EditSpec that exclude each other. Raises SpecError."""
    if spec.rank_rule == "fixed" and spec.rank is None:
        said = "rank_rule: 'fixed' needs rank, the number of directions to keep"
        raise SpecError(said, options=["rank_rule", "rank"])
    if spec.rank is not None and spec.rank_rule != "fixed":
        said = f"rank: rank and rank_rule {spec.rank_rule!r} exclude each other; give one"
        raise SpecError(said, options=["rank", "rank_rule"])
    if spec.ray_address is not None and spec.engine != "ray":
        said = "ray_address: has no effect without engine 'ray'; give both or neither"
        raise SpecError(said, options=["ray_address", "engine"])
    if spec.engine == "ray" and spec.device not in ("auto", "cpu", "cuda"):
        said = f"device: {spec.device!r} is one of this machine; with engine 'ray' use auto, cpu or cuda"
        raise SpecError(said, options=["device", "engine"])
    for name in METHODS[spec.method].without:
        if getattr(spec, name) != known[name].default:
            refuse_beside_method(name, spec.method)
    if spec.method == "equivalence" and spec.out_format == "adapter":
        said = "out_format: 'adapter' holds low-rank edits, and one of the method 'equivalence' has full rank; "
        raise SpecError(f"{said}give out_format full", options=["out_format", "method"])


def check_rank_options(options: Mapping[str, Any], known: Mapping[str, Option], defaults_count: bool = False) -> None:
    """Refuse a number for choosing k where another option or the method leaves it without effect.

    In a file a number that equals the default asks for nothing, so the `spec` of a manifest is a valid config file.
    With `defaults_count` it is refused too: on a command line it stands only because somebody typed it.
    """
    for name in find_idle(options.get("method")) if defaults_count else ():
        if name in options:
            refuse_beside_method(name, options["method"])
    # An option without a default is given on purpose, and comes before one that has a default.
    numbers = sorted(NUMBER_OF.values(), key=lambda name: known[name].default is not None)
    given = {name: options[name] for name in numbers if options.get(name) is not None}
    rule = options.get("rank_rule")
    taken = next(iter(given), None) if rule is None else NUMBER_OF.get(str(rule))
    for name, value in given.items():
        if name != taken and (defaults_count or value != known[name].default):
            beside = f"rank_rule {rule!r}" if rule else taken
            said = f"{name}: has no effect with {beside}; give one of the two"
            raise SpecError(said, options=[name, "rank_rule", *([taken] if taken and not rule else [])])
