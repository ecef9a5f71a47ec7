"""Fingerprints of files in a folder, to undo what somebody else did there. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from pome.output.durable import as_output_error

Fingerprints = dict[str, tuple[int, int, int]]  # path below a folder -> inode, size in bytes and time in ns


def take_fingerprints(folder: Path) -> Fingerprints:
    """Fingerprints of all files and links below a folder: they change when somebody writes or replaces one."""
    found = {}
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for path in (Path(root, name) for name in (*names, *links)):
            info = path.lstat()
            found[str(path.relative_to(folder))] = info.st_ino, info.st_size, info.st_mtime_ns
    return found


def remove_changed(folder: Path, before: Fingerprints) -> set[str]:
    """Remove every file that is new or not as `before`, and empty folders; the names of the files of `before` that
    are gone now. Raises OutputError."""
    with as_output_error(folder):
        now = take_fingerprints(folder)
        same = {name for name, mark in now.items() if before.get(name) == mark}
        for name in now.keys() - same:
            (folder / name).unlink()
        for root, _, _ in os.walk(folder, topdown=False):
            if root != str(folder) and not os.listdir(root):
                os.rmdir(root)
    return before.keys() - same
