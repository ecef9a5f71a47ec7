"""What a user should know of an adapter before it is edited: another base, trained weights outside of it. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pome.checkpoint.source import ADAPTER_WEIGHTS, Checkpoint
from pome.errors import printable

_WEIGHTS = re.compile(r".+\.(bin|pt|pth|ckpt|safetensors)")
# States of a training, and the adapter in another format: nothing that the model computes with beside the adapter.
_NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|rng_state|random_states|scaler|sampler|training_args|trainer_state|adapter_model|"
    r"adapters?|model\.safetensors|pytorch_model).*"
)


def note_origin(base: Checkpoint, ft: Checkpoint) -> Iterator[str]:
    """That `base_model_name_or_path` names another model than BASE."""
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


def note_other_weights(ft: Checkpoint, out_format: str) -> Iterator[str]:
    """That files beside the adapter hold trained weights which are no part of it, as a projector's."""
    names = set(ft.unused)
    folder = ft.folder or (Path(os.path.expanduser(ft.source)).parent if ft.revision is None else None)
    if folder is not None and folder.is_dir():
        names |= {path.name for path in folder.iterdir() if path.is_file()}
    beside = sorted(name for name in names if _WEIGHTS.fullmatch(name) and not _NOT_WEIGHTS.fullmatch(name))
    lost = "are not in the output" if out_format == "full" else "are not edited"
    for name in beside:
        if name != ADAPTER_WEIGHTS and "/" not in name:
            yield (
                f"warning: {printable(name)} beside the adapter holds weights that were trained with it and {lost}; "
                "load them beside OUT as they were loaded beside the adapter"
            )
