"""Notices about an adapter before it is edited: another base. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from pome.checkpoint.source import Checkpoint
from pome.errors import printable


def note_origin(base: Checkpoint, ft: Checkpoint) -> Iterator[str]:
    """A notice that `base_model_name_or_path` names another model than BASE."""
    named = (ft.adapter_config or {}).get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip():
        return
    ours = {base.source.partition("@")[0], str(base.folder or ""), str((base.config or {}).get("_name_or_path") or "")}
    if not any(_is_same_model(named, one) for one in ours if one):
        yield (
            f"the adapter was trained on {printable(named)} by its adapter_config.json, and BASE is "
            f"{printable(base.source)}; if they are not the same model, the output is of no use"
        )


def _is_same_model(named: str, ours: str) -> bool:
    """Whether two paths or Hub ids may be one model: one folder, one last word, or a copy in the Hub's cache."""
    if os.path.exists(named) and os.path.exists(ours) and os.path.samefile(named, ours):
        return True
    ends = [re.split(r"[/\\]", text.rstrip("/\\"))[-1].lower() for text in (named, ours)]
    return ends[0] == ends[1] or f"models--{named.replace('/', '--')}".lower() in ours.lower()
