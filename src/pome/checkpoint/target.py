"""OUT before and after a run: whether it may be made, and whether it is there already. Writes nothing into it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pome.checkpoint.clone import hash_file
from pome.checkpoint.disk import clear_staging, explain, read_object
from pome.checkpoint.lock import take_lock
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.errors import OutputError, printable

STAGING_SUFFIX = ".pome-staging"


def check_target(out: Path, inputs: Iterable[Path], overwrite: bool) -> Path:
    """The absolute path of OUT, if an output may be made there. Raises OutputError; writes nothing.

    `inputs` are folders and files that must outlive the run, wherever their links lead.
    """
    target = Path(os.path.abspath(out.expanduser()))
    real, staging = (Path(os.path.realpath(path)) for path in (target, staging_folder(target)))
    for given in inputs:
        source = Path(os.path.realpath(given))
        shown = printable(str(given), 1000)
        if real == source or source in real.parents:
            raise OutputError(f"{printable(str(out))}: OUT lies inside {shown}; choose a folder outside the inputs")
        if {real, staging} & {source, *source.parents}:
            raise OutputError(f"{printable(str(out))}: OUT holds {shown}; choose a folder of its own")
    if out.suffix == ".safetensors":
        raise OutputError(f"{printable(str(out))}: OUT is a folder; give it a name without .safetensors")
    if target.is_symlink():
        raise OutputError(f"{printable(str(out))}: is a symbolic link; give the folder that it should be")
    if target.exists():
        if not overwrite and not is_published(target):
            raise refuse_existing(out)
        here = Path(os.path.realpath("."))
        inside = real in (here, *here.parents)
        if not target.is_dir() or os.path.ismount(target) or inside:
            what = "the working folder or above it" if inside else "no folder of its own"
            raise OutputError(f"{printable(str(out))}: is {what} and is not replaced; choose another OUT")
    return target


def is_published(target: Path) -> bool:
    """Whether a run was stopped after OUT was in its place and before its staging folder was gone."""
    mark = read_object(staging_folder(target) / "publishing")
    try:
        return mark is not None and mark["manifest"] == hash_file(target / MANIFEST_NAME, lambda _: None)[1]
    except OSError:
        return False


def finish_published(target: Path, command: dict[str, Any]) -> bool:
    """Clear up after a run of `command` that was stopped when OUT was in its place; False where there was none.

    Raises OutputError if OUT is so left by another command.
    """
    if not is_published(target):
        return False
    folder = staging_folder(target)
    with explain(folder):
        lock = take_lock(folder)
        try:
            mark = read_object(folder / "publishing")
            if mark is None or mark["command"] != command:
                raise refuse_existing(target)
            clear_staging(folder)
        finally:
            lock.release()
    return True


def staging_folder(target: Path) -> Path:
    """Where OUT is made, on the same file system."""
    return target.with_name(target.name + STAGING_SUFFIX)


def refuse_existing(out: Path) -> OutputError:
    return OutputError(f"{printable(str(out))}: exists; choose another OUT or give --overwrite to replace it")
