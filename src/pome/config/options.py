"""Declared options: type, range, default, help and commands of each, in one place. No torch.

An option is declared on the line of the field or parameter that it sets, as the metadata of its type:

    beta: Annotated[float, Option("The factor.", metavar="B", range=Range(1e-6, 1e6))] = 1.0

`find_options` reads such lines. From them are made the command line with its help, the keys of YAML, the checks of
`EditSpec` and `Override`, the axes of a sweep, docstrings, and the documentation's tables.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pome.choices import Choice
from pome.errors import SpecError, printable

MOST = 10**9  # of what is counted: no matrix is as large, and every library can take it

# The groups of an option in `--help`, in their order.
WHAT, JOBS, CHECKED, HOW, SCORER, OUTPUT, RUN = GROUP_ORDER = (
    "What to edit", "Which jobs", "What is checked", "How much", "What scores", "What is written", "How it runs"
)  # fmt: skip
LIST_COMMANDS = ("sweep",)  # where an axis takes a list
LIKE_EDIT = ("estimate",)  # that take what edit takes


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `above`, `low` itself is none of them. `unit` is what they count."""

    low: float
    high: float = math.inf
    above: bool = False
    unit: str = ""

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, (int, float)) or math.isinf(number):
            return False
        return (self.low < number if self.above else self.low <= number) and number <= self.high

    def __str__(self) -> str:
        unit = f"of {self.unit} " if self.unit else ""
        if not self.above and self.high < math.inf:
            return f"{unit}from {self.low:g} to {self.high:g}"
        end = f" and at most {self.high:g}" if self.high < math.inf else ""
        return f"{unit}{'above' if self.above else 'of at least'} {self.low:g}{end}"


@dataclass(frozen=True)
class Option:
    """What is known of one option but the name, the type and the default, which stand on its line.

    help: a short sentence. more: what the documentation says beyond that. commands: those that take the option, None
    for all that take what declares it. axis: a sweep takes a list of it. override: an override may set it. read: a
    function that checks a value and normalises it, beyond what the type says. choices: for a type that lists names,
    what they mean. instead: another help, metavar or default, by command.
    """

    help: str
    _: KW_ONLY
    more: str = ""
    metavar: str = ""
    range: Range | None = None
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    suggestions: Collection[str] = ()  # for the completion of a shell
    group: str = RUN
    commands: tuple[str, ...] | None = None
    axis: bool = False
    override: bool = False
    everyday: bool = True  # shown by --help, not by --help-all alone
    on_command_line: bool = True
    hidden_in: tuple[str, ...] = ()  # commands that take it to refuse it with a reason
    flag: str = ""  # of the command line, where it is not made from the name
    short: str = ""
    read: Callable[[str, Any], Any] | None = None
    instead: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # Filled in by `find_options`.
    name: str = ""
    type: Any = str
    default: Any = None

    @property
    def plain_type(self) -> Any:
        """The type without None."""
        kinds = [kind for kind in get_args(self.type) if kind is not type(None)]
        return kinds[0] if type(None) in get_args(self.type) else self.type

    @property
    def is_switch(self) -> bool:
        return self.plain_type is bool

    @property
    def is_list(self) -> bool:
        return get_origin(self.plain_type) is tuple

    def takes_list(self, command: str) -> bool:
        """Whether a command takes several values of it."""
        return self.is_list or (self.axis and command in LIST_COMMANDS)

    def check(self, value: Any) -> Any:
        """The value as it is kept. Raises SpecError, which names the option, for one that it may not have."""
        if value is None and self.type is not self.plain_type:
            return None
        kind = self.plain_type
        if self.read is not None:
            return self.read(self.name, value)
        if kind is bool:
            return check_switch(self.name, value)
        if kind is int:
            return check_count(self.name, value)
        if kind is float:
            return check_number(self.name, value, self.range or Range(-math.inf))
        if self.choices:
            return check_choice(self.name, value, self.choices)
        return check_texts(self.name, value) if self.is_list else check_text(self.name, value)

    def parse(self, text: Any) -> Any:
        """A value from a text of the command line; a text that is no number stays one, for `check` to refuse."""
        try:
            return self.plain_type(text) if self.plain_type in (int, float, Path) else text
        except ValueError:
            return text


def as_flag(name: str) -> str:
    """The option of the command line that a name stands for."""
    return "--" + name.replace("_", "-")


def list_options(owners: Iterable[Any], command: str) -> dict[str, Option]:
    """The options of several declarations that a command takes, by name, each as it is for that command."""
    found = {}
    taker = "edit" if command in LIKE_EDIT else command
    for owner in owners:
        for name, option in find_options(owner).items():
            if option.commands is None or taker in option.commands:
                found[name] = dataclasses.replace(option, **option.instead.get(command, {}))
    return found


def pick_options(values: Mapping[str, Any], owner: Any) -> dict[str, Any]:
    """Of options by name those that a dataclass or function declares."""
    return {name: values[name] for name in find_options(owner) if name in values}


def find_options(owner: Any) -> dict[str, Option]:
    """The options that a dataclass declares on its fields, or a function on its parameters, by name."""
    return _find_options(owner)


@functools.cache
def _find_options(owner: Any) -> dict[str, Option]:
    found = {}
    parameters = inspect.signature(owner).parameters
    for name, hint in get_type_hints(owner, include_extras=True).items():
        # Python 3.10 wraps the annotation of a parameter once more where the default is None.
        hint = next((kind for kind in (hint, *get_args(hint)) if hasattr(kind, "__metadata__")), hint)
        for row in getattr(hint, "__metadata__", ()):
            if isinstance(row, Option):
                found[name] = dataclasses.replace(
                    row, name=name, type=hint.__origin__, default=parameters[name].default
                )
    return found


Owner = TypeVar("Owner")


def documented(owner: Owner) -> Owner:
    """The class or function with the options that it declares written into its docstring."""
    if owner.__doc__:
        texts = (f"{name}: {describe_option(option)}" for name, option in find_options(owner).items())
        rows = (textwrap.fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8) for text in texts)
        owner.__doc__ = "\n".join([owner.__doc__.rstrip(), "", *rows])
    return owner


def describe_option(option: Option) -> str:
    """Everything that is declared of an option, in a line: help, range or choices, the rest."""
    parts = [option.help]
    if option.range is not None:
        parts.append(f"A number {option.range}.")
    if option.plain_type is int:
        parts.append("A whole number of at least 1.")
    if option.choices:
        parts.append("; ".join(f"`{row.name}`: {row.means}" for row in option.choices.values()) + ".")
    return " ".join([*parts, option.more]).strip()


def check_switch(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{key}: {show(value)} is not true or false", options=[key])
    return value


def check_count(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise SpecError(f"{key}: {show(value)} is not a whole number of at least 1 and at most {MOST}", options=[key])
    return value


def check_number(key: str, value: object, within: Range) -> float:
    number = read_float(value)
    if number not in within:
        raise SpecError(f"{key}: {show(value)} is not a number {within}", options=[key])
    return number


def check_choice(key: str, value: object, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise SpecError(f"{key}: {show(value)} is not one of {', '.join(known)}{hint}", options=[key])
    return value


def check_text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise SpecError(f"{key}: {show(value)} is not a text", options=[key])
    if not value:
        raise SpecError(f"{key}: empty; is a variable unset?", options=[key])
    if "\0" in value:  # no path and no command can hold it
        raise SpecError(f"{key}: {show(value)} holds a null character", options=[key])
    return value


def check_texts(key: str, value: object) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, str) for v in values):
        raise SpecError(f"{key}: {show(value)} is not a text or a list of texts", options=[key])
    return tuple(values)


def check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        said = f"{key}: {printable(pattern)!r} is not a regular expression: {error}"
        raise SpecError(said, options=[key]) from None


def read_float(value: object) -> float:
    """A number from YAML or Python, infinite where no float is as large; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def show(value: object) -> str:
    """A value as a message shows it, however long it is."""
    try:
        return printable(repr(value))
    except ValueError:  # Python prints no whole number of more than some thousands of digits
        return "a number of thousands of digits"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
