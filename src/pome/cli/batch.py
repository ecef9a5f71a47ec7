"""Files of YAML: options for one edit, and batches of jobs. No torch, no checkpoints."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pome.choices import ROLES
from pome.config.outputs import Publication, Reports
from pome.config.spec import (
    EDIT_KEYS,
    OVERRIDE_KEYS,
    EditSpec,
    check_switch,
    check_text,
    merge_options,
    nearest,
    show,
)
from pome.config.yaml_text import compose
from pome.errors import SpecError, printable
from pome.sweeping.grid import AXES, Grid, make_grid
from pome.sweeping.scorers.command import FolderScorer, ModelScorer
from pome.sweeping.scorers.options import make_scorer

MAX_YAML_BYTES = 4 << 20
SWITCHES = ("overwrite", "fresh", "full", "card", "private")
SCORER_KEYS = ("score_cmd", "loss", "lm_eval", "train_data", "minimize", "score_timeout", "batch_size", "limit")
SWEEP_KEYS = (*SCORER_KEYS, "search", "write_best", "retry_failed")


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
    grid = make_grid({key: options[key] for key in EDIT_KEYS if key in options}, options.get("search", "grid"))
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
SIDES = ("base", "fine_tuned")
ANY_KEYS = ("name", "command", *SIDES, "out")
WRITER_KEYS = ("overwrite", "fresh", "card", "private", "push_to_hub")
# What an inspection hears of edit's options: what is looked at and how, and the numbers of its rules for k.
LOOK_KEYS = ("layers", "exclude", "device", "dequantize", "common_rows", "rank_ratio", "energy")
TAKES: dict[str, tuple[str, ...]] = {
    "edit": (*ANY_KEYS, *EDIT_KEYS, *WRITER_KEYS),
    "inspect": (*ANY_KEYS, *LOOK_KEYS, *REPORT_KEYS),
    "sweep": (*ANY_KEYS, *EDIT_KEYS, *SWEEP_KEYS, *WRITER_KEYS, *REPORT_KEYS),
    "verify": (*ANY_KEYS, "full"),
}
JOB_KEYS = tuple(dict.fromkeys(key for keys in TAKES.values() for key in keys))


def read_config(path: Path, lists: bool = False) -> dict[str, Any]:
    """The options in a YAML file for one edit, or with `lists` for a sweep. Raises SpecError naming the line of an
    unknown or repeated key, and of a value that is wrong by itself."""
    root = _compose(path)
    return _mapping(root, path, EDIT_KEYS, _check_list if lists else _check_value)


def make_spec(config: Path | None, given: Mapping[str, Any]) -> EditSpec:
    """The options of a command line over those of its config file. Raises SpecError."""
    spec = EditSpec.from_given(given)
    if config is None:
        return spec
    options = merge_options(read_config(config), given)
    try:
        return EditSpec.from_given(options)
    except SpecError as error:  # those of the command line were good by themselves
        raise SpecError(f"{config}: {error}") from None


def check_verification(base: str | None, fine_tuned: str | None, full: bool) -> None:
    """Refuse what `verify` could not do with the sides that it is given."""
    if full and (base is None or fine_tuned is None):
        raise SpecError("full: every edit is recomputed from both sides; give BASE and FT too")
    if base is not None and fine_tuned is None:
        raise SpecError("base: an edit is recomputed from both sides; give FT too")


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
        defaults = _mapping(top["defaults"][1], path, allowed, _check_list)
    if "jobs" not in top or not isinstance(top["jobs"][1], yaml.SequenceNode) or not top["jobs"][1].value:
        raise SpecError(f"{path}: 'jobs' must be a list of at least one job")
    jobs: list[Job] = []
    for node in top["jobs"][1].value:
        line = node.start_mark.line + 1
        command = _find_command(node, defaults)
        given = _mapping(node, path, JOB_KEYS, _check_list if command == "sweep" else _check_value)
        try:
            jobs.append(_job(given, defaults))
        except SpecError as error:
            raise SpecError(f"{path}:{line}: {error}") from None
    _refuse_twins(path, [job.name for job in jobs])
    _refuse_nested(path, [job.out for job in jobs if job.command in ("edit", "sweep")])
    wanted = list(only)
    for name in wanted:
        names = [job.name for job in jobs]
        if name not in names:
            raise SpecError(f"{path}: no job is named {printable(name)!r}{nearest(name, names)}")
    return [job for job in jobs if not wanted or job.name in wanted]


def _find_command(node: yaml.Node, defaults: Mapping[str, Any]) -> object:
    """The command of a job that is not read yet: it says which values are lists."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value.value for key, value in pairs if key.value == "command"), defaults.get("command", "edit"))


def _job(given: dict[str, Any], defaults: dict[str, Any]) -> Job:
    """A job of its own keys, all of which its command must take, and of those defaults that its command takes."""
    command = given.get("command", defaults.get("command", "edit"))
    if not isinstance(command, str) or command not in TAKES:
        hint = nearest(command, TAKES) if isinstance(command, str) else ""
        raise SpecError(f"command: {show(command)} is not one of {', '.join(TAKES)}{hint}")
    for key in given:
        if key not in TAKES[command]:
            takers = [name for name, keys in TAKES.items() if key in keys]
            raise SpecError(f"{key}: the command {command} does not take that; {' and '.join(takers)} may")
    values = merge_options({key: value for key, value in defaults.items() if key in TAKES[command]}, given)
    if command == "inspect":
        return _inspection(values, given)
    out = _text("out", values.get("out"))
    base, fine_tuned = (
        None if command == "verify" and values.get(key) is None else _text(key, values.get(key)) for key in SIDES
    )
    name = _text("name", values.get("name", out if command == "edit" else f"{command} {out}"))
    overwrite, fresh, full, card, private = (check_switch(key, values.get(key, False)) for key in SWITCHES)
    if command == "verify":
        check_verification(base, fine_tuned, full)
    publication = Publication(card, values.get("push_to_hub"), private)
    reports = Reports(**{key: values.get(key) for key in REPORT_KEYS})
    found = make_sweep(values) if command == "sweep" else None
    spec = found.grid.shared if found else EditSpec.from_given(_pick(values, EDIT_KEYS))
    return Job(name, command, base, fine_tuned, out, spec, overwrite, fresh, full, publication, reports, found)


def _inspection(values: dict[str, Any], given: Mapping[str, Any]) -> Job:
    """An output looked at where `out` is given, else a pair, all of its roles unless `layers` says otherwise."""
    out = values.get("out")
    stray = [key for key in given if key in (*SIDES, *LOOK_KEYS)]
    if out is not None and stray:
        raise SpecError(
            f"{stray[0]}: has no effect with out, whose manifest tells what was edited; give one of the two"
        )
    base, fine_tuned = (_text(key, values.get(key)) if out is None else None for key in SIDES)
    name = _text("name", values.get("name", f"inspect {out or fine_tuned}"))
    spec = EditSpec.from_mapping({"layers": ROLES, **_pick(values, LOOK_KEYS)})
    reports = Reports(**{key: values.get(key) for key in REPORT_KEYS})
    return Job(name, "inspect", base, fine_tuned, _text("out", out) if out is not None else "", spec, reports=reports)


def _pick(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _refuse_twins(path: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"{path}: two jobs have the name {printable(twice)!r}; each needs its own")


def _refuse_nested(path: Path, outs: list[str]) -> None:
    """Refuse outputs that are one folder, or one inside the other, however they are written."""
    found = sorted((Path(os.path.realpath(os.path.expanduser(out))).parts, out) for out in outs)
    for (outer, first), (inner, second) in zip(found, found[1:], strict=False):  # what lies inside sorts right behind
        if inner[: len(outer)] == outer:
            said = f"{printable(first)!r}" + (f" and {printable(second)!r}" if first != second else "")
            raise SpecError(f"{path}: two jobs have the out {said}; each needs a folder of its own")


def _text(key: str, value: object) -> str:
    if value is None or not isinstance(value, str):
        said = "missing" if value is None else "not a text"
        raise SpecError(f"{key}: {said}; a job needs base, fine_tuned and out")
    return check_text(key, value)


def _compose(path: Path) -> yaml.Node:
    try:
        with open(os.path.expanduser(path), "rb") as file:
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
        if key.value in found:
            raise SpecError(
                f"{path}:{key.start_mark.line + 1}: the variable {printable(key.value)!r} stands there twice"
            )
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


def _mapping(
    node: yaml.Node, path: Path, allowed: Iterable[str], check: Callable[[str, Any], object]
) -> dict[str, Any]:
    """A flat mapping of options as plain values, each option of edit checked alone, so that a message names its line;
    together they are checked later."""
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
            if key in EDIT_KEYS:
                check(key, value)
        except SpecError as error:
            raise SpecError(f"{path}:{line}: {error}{_explain_text(value, value_node)}") from None
        values[key] = value
    return values


def _check_value(key: str, value: Any) -> None:
    EditSpec(**{key: value, **({"rank": 1} if key == "rank_rule" and value == "fixed" else {})})


def _check_list(key: str, value: Any) -> None:
    if key in AXES and isinstance(value, (list, str)):
        make_grid({key: value, **({"rank": 1} if key == "rank_rule" else {})})
    else:
        _check_value(key, value)


def _explain_text(value: Any, node: yaml.Node) -> str:
    """YAML 1.1 has numbers with an exponent only where they have a dot and the exponent a sign."""
    if (
        isinstance(value, str)
        and getattr(node, "style", None) is None
        and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value)
    ):
        return "; YAML reads this as text; write 0.1 or 1.0e-1"
    return ""
