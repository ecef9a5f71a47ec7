"""Both sides open and planned, and the output's files before any edit: what every main job begins with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pome
from pome.checkpoint.files import CHANGED
from pome.checkpoint.sidefiles import SideFile, list_adapted_side_files, list_side_files
from pome.checkpoint.source import Checkpoint, open_checkpoint
from pome.config.spec import EditSpec
from pome.errors import CheckpointError, PairingError, printable
from pome.output.staging import Staging, update_index
from pome.planning.plan import check_overrides, make_plan
from pome.planning.units import Plan

Source = str | os.PathLike[str]


class Progress:
    """What a run tells while it works. Tasks are `copy`, `edit` and `hash`; subclass and override what you show."""

    def begin(self, plan: Plan, ft: Checkpoint, devices: list[str], resumed: int) -> None:
        """The plan stands, nothing is written yet; `resumed` units were finished by an earlier run."""

    def note(self, text: str) -> None:
        """Something that a user should know of the inputs, found by reading them."""

    def start(self, task: str, total: int) -> None:
        """A task of `total` bytes (`copy`, `hash`) or units (`edit`) begins."""

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "") -> None:
        """`amount` more of the task is done, which moved `nbytes` bytes; `note` says what was worked on."""

    def finish(self, task: str) -> None:
        """The task is done."""


@dataclass(frozen=True)
class Opened:
    """Both sides open, the plan made, and the files that go along."""

    base: Checkpoint
    ft: Checkpoint
    plan: Plan
    side_files: list[SideFile]
    not_copied: dict[str, str]
    template: Checkpoint  # whose weight files the output begins as: FT, or BASE where FT is an adapter merged into it
    beside: dict[Path, list[int]]  # what is read or copied beside the weights, and its size and time

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
        template = pretrained if merges else tuned
        paths = [file.path for file in side_files] + [path for side in sides for path in side.companions]
        beside = {path: _identify(path) for path in paths}
        yield Opened(pretrained, tuned, plan, side_files, not_copied, template, beside)


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
    fetched = [side.folder for side in (opened.base, opened.ft) if side.folder is not None and side.revision]
    command["side_files"] = [
        # A commit's files never change, though the cache may fetch them at another time.
        [str(path.resolve()), size, 0 if any(path.is_relative_to(folder) for folder in fetched) else time]
        for path, (size, time) in opened.beside.items()
    ]
    return command


def count_space(opened: Opened, staging: Staging) -> tuple[int, Path | None]:
    """Bytes still to be copied, and a file to try sharing with."""
    layouts = opened.plan.layouts
    sizes = {name: file.header.file_size for name, file in opened.template.files.items()}
    sizes |= {name: header.file_size for name, (_, header) in layouts.items()}
    sizes |= {file.name: file.size for file in opened.side_files}
    shared = None if layouts else next(iter(opened.template.files.values())).file.path
    return sum(size for name, size in sizes.items() if name not in staging.copied), shared


def copy_files(opened: Opened, staging: Staging, progress: Progress) -> None:
    """Fill the staging folder with FT's files (BASE's where FT is an adapter).

    They are cloned as they are, or laid out anew where a dtype changes.
    """
    layouts = opened.plan.layouts
    source = opened.template
    total = sum(file.header.file_size for file in source.files.values())
    advance = count_up(progress, "copy")
    progress.start("copy", total + sum(file.size for file in opened.side_files))
    for name, weights in source.files.items():
        if source.dequantized and not weights.header.tensors:
            continue  # a shard of scales alone, which no index would name
        if name in layouts:
            raw, header = layouts[name]
            staging.lay_out(name, weights.file, weights.header, raw, header, advance)
        elif weights.file.path is None:
            staging.write_file(name, weights.file, advance)
        else:
            staging.copy_file(name, weights.file.path, advance)
    for file in opened.side_files:
        if file.name == "config.json" and source.dequantized:
            config = {key: value for key, value in (source.config or {}).items() if key != "quantization_config"}
            staging.put_file(file.name, (json.dumps(config, indent=2) + "\n").encode())
        else:
            staging.copy_file(file.name, file.path, advance)
    if source.index is not None and source.folder is not None:
        index = source.folder / source.index
        if layouts or source.dequantized:
            headers = {name: weights.header for name, weights in source.files.items()}
            headers |= {name: header for name, (_, header) in layouts.items()}
            size = sum(header.file_size - header.data_start for header in headers.values())
            staging.put_file(source.index, update_index(index.read_bytes(), size, source.dequantized))
        else:
            staging.copy_file(source.index, index, advance)
    progress.finish("copy")


def count_up(progress: Progress, task: str) -> Callable[[int], None]:
    """What tells `progress` of so many more bytes of a task."""
    return lambda amount: progress.advance(task, amount, amount)
