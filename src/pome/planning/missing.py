"""Whole groups of the selection that have no partner in BASE. No torch."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence

from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import PairingError, printable
from pome.manifest import KeptRecord
from pome.planning.obstacles import is_missing
from pome.roles.layout import Layout
from pome.roles.names import module_path
from pome.roles.places import find_key

TIED = ("embed", "head")


def refuse_missing(
    chosen: Mapping[str, Layout], kept: Sequence[KeptRecord], ft: Checkpoint, base: Checkpoint, spec: EditSpec
) -> None:
    """Raise PairingError if a whole group of the selected matrices has no partner in BASE.

    A group is one role in one block of a layer, and all tensors whose names differ in numbers alone.
    """
    lacking = {(item.name, item.part) for item in kept if is_missing(item.reason)}
    if not lacking or spec.allow_missing:
        return
    groups: dict[str, list[bool]] = {}
    for name, layout in chosen.items():
        path = module_path(name)
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "N", name)
        for part in layout.parts:
            key, expert = find_key(path, part)
            whole = (name, None) in lacking
            slices = range(ft.tensors[name][1].shape[0]) if layout.stacked else (None,)
            for i in slices:
                said = ",".join(filter(None, (None if i is None else f"expert={i}", part.label)))
                missing = whole or (name, said) in lacking
                if missing and part.role in TIED and _is_stored_once(name, chosen, lacking, ft):
                    continue
                half = f" ({part.label})" if part.label and expert is None else ""
                groups.setdefault(f"all {pattern}{half}", []).append(missing)
                if part.role != "other":
                    groups.setdefault(f"{part.role} of {key.removesuffix('.' + part.role)}", []).append(missing)
    whole_groups = [group for group, missing in groups.items() if all(missing)]
    if whole_groups:
        whole_groups.sort(key=lambda group: not group.startswith("all "))
        shown = ", ".join(printable(group) for group in whole_groups[:3])
        more = f" and {len(whole_groups) - 3} more" if len(whole_groups) > 3 else ""
        raise PairingError(
            f"{printable(ft.source)}: BASE {printable(base.source)} has no partner for whole groups of the selection: "
            f"{shown}{more}; give the model that FT was trained from, leave them out with --exclude, or keep them as "
            "in FT with --allow-missing"
        )


def _is_stored_once(
    name: str, chosen: Mapping[str, Layout], lacking: Container[tuple[str, str | None]], ft: Checkpoint
) -> bool:
    """Whether BASE may store only one of a tied embedding and head, and so lack this one."""
    if (ft.config or {}).get("tie_word_embeddings") is False:
        return False
    shape = ft.tensors[name][1].shape
    return any(
        other != name and (other, None) not in lacking and ft.tensors[other][1].shape == shape
        for other, layout in chosen.items()
        if any(part.role in TIED for part in layout.parts)
    )
