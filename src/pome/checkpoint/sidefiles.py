"""Side files of a checkpoint: those copied beside the weights (tokenizer, configs, code) and those left out."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from pome.checkpoint.files import LocalFile, read_header
from pome.checkpoint.leftovers import ADAPTER_CONFIG, PICKLED, TRAINING, find_leftover, is_training_folder
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, OutputError, printable

MANIFEST_NAME = "pome_manifest.json"

# What an adapter brings along that takes the place of BASE's.
_TOKENIZER = re.compile(
    r"(.*/)?(tokenizer.*|vocab\..*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.(model|tiktoken|jinja)|"
    r"spiece\..*|chat_template.*)"
)
_TRAINED = (*PICKLED, ".safetensors", ".npz")
_NEVER = {".git": "version control", ".cache": "a download cache", MANIFEST_NAME: "the manifest of an earlier edit"}


@dataclass(frozen=True)
class SideFile:
    """A file of FT that is no weight file: its path below the folder, and where its bytes are."""

    name: str
    path: Path
    size: int


def list_adapted_side_files(base: Checkpoint, adapter: Checkpoint) -> tuple[list[SideFile], dict[str, str]]:
    """Files for a base with an adapter merged in: BASE's, and in their place the adapter's tokenizer and templates.

    And those of the adapter that are not copied, by name, each with its reason.
    """
    copied, skipped = _list_outside(base, adapter)
    own, left = _list_outside(adapter, base)
    if base.folder is not None and adapter.folder is not None and base.folder.samefile(adapter.folder):
        # BASE's files without those of an adapter: transformers would apply an adapter in OUT once more.
        own, left = [file for file in own if file.name == ADAPTER_CONFIG], {}
        copied = [file for file in copied if file.name not in (ADAPTER_CONFIG, *adapter.files)]
    chosen = {file.name: file for file in own if _TOKENIZER.fullmatch(file.name)}
    # What was trained beside the adapter, such as a projector or a value head, is needed with the merged model too.
    chosen |= {file.name: file for file in own if file.name.endswith(_TRAINED) and file.name not in chosen}
    for file in own:
        if file.name not in chosen:
            left[file.name] = (
                "the adapter's config; its changes are in the weights"
                if file.name == ADAPTER_CONFIG
                else "of the adapter, and not its tokenizer"
            )
    kept = [file for file in copied if file.name not in chosen]
    return [*kept, *chosen.values()], {**skipped, **left}


def _list_outside(side: Checkpoint, other: Checkpoint) -> tuple[list[SideFile], dict[str, str]]:
    """The files of one side, as `list_side_files` has them, without the other's folder where that lies inside."""
    copied, skipped = list_side_files(side)
    here, there = (one.folder.resolve() if one.folder else None for one in (side, other))
    if here is None or there is None or here not in there.parents:
        return copied, skipped
    inner = f"{there.relative_to(here)}/"
    skipped = {name: reason for name, reason in skipped.items() if not name.startswith(inner)}
    return [file for file in copied if not file.name.startswith(inner)], {**skipped, inner: "the folder of an input"}


def list_side_files(ft: Checkpoint) -> tuple[list[SideFile], dict[str, str]]:
    """Files of FT to copy as they are; and the files not copied, by name, each with its reason."""
    copied: list[SideFile] = []
    skipped = dict(ft.unused)
    if ft.folder is None:
        return copied, skipped
    for root, folders, names in os.walk(ft.folder, onerror=_refuse_walk):
        here = Path(root)
        below = here.relative_to(ft.folder)
        for folder in sorted(folders):
            reason = _NEVER.get(folder)
            if is_training_folder(folder):
                reason = TRAINING
            if (here / folder).is_symlink():
                reason = "a symbolic link to a folder"
            if reason:
                skipped[f"{below / folder}/"] = reason
                folders.remove(folder)
        folders.sort()
        for name in sorted(names):
            relative = str(below / name)
            if relative in ft.files or relative in ft.unused:
                continue
            file = SideFile(relative, here / name, 0)
            reason, size = _find_reason_to_skip(file, names)
            if reason:
                skipped[relative] = reason
            else:
                copied.append(SideFile(relative, file.path, size))
    return copied, skipped


def _refuse_walk(error: OSError) -> None:
    raise OutputError(f"{error.filename}: cannot be listed: {error.strerror}")


def _find_reason_to_skip(file: SideFile, beside: list[str]) -> tuple[str | None, int]:
    name = file.path.name
    if name in _NEVER:
        return _NEVER[name], 0
    leftover = find_leftover(file.name, beside)
    if leftover:
        return leftover, 0
    try:
        info = os.stat(file.path)
    except OSError as error:
        raise OutputError(
            f"{printable(str(file.path))}: cannot be read: {error.strerror}; remove it or mend the link"
        ) from None
    return (None if stat.S_ISREG(info.st_mode) else "not a regular file"), info.st_size


def describe_trained_beside(adapter: Checkpoint, copied: list[SideFile]) -> list[str]:
    """Notices of weights beside an adapter, which its merge does not hold."""
    if adapter.folder is None:
        return []
    names = [f.name for f in copied if f.path.is_relative_to(adapter.folder) and f.name.endswith(_TRAINED)]
    return [
        f"{printable(adapter.source)}/{printable(name)}: was trained beside the adapter; it is copied as it is, not "
        "merged into the weights"
        for name in names
    ]


def describe_repeats(weights: Checkpoint, copied: list[SideFile]) -> list[str]:
    """Notices of files in folders below that hold tensors of the checkpoint's names once more, with their sizes."""
    notices = []
    for file in copied:
        if not file.name.endswith(".safetensors") or "/" not in file.name:
            continue
        try:
            opened = LocalFile(file.path)
            try:
                shared = len(read_header(opened).tensors.keys() & weights.tensors.keys())
            finally:
                opened.close()
        except (CheckpointError, OSError):
            continue  # whatever it is, it is copied
        if shared:
            notices.append(
                f"{printable(weights.source)}/{printable(file.name)}: repeats {shared} tensors of the checkpoint in "
                f"{file.size} bytes; it is copied as it is, not edited. Move it away if it is an older save"
            )
    return notices
