"""Recipes and rank rules of the kernel by the names of the options, with their defaults."""

from __future__ import annotations

from typing import Any

from pome.kernel.equalize import Recipe
from pome.kernel.rank import RankRule

DEFAULTS = {"rank_ratio": 0.5, "rank": None, "energy": 0.9}


def make_rule(name: str = "ratio", noise_floor: float | None = None, **numbers: Any) -> RankRule:
    """A rank rule; its number by the option that gives it."""
    return RankRule.from_options(name, {**DEFAULTS, **numbers}, noise_floor)


def make_recipe(
    rank_rule: str = "ratio",
    noise_floor: float | None = None,
    scale: str = "frobenius",
    beta: Any = 1.0,
    power: Any = 0.0,
    **numbers: Any,
) -> Recipe:
    """A recipe for `equalize_matrix` and `equalize_product`."""
    return Recipe(make_rule(rank_rule, noise_floor, **numbers), scale, beta, power)
