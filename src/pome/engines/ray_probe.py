"""Probe of a node, which must find the driver's files under the same paths, and its pome, torch and Python."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
Look = Callable[[list[str], str, str, str], Facts]


def make_look() -> Look:
    """The function that looks. It imports nothing of pome: a node that has another pome, or none, must answer too.

    A function that is made in another is sent as its code, not by its name.
    """

    def look(paths: list[str], folder: str, token: str, mark: str) -> dict[str, Any]:
        """Versions, what each path holds, the token found in `folder`; writes a file named `mark` there."""
        import hashlib
        import importlib.metadata
        import importlib.util
        import os
        import platform

        def describe_pome() -> str:
            spec = importlib.util.find_spec("pome")
            if spec is None or spec.origin is None:
                return "none"
            digest = hashlib.sha256()
            top = os.path.dirname(spec.origin)
            for root, folders, names in os.walk(top):
                folders.sort()
                for name in sorted(names):
                    if name.endswith(".py"):
                        with open(os.path.join(root, name), "rb") as file:
                            digest.update(os.path.relpath(file.name, top).encode() + b"\0" + file.read())
            return f"sources {digest.hexdigest()[:12]}"

        def describe_torch() -> str:
            try:
                return importlib.metadata.version("torch")
            except importlib.metadata.PackageNotFoundError:
                return "none"

        def describe_file(path: str) -> list[Any] | str:
            try:
                with open(path, "rb") as file:
                    info = os.fstat(file.fileno())
                    ends = os.pread(file.fileno(), 65536, 0)
                    ends += os.pread(file.fileno(), 65536, max(0, info.st_size - 65536))
            except OSError as error:
                return error.strerror or str(error)
            return [info.st_size, info.st_mtime_ns, hashlib.sha256(ends).hexdigest()]

        def find_token() -> str:
            try:
                with open(os.path.join(folder, "token"), encoding="ascii") as file:
                    found = file.read()
                with open(os.path.join(folder, mark), "x", encoding="ascii") as file:
                    file.write(token)
            except (OSError, ValueError) as error:
                return f"error: {getattr(error, 'strerror', None) or error}"
            return found

        return {
            "Python": platform.python_version(),
            "torch": describe_torch(),
            "pome": describe_pome(),
            "files": {path: describe_file(path) for path in paths},
            "token": find_token() if folder else token,
        }

    return look


def find_difference(node: str, here: Facts, there: Facts, folder: str, mark: str) -> str | None:
    """What a node finds otherwise than the driver, in one message with the remedy; None where it finds the same."""
    for what in ("Python", "torch", "pome"):
        if there[what] != here[what]:
            remedy = f"install the same {what} there, and start Ray from that environment"
            return f"node {node} has another {what} ({there[what]}; here {here[what]}); {remedy}"
    shared = "BASE, FT and OUT must lie on storage that all nodes share, under the same path"
    for path, mine in here["files"].items():
        theirs = there["files"][path]
        if isinstance(theirs, str):
            return f"node {node} cannot read {path}: {theirs}; {shared}{_advise(path)}"
        if theirs != mine:
            what = "size" if theirs[0] != mine[0] else "content" if theirs[2] != mine[2] else "time of change"
            return f"node {node} sees another file as {path} (its {what} differs); {shared}{_advise(path)}"
    if there["token"] != here["token"] or (folder and not (Path(folder) / mark).is_file()):
        said = (
            there["token"].removeprefix("error: ") if there["token"].startswith("error: ") else "it is another folder"
        )
        return f"node {node} does not share the folder {folder}: {said}; {shared}{_advise(folder)}"
    return None


def _advise(path: str) -> str:
    """What to do about a path that is known not to be shared."""
    if Path(tempfile.gettempdir()).resolve() in Path(path).resolve().parents:
        return f" ({tempfile.gettempdir()} is a temporary folder of one machine)"
    if "snapshots" in Path(path).parts:
        return " (for models of the Hub: set HF_HOME to a folder there)"
    return ""
