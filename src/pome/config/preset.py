"""Presets: several options of an edit under one name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pome.choices import PRESETS, PresetName
from pome.config.conflicts import find_idle, merge_options, refuse_beside_method
from pome.config.options import HOW, Option, check_choice, documented, pick_options


@documented
@dataclass(frozen=True)
class Preset:
    """The name of a preset. An edit keeps what it stands for, not the name."""

    preset: Annotated[
        PresetName | None,
        Option(
            "Several options at once; each other option given wins.",
            metavar="NAME", group=HOW, choices=PRESETS, everyday=False, commands=("edit",),
        ),
    ] = None  # fmt: skip


def fill_in_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what their preset stands for in its place, below all else that is given. Raises SpecError."""
    chosen = dict(options)
    name = chosen.pop("preset", None)
    if name is None:
        return chosen
    preset = PRESETS[check_choice("preset", name, PRESETS)]
    if find_idle(chosen.get("method")):
        refuse_beside_method("preset", chosen["method"])
    return merge_options(preset.options, chosen)


def pick_edit_options(values: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Of options by name those of a kind of edit, and the preset."""
    return {**pick_options(values, kind), **pick_options(values, Preset)}
