"""Checks of OUT: whether an output may be made there, and whether a run that was stopped had published it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pome.checkpoint.hashing import hash_file
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.errors import OutputError, printable
from pome.output.durable import as_output_error, clear_staging, read_object
from pome.output.lock import LOCK_NAME, take_lock

STAGING_SUFFIX, SWEEP_SUFFIX = ".pome-staging", ".pome-sweep"
SCORER_LOG = "scorer.log"
# All that ever lies in a staging folder: the run's own, the output before it is OUT, and a sweep's.
STAGED = {
    *(LOCK_NAME, "command", "journal", "output", "replaced", "publishing", "factors", "probe"),
    *("decompositions", "base", "workers", "scores.jsonl", "scores.new", SCORER_LOG),
}


def check_target(out: Path, inputs: Iterable[Path], overwrite: bool) -> Path:
    """The absolute path of OUT, if an output may be made there. Raises OutputError; writes nothing.

    `inputs` are folders and files that must outlive the run, wherever their links lead.
    """
    expanded = Path(os.path.expanduser(out))
    # As the system goes: `link/../out` is beside what the link leads to. The last name itself may be a link, which is
    # refused below.
    above, name = (expanded, "") if expanded.name == ".." else (expanded.parent, expanded.name)
    target = Path(os.path.realpath(above), name)
    folders = [staging_folder(target, suffix) for suffix in (STAGING_SUFFIX, SWEEP_SUFFIX)]
    real, *ours = (Path(os.path.realpath(path)) for path in (target, *folders))
    for given in inputs:
        source = Path(os.path.realpath(given))
        shown = printable(str(given), 1000)
        if real == source:
            raise OutputError(f"{printable(str(out))}: OUT is {shown}; choose a folder outside the inputs")
        if source in real.parents:
            raise OutputError(f"{printable(str(out))}: OUT lies inside {shown}; choose a folder outside the inputs")
        if not {real, *ours}.isdisjoint({source, *source.parents}):
            raise OutputError(f"{printable(str(out))}: OUT holds {shown}; choose a folder of its own")
    if out.suffix == ".safetensors":
        raise OutputError(f"{printable(str(out))}: OUT is a folder; give it a name without .safetensors")
    for folder in folders:
        _check_staging(folder)
    around = next((folder for folder in real.parents if (folder / MANIFEST_NAME).exists()), None)
    if around is not None:
        raise OutputError(f"{printable(str(out))}: OUT lies inside the output {printable(str(around))}; choose another")
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


def _check_staging(folder: Path) -> None:
    """Raise OutputError where a folder with a staging folder's name holds other files: a run would remove them."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(
            f"{printable(str(folder))}: is in the way, not a folder of pome; move it or choose another OUT"
        )
    unknown = sorted({path.name for path in folder.iterdir()} - STAGED) if folder.exists() else []
    if unknown:
        raise OutputError(
            f"{printable(str(folder))}: holds {printable(unknown[0])}, which pome did not put there; move it away or "
            "choose another OUT"
        )


def is_published(target: Path) -> bool:
    """Whether a run was stopped after OUT was in its place and before its staging folder was gone."""
    mark = read_object(staging_folder(target) / "publishing")
    try:
        return mark is not None and mark.get("manifest") == hash_file(target / MANIFEST_NAME)[1]
    except OSError:
        return False


def finish_published(target: Path, command: dict[str, Any]) -> bool:
    """Clear up after a run of `command` that was stopped when OUT was in its place; False where there was none.

    Raises OutputError if OUT is so left by another command.
    """
    if not is_published(target):
        return False
    folder = staging_folder(target)
    with as_output_error(folder):
        lock = take_lock(folder)
        try:
            mark = read_object(folder / "publishing")
            if mark is None or mark.get("command") != command:
                raise refuse_existing(target)
            clear_staging(folder)
        finally:
            lock.release()
    return True


def staging_folder(target: Path, suffix: str = STAGING_SUFFIX) -> Path:
    """Path of the staging folder of OUT, on the same file system."""
    return target.with_name(target.name + suffix)


def refuse_existing(out: Path) -> OutputError:
    return OutputError(f"{printable(str(out))}: exists; choose another OUT or give --overwrite to replace it")
