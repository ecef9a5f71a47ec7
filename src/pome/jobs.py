"""Files of YAML: options for one edit, and batches of jobs. No torch, no checkpoints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pome.errors import SpecError, printable
from pome.evaluate import FolderScorer, ModelScorer
from pome.grid import AXES, Grid, make_grid
from pome.roles import ROLES
from pome.scorers import make_scorer
from pome.spec import EDIT_KEYS, OVERRIDE_KEYS, EditSpec, check_switch, merge_options, nearest
from pome.yaml_text import compose

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MAX_YAML_BYTES = 4 << 20
SWITCHES = ("overwrite", "fresh", "full", "card", "private")
COMMANDS = ("edit", "inspect", "sweep", "verify")
SCORER_KEYS = ("score_cmd", "loss", "lm_eval", "train_data", "minimize", "score_timeout", "batch_size", "limit")
SWEEP_KEYS = (*SCORER_KEYS, "search", "write_best", "retry_failed")


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
class Sweep:
    """What a sweep tries, what it is judged by, and when its best is written."""

    grid: Grid
    scorer: FolderScorer | ModelScorer
    write_best: bool = False
    retry_failed: bool = False

    def describe(self) -> dict[str, Any]:
        """What makes two sweeps of one pair the same, as in a manifest."""
        return {"scorer": self.scorer.describe(), "grid": self.grid.to_mapping()}


def make_sweep(options: Mapping[str, Any]) -> Sweep:
    """A sweep from its options by name: lists of edit's, and those of SWEEP_KEYS. Raises SpecError."""
    scorer = make_scorer(**{key: options[key] for key in SCORER_KEYS if options.get(key) is not None})
    switches = {key: check_switch(key, options.get(key, False)) for key in ("write_best", "retry_failed")}
    grid = make_grid({key: options[key] for key in EDIT_KEYS if key in options}, str(options.get("search", "grid")))
    return Sweep(grid, scorer, **switches)


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
    sweep: Sweep | None = None


REPORT_KEYS = tuple(field.name for field in dataclasses.fields(Reports))
JOB_KEYS = (
    *("name", "command", "base", "fine_tuned", "out", *EDIT_KEYS, *SWITCHES, "push_to_hub", *REPORT_KEYS),
    *SWEEP_KEYS,
)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file for one edit. Raises SpecError naming the line of an unknown or repeated key."""
    root = _compose(path)
    return _mapping(root, path, EDIT_KEYS)


def read_batch(path: Path, only: Iterable[str] = (), variables: Mapping[str, str] | None = None) -> list[Job]:
    """The jobs of a batch file, all of them checked before the first is run; `only` keeps those named.

    `variables` take the place of those in the file, whose `${name}` stand in its texts.
    """
    root = _compose(path)
    top = _children(root, path, ("variables", "defaults", "jobs"))
    _fill_in(root, path, _read_variables(top, path, variables or {}))
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
    _refuse_twins(path, "out", [job.out for job in jobs if job.command in ("edit", "sweep")])
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
    if command != "sweep" and (stray := [key for key in SWEEP_KEYS if key in values]):
        raise SpecError(f"{command}: {', '.join(stray)}: only the command sweep takes that")
    if command != "sweep" and reports != Reports():
        raise SpecError(f"{command}: {', '.join(REPORT_KEYS)} are what the commands inspect and sweep write")
    out = _text("out", values.pop("out", None))
    base, fine_tuned = (
        None if command == "verify" and values.get(key) is None else _text(key, values.get(key))
        for key in ("base", "fine_tuned")
    )
    name = _text("name", values.pop("name", out if command == "edit" else f"{command} {out}"))
    overwrite, fresh, full, card, private = (check_switch(key, values.pop(key, False)) for key in SWITCHES)
    publication = Publication(card, values.pop("push_to_hub", None), private)
    found = make_sweep(values) if command == "sweep" else None
    given = {key: value for key, value in values.items() if key in EDIT_KEYS}
    spec = found.grid.shared if found else EditSpec.from_mapping(given)
    return Job(name, command, base, fine_tuned, out, spec, overwrite, fresh, full, publication, reports, found)


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


def _compose(path: Path) -> yaml.Node:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise SpecError(f"{path}: over {MAX_YAML_BYTES >> 20} MiB; this is not a configuration")
    try:
        root = compose(raw)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"{path}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise SpecError(f"{path}: not YAML: {printable(reason)}") from None
    if root is None:
        raise SpecError(f"{path}: empty; write options as 'key: value' lines")
    return root


def _read_variables(
    top: Mapping[str, tuple[int, yaml.Node]], path: Path, given: Mapping[str, str]
) -> dict[str, str | None]:
    """Name -> text, those given in the place of the file's; None for one that must be given."""
    line, node = top.get("variables", (0, None))
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{path}:{line}: variables: expected 'name: text' lines")
    found: dict[str, str | None] = {}
    for key, value in node.value if node is not None else ():
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            raise SpecError(f"{path}:{key.start_mark.line + 1}: variables: expected 'name: text' lines")
        found[key.value] = None if value.tag.endswith(":null") else value.value
    for name in given:
        if name not in found:
            raise SpecError(f"{path}: no variable is named {printable(name)!r}{nearest(name, found)}")
    return {**found, **given}


def _fill_in(node: yaml.Node, path: Path, variables: Mapping[str, str | None]) -> None:
    """Put the variables' texts in the place of `${name}`, in every value below a node. Raises SpecError."""

    def find(match: re.Match[str]) -> str:
        name, at = match[1], f"{path}:{node.start_mark.line + 1}"
        if name not in variables:
            raise SpecError(f"{at}: no variable is named {printable(name)!r}{nearest(name, variables)}")
        value = variables[name]
        if value is None:
            raise SpecError(f"{at}: the variable {name!r} has no value; give --set {name}=VALUE")
        return value

    if isinstance(node, yaml.ScalarNode):
        text = re.sub(r"\$\{(\w+)\}", find, node.value)
        if text != node.value:
            node.value = text
            if node.style is None:  # written without quotes: what is put in may be a number
                loader: Any = yaml.SafeLoader("")
                node.tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _fill_in(item, path, variables)
    elif isinstance(node, yaml.MappingNode):
        for _, item in node.value:
            _fill_in(item, path, variables)


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
            listed = key in AXES and isinstance(value, (list, str))  # a sweep's; another job refuses it later
            if key in EDIT_KEYS and key not in ("rank_rule", "rank") and not listed:
                EditSpec(**{key: value})
        except SpecError as error:
            raise SpecError(f"{path}:{line}: {error}") from None
        values[key] = value
    return values
