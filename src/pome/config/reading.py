"""Values of options that are more than a number or a choice: layers, patterns, devices. No torch."""

from __future__ import annotations

import re

from pome.choices import GROUPS, ROLES
from pome.config.options import check_pattern, check_text, check_texts, nearest, show
from pome.errors import SpecError, printable

ADDRESS = re.compile(r"[^\s/]+:\d{1,5}")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def read_layers(key: str, value: object) -> tuple[str, ...]:
    """Layer names; a comma separates roles and groups (but not inside a pattern, which may hold commas)."""
    names: list[str] = []
    for text in check_texts(key, value):
        names += [text] if text.startswith("re:") else [t.strip() for t in text.split(",") if t.strip()]
    for name in names:
        if name == "re:":
            raise SpecError(f"{key}: 're:' has no pattern; for every tensor write 're:.'", options=[key])
        if name.startswith("re:"):
            check_pattern(key, name[3:])
        elif name not in ROLES and name not in GROUPS:
            hint = nearest(name, [*ROLES, *GROUPS])
            raise SpecError(
                f"{key}: {printable(name)!r} is neither a role ({', '.join(ROLES)}) nor a group "
                f"({', '.join(GROUPS)}){hint}; for tensor names use re:PATTERN",
                options=[key],
            )
    if not names:
        raise SpecError(f"{key}: nothing is selected; name a role, a group or re:PATTERN", options=[key])
    return tuple(dict.fromkeys(names))


def read_patterns(key: str, value: object) -> tuple[str, ...]:
    patterns = check_texts(key, value)
    for pattern in patterns:
        if not pattern:
            raise SpecError(f"{key}: empty, which every tensor matches; is a variable unset?", options=[key])
        check_pattern(key, pattern)
    return patterns


def read_address(key: str, value: object) -> str:
    """The address of a Ray cluster: `auto` or HOST:PORT."""
    text = check_text(key, value)
    if text != "auto" and not ADDRESS.fullmatch(text):
        raise SpecError(f"{key}: {show(value)} is neither auto nor HOST:PORT of a head", options=[key])
    return text


def read_device(key: str, value: object) -> str:
    if not isinstance(value, str) or not DEVICE.fullmatch(value):
        raise SpecError(f"{key}: {show(value)} is none of auto, cpu, cuda, cuda:N, mps", options=[key])
    return value
