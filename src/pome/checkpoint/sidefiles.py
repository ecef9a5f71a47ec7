"""Side files of a checkpoint: what is copied beside the weights (tokenizer, configs, code) and what is left out."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from pome.checkpoint.hub import holds_stale_weights
from pome.checkpoint.source import ADAPTER_CONFIG, Checkpoint
from pome.errors import OutputError, printable

MANIFEST_NAME = "pome_manifest.json"

_TRAINING_FOLDER = re.compile(r"checkpoint-\d+|global_step\d+")
_TRAINING_FILE = re.compile(
    r"(optimizer|scheduler|rng_state|scaler).*\.(pt|pth|bin)|training_args\.bin|trainer_state\.json"
)
# What an adapter brings along that takes the place of BASE's.
_TOKENIZER = re.compile(
    r"(.*/)?(tokenizer.*|vocab\..*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.(model|tiktoken|jinja)|"
    r"spiece\..*|chat_template.*)"
)
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
        # All is BASE's but the adapter itself: what transformers finds of it in OUT it would apply once more.
        own, left = [file for file in own if file.name == ADAPTER_CONFIG], {}
        copied = [file for file in copied if file.name not in (ADAPTER_CONFIG, *adapter.files)]
    chosen = {file.name: file for file in own if _TOKENIZER.fullmatch(file.name)}
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
    """Files of FT to copy as they are; and those that are not copied, by name, each with its reason."""
    copied: list[SideFile] = []
    skipped = dict(ft.unused)
    if ft.folder is None:
        return copied, skipped
    for root, folders, names in os.walk(ft.folder, onerror=_refuse_walk):
        here = Path(root)
        below = here.relative_to(ft.folder)
        for folder in sorted(folders):
            reason = _NEVER.get(folder)
            if _TRAINING_FOLDER.fullmatch(folder):
                reason = "training state"
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
    if _TRAINING_FILE.fullmatch(name):
        return "training state", 0
    if holds_stale_weights(file.name, beside):
        return "weights in another format, which this edit does not change", 0
    try:
        info = os.stat(file.path)
    except OSError as error:
        raise OutputError(
            f"{printable(str(file.path))}: cannot be read: {error.strerror}; remove it or mend the link"
        ) from None
    return (None if stat.S_ISREG(info.st_mode) else "not a regular file"), info.st_size
