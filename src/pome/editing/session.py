"""An open pair: BASE and FT with their plan, and what is copied beside the weights."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pome
from pome.checkpoint.files import CHANGED
from pome.checkpoint.sidefiles import (
    describe_repeats,
    describe_trained_beside,
    list_adapted_side_files,
    list_side_files,
)
from pome.checkpoint.source import Checkpoint, open_checkpoint
from pome.config.spec import EditSpec
from pome.editing.ties import describe_ties, keep_ties
from pome.errors import CheckpointError, PairingError, printable
from pome.output.copying import CONFIG, Template, describe_config, make_config
from pome.planning.devices import Device
from pome.planning.estimate import Estimate, Files, estimate_plan
from pome.planning.plan import check_overrides, make_plan
from pome.planning.rates import Rates
from pome.planning.selection import Selection
from pome.planning.units import Plan
from pome.roles.roles import find_layout

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Opened:
    """Both sides of an edit, open, with the plan and the files that the output begins as."""

    base: Checkpoint
    ft: Checkpoint
    plan: Plan
    template: Template
    not_copied: dict[str, str]  # files that are left out, and why
    beside: dict[Path, list[int]]  # what is read or copied beside the weights: size in bytes and time in ns
    notices: tuple[str, ...]  # what a user should know before the work begins

    def to_json(self) -> dict[str, Any]:
        """The document of `--dry-run --json`."""
        return {**self.plan.to_json(), "not_copied": self.not_copied, "notices": list(self.notices)}

    def count_files(self) -> Files:
        """Bytes of the files of the output, and of all that is hashed: those, and what is read of BASE and FT."""
        template = self.template
        sizes = {name: file.header.file_size for name, file in template.weights.files.items()}
        sizes |= {name: header.file_size for name, (_, header) in template.layouts.items()}
        sizes |= {file.name: file.size for file in template.side_files}
        copied = sum(sizes.values())
        return Files(copied, copied + sum(path.stat().st_size for found in self.find_read() for path in found.values()))

    def estimate(self, spec: EditSpec, device: Device, rates: Rates | None, planning_seconds: float) -> Estimate:
        """What the edit would cost on a device; `planning_seconds` is what opening this pair took."""
        return estimate_plan(self.plan, spec, self.count_files(), device, rates, planning_seconds)

    def list_inputs(self) -> list[Path]:
        """Every folder and file that is an input, as given and as found."""
        sides = (self.base, self.ft)
        given = [Path(os.path.expanduser(side.source)) for side in sides] + [
            side.folder for side in sides if side.folder
        ]
        stored = [weights.file.stored for side in sides for weights in side.files.values() if weights.file.stored]
        return [*given, *stored, *self.beside]

    def find_read(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Files on this machine that are read or copied of BASE and of FT, by their names in the manifest."""
        found = []
        for side in (self.base, self.ft):
            paths = {name: weights.file.stored for name, weights in side.files.items() if weights.file.stored}
            paths |= {path.name: path for path in side.companions}
            folder = side.folder
            copied = [f for f in self.template.side_files if folder is not None and f.path.is_relative_to(folder)]
            found.append(paths | {file.name: file.path for file in copied})
        return found[0], found[1]

    def fingerprint(self) -> str:
        """A digest of what the system says of all files that are read or copied, and of the commits on the Hub.

        It stays the same while none of them is written to or replaced. A changed digest does not prove a change.
        """
        said: list[Any] = [[side.source, side.revision] for side in (self.base, self.ft)]
        for side, paths in zip((self.base, self.ft), self.find_read(), strict=True):
            for name, path in sorted(paths.items()) if not side.on_hub else []:
                info = path.stat()
                where = str(path.resolve())
                said.append([name, where, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns])
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file that was read or copied is no longer what it was."""
        for side in (self.base, self.ft):
            side.check_unchanged()
        for path, before in self.beside.items():
            if _identify(path) != before:
                raise CheckpointError(f"{printable(str(path))}: {CHANGED}")


@contextlib.contextmanager
def open_pair(
    base: Source, ft: Source, spec: EditSpec, *, whole: bool = False, whole_base: bool = False
) -> Iterator[Opened]:
    """Open BASE and FT and plan the edit: headers, configs and file names only. Raises PomeError.

    `whole` fetches all files of an FT on the Hub, which writing an output needs and planning does not; of BASE too
    where FT is an adapter, or with `whole_base`.
    """
    with contextlib.ExitStack() as stack:
        tuned = open_checkpoint(ft, whole=whole, dequantize=spec.dequantize)
        stack.callback(tuned.close)
        merges = tuned.adapter_config is not None and spec.out_format == "full"
        pretrained = open_checkpoint(base, whole=whole_base or (whole and merges), dequantize=spec.dequantize)
        stack.callback(pretrained.close)
        sides = [pretrained, tuned]
        identities = [[weights.file.identity for weights in side.files.values()] for side in sides]
        if identities[0] == identities[1]:
            raise PairingError(
                f"{printable(sides[1].source)}: BASE and FT are the same files; give the pretrained checkpoint first, "
                "then the one that was trained from it"
            )
        plan = plan_pair(pretrained, tuned, spec)
        side_files, not_copied = list_adapted_side_files(*sides) if merges else list_side_files(tuned)
        paths = [file.path for file in side_files] + [path for side in sides for path in side.companions]
        beside = {path: _identify(path) for path in paths}
        weights = pretrained if merges else tuned
        template = Template(weights, plan.layouts, side_files, make_config(weights, spec.dtype if plan.layouts else ""))
        notices = [*pretrained.notices, *tuned.notices, *describe_ties(plan), *describe_repeats(weights, side_files)]
        if plan.layouts:
            notices += describe_config(weights, spec.dtype, any(file.name == CONFIG for file in side_files))
        if tuned.adapter_config is not None:
            notices += describe_trained_beside(tuned, side_files)
        yield Opened(
            pretrained, tuned, plan, template, not_copied, beside, tuple(dict.fromkeys([*notices, *plan.notes]))
        )


def plan_pair(base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> Plan:
    """The plan of an edit, checked. Raises PomeError, also where an index is wrong about a selected tensor."""
    plan = make_plan(base, ft, spec)
    check_overrides(plan, spec)
    _refuse_misplaced(plan, base, ft, spec)
    methods = {spec.method, *(override.options.get("method") for override in spec.overrides)}
    return replace(keep_ties(plan, base, ft, spec), by_equivalence="equivalence" in methods)


def _refuse_misplaced(plan: Plan, base: Checkpoint, ft: Checkpoint, spec: EditSpec) -> None:
    """Raise CheckpointError where an index misplaces a selected tensor, or names one that no file holds."""
    selection = Selection(spec)
    for side in (ft, base):
        edited = {unit.name if side is ft else unit.base_name for unit in plan.units if unit.parts}
        for name, said in side.misplaced.items():
            lost = name not in side.tensors and selection.match(name, (2, 2), find_layout(name, (2, 2), side.config))
            if name in edited or lost:
                raise CheckpointError(
                    f"{printable(side.source)}/{side.index}: {said}, and it is selected; copy or download the "
                    "checkpoint again, or leave it out with --exclude"
                )


def _identify(path: Path) -> list[int]:
    """Size and time of a file as it is now. Raises CheckpointError."""
    try:
        info = path.stat()
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))}: cannot be read: {error.strerror}") from None
    return [info.st_size, info.st_mtime_ns]


def describe_command(opened: Opened, spec: EditSpec) -> dict[str, Any]:
    """Identity of a run: the options, the inputs as they are now, and the versions that decide the bits."""
    command: dict[str, Any] = {"pome": pome.__version__, "torch": importlib.metadata.version("torch")}
    command |= spec.to_mapping()
    for name, side in (("base", opened.base), ("fine_tuned", opened.ft)):
        command[name] = [weights.file.identity for weights in side.files.values()]
    fetched = [side.folder for side in (opened.base, opened.ft) if side.folder is not None and side.on_hub]
    command["side_files"] = [
        # A commit's files never change, though the cache may fetch them at another time.
        [str(path.resolve()), size, 0 if any(path.is_relative_to(folder) for folder in fetched) else time]
        for path, (size, time) in opened.beside.items()
    ]
    return command
