"""The options that together choose k, and what one of them does to the others. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pome.choices import RANK_RULES

# The rules that take a number, and the option that gives it; those that are None unless given come first.
NUMBER_OF = {rule.name: rule.number for rule in RANK_RULES.values() if rule.number}
# The options that together choose k. One of them given on the command line sets aside what a file says of the others.
RANK_OPTIONS = frozenset({"rank_rule", *NUMBER_OF.values()})


def merge_options(file: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options over a file's values; an option that chooses k sets aside all that the file says of choosing k."""
    dropped = RANK_OPTIONS if RANK_OPTIONS & options.keys() else frozenset()
    return {**{k: v for k, v in file.items() if k not in dropped}, **options}
