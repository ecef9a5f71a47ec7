"""POET training: weights moved only by orthogonal rotations, R W P (arXiv 2506.08001).

`wrap` puts it into a model without changing its function, `Merger` folds the rotations into the weights every few
hundred steps, `unwrap` gives plain layers back.
"""

from __future__ import annotations

from pome.poet.config import PoetConfig as PoetConfig
from pome.poet.layer import PoetLinear as PoetLinear
from pome.poet.wrapping import Report as Report
from pome.poet.wrapping import WrappedLayer as WrappedLayer
from pome.poet.wrapping import parameter_groups as parameter_groups
from pome.poet.wrapping import poet_layers as poet_layers
from pome.poet.wrapping import unwrap as unwrap
from pome.poet.wrapping import wrap as wrap

__all__ = [
    "PoetConfig",
    "PoetLinear",
    "Report",
    "WrappedLayer",
    "parameter_groups",
    "poet_layers",
    "unwrap",
    "wrap",
]
