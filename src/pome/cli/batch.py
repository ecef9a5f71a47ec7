"""Batches of jobs: a YAML file to jobs of the commands, all of them checked before the first is run. No torch."""

from __future__ import annotations

import abc
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from pome.cli.commands import list_job_kinds, load_command
from pome.cli.console import complain, describe_error
from pome.config.conflicts import merge_options
from pome.config.options import check_text, list_options, nearest, show
from pome.config.spec import check_alone
from pome.config.yaml_text import fill_in_variables, read_keys, read_options, read_yaml
from pome.errors import PomeError, SpecError, printable

if TYPE_CHECKING:
    from rich.console import Console

SIDES = ("base", "fine_tuned")
ANY_KEYS = ("name", "command", *SIDES, "out")


@dataclass(frozen=True)
class Job(abc.ABC):
    """One line of work of a batch file; each command has its own kind, which holds the options of that command.

    `base` and `fine_tuned` may be None for `verify`; for `inspect` they are, or `out` is empty: it looks at an output,
    or at a pair. `writes` says that OUT is made by the job.
    """

    writes: ClassVar[bool] = False
    name: str
    command: str
    base: str | None
    fine_tuned: str | None
    out: str

    @staticmethod
    def check(key: str, value: Any) -> None:
        """Raise SpecError for a value of an option that is wrong whatever stands beside it."""
        check_alone(key, value)

    @classmethod
    @abc.abstractmethod
    def read(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> Job:
        """A job from its keys and the defaults that its command takes; `given` are its own keys."""

    @abc.abstractmethod
    def run(self, console: Console) -> dict[str, Any]:
        """Do the work and tell people; returns what the summary says of it."""

    @property
    def engine(self) -> str:
        """Where its matrices are worked on."""
        return "local"

    def begin(self) -> dict[str, Any]:
        """The part of the summary that is known before the job runs."""
        return {"name": self.name, "command": self.command, "out": self.out, "seconds": 0.0}

    @property
    def folder(self) -> Path:
        """OUT, with `~` written out."""
        return Path(os.path.expanduser(self.out))


def run_job(job: Job, console: Console) -> dict[str, Any]:
    """Run one job; an error of it is told and becomes its result."""
    begun = time.monotonic()
    result = job.begin()
    try:
        result |= job.run(console)
    except (PomeError, OSError, MemoryError) as error:
        complain(f"{job.name}: {describe_error(error)}")
        result |= {"status": "failed", "error": describe_error(error)}
    result["seconds"] = round(time.monotonic() - begun, 3)
    return result


def list_job_keys(command: str) -> tuple[str, ...]:
    """The keys that a job of a command may have."""
    return (*ANY_KEYS, *list_options(load_command(command).TAKES, command))


def read_job_text(values: Mapping[str, Any], key: str) -> str:
    """A key that a job must have."""
    value = values.get(key)
    if value is None or not isinstance(value, str):
        said = "missing" if value is None else "not a text"
        raise SpecError(f"{key}: {said}; a job needs base, fine_tuned and out")
    return check_text(key, value)


def read_sides(values: Mapping[str, Any]) -> tuple[str, str, str]:
    """(base, fine_tuned, out) of a job that writes an output."""
    base, fine_tuned, out = (read_job_text(values, key) for key in (*SIDES, "out"))
    return base, fine_tuned, out


def read_name(values: Mapping[str, Any], otherwise: str) -> str:
    return read_job_text({"name": values.get("name", otherwise)}, "name")


def read_batch(path: Path, only: Iterable[str] = (), variables: Mapping[str, str] | None = None) -> list[Job]:
    """The jobs of a batch file, all of them checked before the first is run; `only` keeps those named.

    `variables` take the place of those in the file, whose `${name}` stand in its texts.
    """
    root = read_yaml(path)
    top = read_keys(root, path, ("variables", "defaults", "jobs"))
    fill_in_variables(root, top.get("variables"), path, variables or {})
    kinds = list_job_kinds()
    keys = tuple(dict.fromkeys(key for command in kinds for key in list_job_keys(command)))
    defaults: dict[str, Any] = {}
    if "defaults" in top:
        allowed = tuple(key for key in keys if key not in ("name", "out"))
        defaults = read_options(top["defaults"][1], path, allowed, _check_default)
    if "jobs" not in top or not isinstance(top["jobs"][1], yaml.SequenceNode) or not top["jobs"][1].value:
        raise SpecError(f"{path}: 'jobs' must be a list of at least one job")
    jobs: list[Job] = []
    for node in top["jobs"][1].value:
        line = node.start_mark.line + 1
        command = _find_command(node, defaults)
        given = read_options(node, path, keys, kinds.get(command, Job).check)
        try:
            jobs.append(_read_job(given, defaults))
        except SpecError as error:
            raise SpecError(f"{path}:{line}: {error}") from None
    _refuse_twins(path, [job.name for job in jobs])
    _refuse_nested(path, [job.out for job in jobs if job.writes])
    wanted = list(only)
    for name in wanted:
        names = [job.name for job in jobs]
        if name not in names:
            raise SpecError(f"{path}: no job is named {printable(name)!r}{nearest(name, names)}")
    return [job for job in jobs if not wanted or job.name in wanted]


def _check_default(key: str, value: Any) -> None:
    """Raise SpecError for a default that no command could take, as for a list where none takes a list."""
    errors = []
    for kind in list_job_kinds().values():
        try:
            return kind.check(key, value)
        except SpecError as error:
            errors.append(error)
    raise errors[0]


def _find_command(node: yaml.Node, defaults: Mapping[str, Any]) -> Any:
    """The command of a job that is not read yet: it says which values are lists."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value.value for key, value in pairs if key.value == "command"), defaults.get("command", "edit"))


def _read_job(given: dict[str, Any], defaults: dict[str, Any]) -> Job:
    """A job from its own keys, all of which its command must take, and from the defaults that its command takes."""
    command = given.get("command", defaults.get("command", "edit"))
    kinds = list_job_kinds()
    if not isinstance(command, str) or command not in kinds:
        hint = nearest(command, kinds) if isinstance(command, str) else ""
        raise SpecError(f"command: {show(command)} is not one of {', '.join(kinds)}{hint}")
    keys = list_job_keys(command)
    for key in given:
        if key not in keys:
            takers = [name for name in kinds if key in list_job_keys(name)]
            raise SpecError(f"{key}: the command {command} does not take that; {' and '.join(takers)} may")
    values = merge_options({key: value for key, value in defaults.items() if key in keys}, given)
    return kinds[command].read(values, given)


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
