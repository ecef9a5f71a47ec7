"""An open pair: BASE and FT with their plan, and what is copied beside the weights."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pome
from pome.checkpoint.files import CHANGED
from pome.checkpoint.sidefiles import list_adapted_side_files, list_side_files
from pome.checkpoint.source import Checkpoint, open_checkpoint
from pome.config.spec import EditSpec
from pome.errors import CheckpointError, PairingError, printable
from pome.output.copying import Template
from pome.planning.plan import check_overrides, make_plan
from pome.planning.units import Plan

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

    def list_inputs(self) -> list[Path]:
        """Every folder and file that is an input, as given and as found."""
        sides = (self.base, self.ft)
        given = [Path(os.path.expanduser(side.source)) for side in sides] + [
            side.folder for side in sides if side.folder
        ]
        stored = [weights.file.stored for side in sides for weights in side.files.values() if weights.file.stored]
        return [*given, *stored, *self.beside]

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
        plan = make_plan(sides[0], sides[1], spec)
        check_overrides(plan, spec)
        side_files, not_copied = list_adapted_side_files(*sides) if merges else list_side_files(tuned)
        paths = [file.path for file in side_files] + [path for side in sides for path in side.companions]
        beside = {path: _identify(path) for path in paths}
        template = Template(pretrained if merges else tuned, plan.layouts, side_files)
        yield Opened(pretrained, tuned, plan, template, not_copied, beside)


def _identify(path: Path) -> list[int]:
    """Size and time of a file as it is now. Raises CheckpointError."""
    try:
        info = path.stat()
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))}: cannot be read: {error.strerror}") from None
    return [info.st_size, info.st_mtime_ns]


def describe_command(opened: Opened, spec: EditSpec) -> dict[str, Any]:
    """What makes two runs the same run: the options, the inputs as they are now, and the versions that fix the bits."""
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
