"""POET training: weights moved only by orthogonal rotations, R W P (arXiv 2506.08001).

`wrap` puts it into a model without changing its function, `Merger` folds the rotations into the weights every few
hundred steps, `unwrap` gives plain layers back. `PoetCallback` is imported when first used, since it alone needs
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pome.poet.config import PoetConfig as PoetConfig
from pome.poet.layer import PoetLinear as PoetLinear
from pome.poet.measurement import LayerMeasure as LayerMeasure
from pome.poet.measurement import measure as measure
from pome.poet.merger import Merger as Merger
from pome.poet.wrapping import Report as Report
from pome.poet.wrapping import WrappedLayer as WrappedLayer
from pome.poet.wrapping import parameter_groups as parameter_groups
from pome.poet.wrapping import poet_layers as poet_layers
from pome.poet.wrapping import unwrap as unwrap
from pome.poet.wrapping import wrap as wrap

if TYPE_CHECKING:
    from pome.poet.callback import PoetCallback as PoetCallback

__all__ = [
    "LayerMeasure",
    "Merger",
    "PoetCallback",
    "PoetConfig",
    "PoetLinear",
    "Report",
    "WrappedLayer",
    "measure",
    "parameter_groups",
    "poet_layers",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "PoetCallback":
        from pome.poet.callback import PoetCallback

        return PoetCallback
    raise AttributeError(f"module 'pome.poet' has no attribute {name!r}")
