"""What the user asked for: frozen dataclasses, made from options or from YAML. No torch, no checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pome.choices import GROUPS, ROLES
from pome.errors import SpecError, printable

RANK_RULES = ("ratio", "fixed", "energy", "noise-floor", "gavish-donoho", "effective")
SCALES = ("frobenius", "unit", "rms", "mean", "spectral")
DTYPES = ("keep", "float32", "bfloat16", "float16")
ENGINES = ("local",)
OUT_FORMATS = ("full", "adapter")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")

# The options that together choose k. One of them given on the command line sets aside what a file says of the others.
RANK_OPTIONS = frozenset({"rank_ratio", "rank", "rank_rule", "energy"})
# The rules that take a number, and the option that gives it.
NUMBER_OF = {"ratio": "rank_ratio", "fixed": "rank", "energy": "energy"}
MOST = 10**9  # of what is counted: no matrix is as large, and every library can take it
BETAS = (1e-6, 1e6)


@dataclass(frozen=True)
class Override:
    """Other options for the tensors whose name `match` finds (a regular expression). None leaves an option as it is.

    Raises SpecError for a pattern that is none, and for an override that changes nothing; its values are checked
    together with those of the spec that it stands in.
    """

    match: str
    rank_ratio: float | None = None
    rank: int | None = None
    rank_rule: str | None = None
    energy: float | None = None
    scale: str | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise SpecError("overrides: each needs match, a regular expression over tensor names")
        _compile("overrides", self.match)
        if not self.options:
            raise SpecError(f"overrides: {printable(self.match)!r} changes nothing; {_OVERRIDABLE}")
        try:
            _check_cut(self.options)
        except SpecError as error:
            raise SpecError(f"overrides: {printable(self.match)!r}: {error}") from None

    @property
    def options(self) -> dict[str, Any]:
        """What it changes, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: value for key, value in values.items() if key != "match" and value is not None}


OVERRIDE_KEYS = tuple(field.name for field in dataclasses.fields(Override))
_OVERRIDABLE = f"it may set {', '.join(OVERRIDE_KEYS[1:])}"


@dataclass(frozen=True)
class EditSpec:
    """One edit, every option resolved; the names are those of the command line and of YAML.

    Raises SpecError for a value out of range or options that exclude each other. `rank` given turns the rule `ratio`
    into `fixed`.
    """

    layers: tuple[str, ...] = ("up",)
    exclude: tuple[str, ...] = ()
    rank_ratio: float = 0.5
    rank: int | None = None
    rank_rule: str = "ratio"
    energy: float = 0.9
    scale: str = "frobenius"
    beta: float = 1.0
    device: str = "auto"
    dtype: str = "keep"
    engine: str = "local"
    out_format: str = "full"  # `adapter`: of an adapter, an adapter again
    dequantize: bool = False
    common_rows: bool = False  # edit the first rows that embeddings of different vocabularies share

    allow_missing: bool = False  # go on where BASE has no partner for a whole group of what is selected
    allow_other_base: bool = False  # go on where BASE does not look like the model that FT was trained from
    allow_other_depth: bool = False  # pair layers by number where FT and BASE have different numbers of them

    overrides: tuple[Override, ...] = ()  # later ones win

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen; what is put here only normalises what was given
        put(self, "layers", _names("layers", self.layers))
        put(self, "exclude", _texts("exclude", self.exclude))
        for name in self.layers:
            if name == "re:":
                raise SpecError("layers: 're:' has no pattern; for every tensor write 're:.'")
            if name.startswith("re:"):
                _compile("layers", name[3:])
            elif name not in ROLES and name not in GROUPS:
                hint = nearest(name, [*ROLES, *GROUPS])
                raise SpecError(
                    f"layers: {printable(name)!r} is neither a role ({', '.join(ROLES)}) nor a group "
                    f"({', '.join(GROUPS)}){hint}; for tensor names use re:PATTERN"
                )
        if not self.layers:
            raise SpecError("layers: nothing is selected; name a role, a group or re:PATTERN")
        for pattern in self.exclude:
            if not pattern:
                raise SpecError("exclude: empty, which every tensor matches; is a variable unset?")
            _compile("exclude", pattern)
        put(self, "rank_ratio", _share("rank_ratio", self.rank_ratio))
        put(self, "energy", _share("energy", self.energy))
        beta = read_float(self.beta)
        if not BETAS[0] <= beta <= BETAS[1]:
            raise SpecError(f"beta: {show(self.beta)} is not a number from {BETAS[0]:g} to {BETAS[1]:g}")
        put(self, "beta", beta)
        if self.rank is not None:
            check_count("rank", self.rank)
        _choice("rank_rule", self.rank_rule, RANK_RULES)
        _choice("scale", self.scale, SCALES)
        _choice("dtype", self.dtype, DTYPES)
        _choice("engine", self.engine, ENGINES)
        _choice("out_format", self.out_format, OUT_FORMATS)
        if not isinstance(self.device, str) or not DEVICE.fullmatch(self.device):
            raise SpecError(f"device: {show(self.device)} is none of auto, cpu, cuda, cuda:N, mps")
        check_switch("dequantize", self.dequantize)
        check_switch("common_rows", self.common_rows)
        for name in ("allow_missing", "allow_other_base", "allow_other_depth"):
            check_switch(name, getattr(self, name))
        if self.rank is not None and self.rank_rule == "ratio":
            put(self, "rank_rule", "fixed")
        if self.rank_rule == "fixed" and self.rank is None:
            raise SpecError("rank_rule: 'fixed' needs rank, the number of directions to keep")
        if self.rank is not None and self.rank_rule != "fixed":
            raise SpecError(f"rank: a fixed rank and rank_rule {self.rank_rule!r} exclude each other; give one")
        put(self, "overrides", tuple(_read_override(item) for item in _list("overrides", self.overrides)))
        for override in self.overrides:
            self._apply(override)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> EditSpec:
        """A spec from options by name; `energy` alone means the rule `energy`, as `rank` alone means `fixed`."""
        chosen = dict(options)
        for key in chosen:
            if key not in EDIT_KEYS:
                raise SpecError(f"unknown option {printable(str(key))!r}{nearest(str(key), EDIT_KEYS)}")
        if "energy" in chosen and not RANK_OPTIONS & (chosen.keys() - {"energy"}):
            chosen["rank_rule"] = "energy"
        return cls(**chosen)

    @classmethod
    def from_given(cls, options: Mapping[str, Any]) -> EditSpec:
        """The same of what a user gave, each option on purpose: one that cannot take effect is refused."""
        spec = cls.from_mapping(options)
        _check_cut(options)
        return spec

    def resolve(self, name: str) -> EditSpec:
        """The spec for one tensor: every override that matches its name applied in turn, and none left."""
        spec = self
        for override in self.overrides:
            if re.search(override.match, name):
                spec = spec._apply(override)
        return dataclasses.replace(spec, overrides=()) if self.overrides else self

    def _apply(self, override: Override) -> EditSpec:
        """Options that choose k set aside all that was said of choosing k before."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        merged = merge_options({**values, "overrides": ()}, override.options)
        try:
            return EditSpec.from_mapping(merged)
        except SpecError as error:
            raise SpecError(f"overrides: {printable(override.match)!r}: {error}") from None

    def to_mapping(self) -> dict[str, Any]:
        """Every option as resolved, in JSON's types."""
        values = dataclasses.asdict(self)
        values["overrides"] = [{"match": item.match, **item.options} for item in self.overrides]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


EDIT_KEYS = tuple(field.name for field in dataclasses.fields(EditSpec))


def merge_options(file: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options over a file's values; an option that chooses k sets aside all that the file says of choosing k."""
    dropped = RANK_OPTIONS if RANK_OPTIONS & options.keys() else frozenset()
    return {**{k: v for k, v in file.items() if k not in dropped}, **options}


def _check_cut(options: Mapping[str, Any]) -> None:
    """Refuse a number for choosing k beside another option that leaves it without effect.

    One that is the default asks for nothing: so the `spec` of a manifest is a config file.
    """
    defaults = {"rank": None, "rank_ratio": EditSpec.rank_ratio, "energy": EditSpec.energy}
    given = {key: options[key] for key in defaults if options.get(key) is not None}
    rule = options.get("rank_rule")
    taken = next(iter(given), None) if rule is None else NUMBER_OF.get(str(rule))
    for key, value in given.items():
        if key != taken and value != defaults[key]:
            raise SpecError(
                f"{key}: has no effect with {f'rank_rule {rule!r}' if rule else taken}; give one of the two"
            )


def check_switch(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{key}: {show(value)} is not true or false")
    return value


def check_count(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise SpecError(f"{key}: {show(value)} is not a whole number of at least 1 and at most {MOST}")
    return value


def check_text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise SpecError(f"{key}: {show(value)} is not a text")
    if not value:
        raise SpecError(f"{key}: empty; is a variable unset?")
    if "\0" in value:  # no path and no command can hold it
        raise SpecError(f"{key}: {show(value)} holds a null character")
    return value


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


def _list(key: str, value: object) -> Sequence[Any]:
    if not isinstance(value, (tuple, list)):
        raise SpecError(f"{key}: not a list; write '- match: PATTERN' lines")
    return value


def _read_override(item: object) -> Override:
    """An override as such or as a mapping, from YAML, Python or a manifest."""
    if isinstance(item, Override):
        return item
    if not isinstance(item, Mapping):
        raise SpecError("overrides: each must be 'key: value' lines, one of them match")
    for key in item:
        if key not in OVERRIDE_KEYS:
            hint = nearest(str(key), OVERRIDE_KEYS) or f"; {_OVERRIDABLE}"
            raise SpecError(f"overrides: unknown key {printable(str(key))!r}{hint}")
    return Override(**{"match": "", **item})


def _names(key: str, value: object) -> tuple[str, ...]:
    """Layer names; a comma separates roles and groups (but not inside a pattern, which may hold commas)."""
    names: list[str] = []
    for text in _texts(key, value):
        names += [text] if text.startswith("re:") else [t.strip() for t in text.split(",") if t.strip()]
    return tuple(dict.fromkeys(names))


def _texts(key: str, value: object) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, str) for v in values):
        raise SpecError(f"{key}: {show(value)} is not a text or a list of texts")
    return tuple(values)


def _share(key: str, value: object) -> float:
    number = read_float(value)
    if not 0 < number <= 1:
        raise SpecError(f"{key}: {show(value)} is not a number above 0 and at most 1")
    return number


def _choice(key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise SpecError(f"{key}: {show(value)} is not one of {', '.join(known)}{hint}")


def _compile(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise SpecError(f"{key}: {printable(pattern)!r} is not a regular expression: {error}") from None
