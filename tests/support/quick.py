"""What `scripts/test --quick` takes of a test over many families of models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sample(families: Iterable[str], *quick: str) -> list[Any]:
    """Parameters of a test: the families named run always, the others are slow."""
    families = list(families)
    assert set(quick) <= set(families)
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in families]
