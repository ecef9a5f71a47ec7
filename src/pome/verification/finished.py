"""Outputs that an earlier run finished, which a batch need not make again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pome.checkpoint.hashing import hash_file
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.config.extraction import read_spec
from pome.config.spec import EditSpec
from pome.editing.session import Opened, Source, open_pair
from pome.errors import PomeError
from pome.manifest import CHECKSUM, INPUTS, FileRecord, Manifest, SideRecord, read_manifest
from pome.output.card import CARD_NAME


def find_finished(out: Path, base: Source, ft: Source, spec: EditSpec, card: bool) -> Manifest | None:
    """The manifest of `out` if this edit made it of these inputs as they are now, and it is whole; else None.

    With `card`, an output without a model card is not what was asked for.
    """
    return _find(out, base, ft, card, lambda made: made.sweep is None and made.spec == spec.to_mapping())


def find_swept(out: Path, base: Source, ft: Source, sweep: dict[str, Any], card: bool) -> Manifest | None:
    """The same for the best of a sweep; `sweep` has its scorer and its grid, as the manifest records them."""
    return _find(out, base, ft, card, lambda made: made.sweep is not None and sweep.items() <= made.sweep.items())


def _find(out: Path, base: Source, ft: Source, card: bool, is_it: Callable[[Manifest], bool]) -> Manifest | None:
    try:
        manifest = read_manifest(out / MANIFEST_NAME)
        same = (manifest.base.source, manifest.fine_tuned.source) == (os.fspath(base), os.fspath(ft))
        if not same or not is_it(manifest) or manifest.timing.get(CHECKSUM) != manifest.checksum():
            return None
        # Sizes, not hashes: a batch asks this at every start and must not read every output. `verify` reads them.
        if any((out / name).stat().st_size != record.bytes for name, record in manifest.files.items()):
            return None
        copied = {**manifest.base.files, **manifest.fine_tuned.files}
        if card and manifest.files.get(CARD_NAME) in (None, copied.get(CARD_NAME)):
            return None
        with open_pair(base, ft, read_spec(manifest.spec)) as opened:
            if not _are_same_inputs(opened, manifest):
                return None
    except (PomeError, OSError, KeyError, ValueError, TypeError):
        return None  # it is not finished, for whatever reason; making it again reports the fault
    return manifest


def _are_same_inputs(opened: Opened, manifest: Manifest) -> bool:
    """Whether every file that an edit would read or copy now is the one that the manifest records, and no other is.

    Files of which the system says the same as then are not read. The others are hashed: a copy of an older file has
    an older time, and may have the same size.
    """
    sides = (opened.base, manifest.base), (opened.ft, manifest.fine_tuned)
    if any(side.revision != record.revision for side, record in sides):
        return False
    if opened.fingerprint() == manifest.timing.get(INPUTS):
        return True
    return all(
        side.on_hub or _have_hashes(paths, record)  # the files of a commit never change
        for (side, record), paths in zip(sides, opened.find_read(), strict=True)
    )


def _have_hashes(paths: dict[str, Path], record: SideRecord) -> bool:
    if paths.keys() != record.files.keys():
        return False
    if any(path.stat().st_size != record.files[name].bytes for name, path in paths.items()):
        return False
    return all(FileRecord(*hash_file(path)) == record.files[name] for name, path in paths.items())
