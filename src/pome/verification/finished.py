"""Outputs that an earlier run finished, which a batch need not make again."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.checkpoint.source import open_checkpoint
from pome.config.spec import EditSpec
from pome.errors import PomeError
from pome.manifest import CHECKSUM, Manifest, read_manifest
from pome.output.card import CARD_NAME

Source = str | os.PathLike[str]


def find_finished(out: Path, base: Source, ft: Source, spec: EditSpec, card: bool) -> Manifest | None:
    """The manifest of `out` if this edit made it, it is whole, and no input is newer: a batch need not repeat it.

    With `card`, an output without a model card is not what was asked for.
    """
    return _find(out, base, ft, card, lambda made: made.sweep is None and made.spec == spec.to_mapping())


def find_swept(out: Path, base: Source, ft: Source, sweep: dict[str, Any], card: bool) -> Manifest | None:
    """The same for the best of a sweep; `sweep` has its scorer and its grid, as the manifest tells them."""
    return _find(out, base, ft, card, lambda made: made.sweep is not None and sweep.items() <= made.sweep.items())


def _find(out: Path, base: Source, ft: Source, card: bool, is_it: Callable[[Manifest], bool]) -> Manifest | None:
    try:
        manifest = read_manifest(out / MANIFEST_NAME)
        same = (manifest.base.source, manifest.fine_tuned.source) == (os.fspath(base), os.fspath(ft))
        if not same or not is_it(manifest) or manifest.timing.get(CHECKSUM) != manifest.checksum():
            return None
        # Sizes, not hashes: what a batch asks at every start must not read every output. `verify` reads them.
        if any((out / name).stat().st_size != record.bytes for name, record in manifest.files.items()):
            return None
        copied = {**manifest.base.files, **manifest.fine_tuned.files}
        if card and manifest.files.get(CARD_NAME) in (None, copied.get(CARD_NAME)):
            return None
        created = datetime.datetime.fromisoformat(manifest.created).timestamp()
        for source, record in ((base, manifest.base), (ft, manifest.fine_tuned)):
            side = open_checkpoint(source)
            paths = {name: weights.file.stored for name, weights in side.files.items()}
            sizes = {name: weights.file.size for name, weights in side.files.items()}
            side.close()
            if side.revision != record.revision or any(sizes[n] != record.files[n].bytes for n in sizes):
                return None
            if not side.on_hub and any(path and path.stat().st_mtime > created for path in paths.values()):
                return None
    except (PomeError, OSError, KeyError, ValueError):
        return None  # whatever is wrong with it, it is not finished; making it again says what
    return manifest
