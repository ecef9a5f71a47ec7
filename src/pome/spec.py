"""What the user asked for: frozen dataclasses, made from options or from YAML. No torch, no checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pome.errors import SpecError, printable
from pome.roles import GROUPS, ROLES

RANK_RULES = ("ratio", "fixed", "energy", "noise-floor", "gavish-donoho", "effective")
SCALES = ("frobenius", "unit", "rms", "mean", "spectral")
DTYPES = ("keep", "float32", "bfloat16", "float16")
ENGINES = ("local",)
OUT_FORMATS = ("full", "adapter")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")

# The options that together choose k. One of them given on the command line sets aside what a file says of the others.
RANK_OPTIONS = frozenset({"rank_ratio", "rank", "rank_rule", "energy"})
MAX_YAML_BYTES = 4 << 20


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

    overrides: tuple[Override, ...] = ()  # later ones win

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen; what is put here only normalises what was given
        put(self, "layers", _names("layers", self.layers))
        put(self, "exclude", _texts("exclude", self.exclude))
        for name in self.layers:
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
            _compile("exclude", pattern)
        put(self, "rank_ratio", _number("rank_ratio", self.rank_ratio, above=0, at_most=1))
        put(self, "energy", _number("energy", self.energy, above=0, at_most=1))
        put(self, "beta", _number("beta", self.beta, above=0))
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise SpecError(f"rank: {self.rank!r} is not a whole number of at least 1")
        _choice("rank_rule", self.rank_rule, RANK_RULES)
        _choice("scale", self.scale, SCALES)
        _choice("dtype", self.dtype, DTYPES)
        _choice("engine", self.engine, ENGINES)
        _choice("out_format", self.out_format, OUT_FORMATS)
        if not isinstance(self.device, str) or not DEVICE.fullmatch(self.device):
            raise SpecError(f"device: {self.device!r} is none of auto, cpu, cuda, cuda:N, mps")
        _switch("dequantize", self.dequantize)
        _switch("common_rows", self.common_rows)
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
        if "energy" in chosen and not RANK_OPTIONS & (chosen.keys() - {"energy"}):
            chosen["rank_rule"] = "energy"
        return cls(**chosen)

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
SWITCHES = ("overwrite", "fresh", "full", "card", "private")
COMMANDS = ("edit", "inspect", "verify")


@dataclass(frozen=True)
class Publication:
    """What OUT gets beside the edit: a model card in place of FT's, and an upload, which has one too.

    Raises SpecError. None of it changes a weight.
    """

    card: bool = False
    push_to_hub: str | None = None  # org/name
    private: bool = False  # of a repository that the upload makes

    def __post_init__(self) -> None:
        repo = self.push_to_hub
        if repo is not None and not (isinstance(repo, str) and REPOSITORY.fullmatch(repo)):
            raise SpecError(f"push_to_hub: {printable(str(repo))!r} is not a repository; give ORG/NAME, no revision")
        if self.private and repo is None:
            raise SpecError("private: says what an upload becomes; give push_to_hub too")

    @property
    def has_card(self) -> bool:
        return self.card or self.push_to_hub is not None


@dataclass(frozen=True)
class Reports:
    """What an inspection writes: a page, a table, and a folder of plots; paths, or None."""

    html: str | None = None
    csv: str | None = None
    plots: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (not isinstance(value, str) or not value):
                raise SpecError(f"{field.name}: {value!r} is not a path")


@dataclass(frozen=True)
class Job:
    """One line of work of a batch file. `base` and `fine_tuned` may be None for `verify`; for `inspect` they are, or
    `out` is empty: it looks at an output, or at a pair."""

    name: str
    command: str
    base: str | None
    fine_tuned: str | None
    out: str
    spec: EditSpec
    overwrite: bool = False
    fresh: bool = False
    full: bool = False
    publication: Publication = Publication()
    reports: Reports = Reports()


REPORT_KEYS = tuple(field.name for field in dataclasses.fields(Reports))
JOB_KEYS = ("name", "command", "base", "fine_tuned", "out", *EDIT_KEYS, *SWITCHES, "push_to_hub", *REPORT_KEYS)


def merge_options(file: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options over a file's values; an option that chooses k sets aside all that the file says of choosing k."""
    dropped = RANK_OPTIONS if RANK_OPTIONS & options.keys() else frozenset()
    return {**{k: v for k, v in file.items() if k not in dropped}, **options}


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file for one edit. Raises SpecError naming the line of an unknown or repeated key."""
    root = _compose(path)
    return _mapping(root, path, EDIT_KEYS)


def read_batch(path: Path, only: Iterable[str] = ()) -> list[Job]:
    """The jobs of a batch file, all of them checked before the first is run; `only` keeps those named."""
    root = _compose(path)
    top = _children(root, path, ("defaults", "jobs"))
    defaults: dict[str, Any] = {}
    if "defaults" in top:
        allowed = tuple(k for k in JOB_KEYS if k not in ("name", "out"))
        defaults = _mapping(top["defaults"][1], path, allowed)
    if "jobs" not in top or not isinstance(top["jobs"][1], yaml.SequenceNode) or not top["jobs"][1].value:
        raise SpecError(f"{path}: 'jobs' must be a list of at least one job")
    jobs: list[Job] = []
    for node in top["jobs"][1].value:
        line = node.start_mark.line + 1
        given = _mapping(node, path, JOB_KEYS)
        try:
            jobs.append(_job(merge_options(defaults, given)))
        except SpecError as error:
            raise SpecError(f"{path}:{line}: {error}") from None
    _refuse_twins(path, "name", [job.name for job in jobs])
    _refuse_twins(path, "out", [job.out for job in jobs if job.command == "edit"])
    wanted = list(only)
    for name in wanted:
        names = [job.name for job in jobs]
        if name not in names:
            raise SpecError(f"{path}: no job is named {printable(name)!r}{nearest(name, names)}")
    return [job for job in jobs if not wanted or job.name in wanted]


def _job(values: dict[str, Any]) -> Job:
    command = values.pop("command", "edit")
    if command not in COMMANDS:
        raise SpecError(f"command: {command!r} is not one of {', '.join(COMMANDS)}{nearest(str(command), COMMANDS)}")
    reports = Reports(**{key: values.pop(key, None) for key in REPORT_KEYS})
    if command == "inspect":
        return _inspection(values, reports)
    if reports != Reports():
        raise SpecError(f"{command}: {', '.join(REPORT_KEYS)} are what the command inspect writes")
    out = _text("out", values.pop("out", None))
    base, fine_tuned = (
        None if command == "verify" and values.get(key) is None else _text(key, values.get(key))
        for key in ("base", "fine_tuned")
    )
    name = _text("name", values.pop("name", out if command == "edit" else f"{command} {out}"))
    overwrite, fresh, full, card, private = (_switch(key, values.pop(key, False)) for key in SWITCHES)
    publication = Publication(card, values.pop("push_to_hub", None), private)
    spec = EditSpec.from_mapping({key: value for key, value in values.items() if key in EDIT_KEYS})
    return Job(name, command, base, fine_tuned, out, spec, overwrite, fresh, full, publication)


def _inspection(values: dict[str, Any], reports: Reports) -> Job:
    """An output looked at where `out` is given, else a pair, all of its roles unless `layers` says otherwise."""
    out = values.pop("out", None)
    base, fine_tuned = (_text(key, values.get(key)) if out is None else None for key in ("base", "fine_tuned"))
    name = _text("name", values.pop("name", f"inspect {out or fine_tuned}"))
    options = {key: value for key, value in values.items() if key in EDIT_KEYS}
    spec = EditSpec.from_mapping({"layers": ROLES, **options})
    return Job(name, "inspect", base, fine_tuned, _text("out", out) if out is not None else "", spec, reports=reports)


def _refuse_twins(path: Path, key: str, values: list[str]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise SpecError(f"{path}: two jobs have the {key} {printable(twice)!r}; each needs its own")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise SpecError(f"{key}: {'missing' if value is None else 'not a text'}; a job needs base, fine_tuned and out")
    return value


def _switch(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{key}: {value!r} is not true or false")
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _compose(path: Path) -> yaml.Node:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise SpecError(f"{path}: over {MAX_YAML_BYTES >> 20} MiB; this is not a configuration")
    try:
        root = yaml.compose(raw, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"{path}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise SpecError(f"{path}: not YAML: {printable(reason)}") from None
    if root is None:
        raise SpecError(f"{path}: empty; write options as 'key: value' lines")
    return root


def _children(node: yaml.Node, path: Path, allowed: Iterable[str]) -> dict[str, tuple[int, yaml.Node]]:
    """Key -> (line, value node) of a mapping; unknown and repeated keys are refused by line."""
    known = list(allowed)
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{path}:{node.start_mark.line + 1}: expected 'key: value' lines here")
    found: dict[str, tuple[int, yaml.Node]] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key not in known:
            shown = "a key that is not a word" if key is None else f"unknown key {printable(key)!r}"
            hint = nearest(key or "", known) or f"; known keys: {', '.join(known)}"
            raise SpecError(f"{path}:{line}: {shown}{hint}")
        if key in found:
            raise SpecError(f"{path}:{line}: key {key!r} stands here and in line {found[key][0]}; keep one")
        found[key] = (line, value_node)
    return found


def _mapping(node: yaml.Node, path: Path, allowed: Iterable[str]) -> dict[str, Any]:
    """A flat mapping of options as plain values, checked key by key."""
    values = {}
    loader = yaml.SafeLoader("")
    for key, (line, value_node) in _children(node, path, allowed).items():
        if key == "overrides" and isinstance(value_node, yaml.SequenceNode):
            for item in value_node.value:
                _children(item, path, OVERRIDE_KEYS)
        try:
            value = loader.construct_object(value_node, deep=True)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SpecError(f"{path}:{line}: {key}: {printable(str(error).splitlines()[0])}") from None
        try:
            # Each value is checked alone here, so that the message can name its line; together they are checked later.
            if key in EDIT_KEYS and key not in ("rank_rule", "rank"):
                EditSpec(**{key: value})
        except SpecError as error:
            raise SpecError(f"{path}:{line}: {error}") from None
        values[key] = value
    return values


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
        raise SpecError(f"{key}: {value!r} is not a text or a list of texts")
    return tuple(values)


def _number(key: str, value: object, *, above: float, at_most: float = math.inf) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not above < float(value) <= at_most:  # type: ignore[arg-type]
        limit = f" and at most {at_most:g}" if at_most < math.inf else ""
        raise SpecError(f"{key}: {value!r} is not a number above {above:g}{limit}")
    return float(value)  # type: ignore[arg-type]


def _choice(key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SpecError(f"{key}: {value!r} is not one of {', '.join(known)}{nearest(str(value), known)}")


def _compile(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise SpecError(f"{key}: {printable(pattern)!r} is not a regular expression: {error}") from None
