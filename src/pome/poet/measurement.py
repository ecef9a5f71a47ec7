"""State of POET training by layer: size of Q, orthogonality error, spectral drift, angle of the rotation so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pome.poet.cayley import orthogonality_error, skew_symmetric
from pome.poet.layer import PoetLinear
from pome.poet.rotation import Blocks
from pome.poet.wrapping import poet_layers


@dataclass(frozen=True)
class LayerMeasure:
    """Measures of one layer; all are dimensionless.

    `q_norm_in`, `q_norm_out`: largest spectral norm of a block of Q. `orthogonality`: largest spectral norm of
    R^T R - I of a block as it is applied. `norm_drift`: norm_F(W) / norm_F(W at wrap) - 1, with Q as it is.
    `spectral_drift`: norm of the difference of the sorted singular values of W and of W at wrap, over the norm of the
    latter; None unless the model was wrapped with `track_spectrum=True`. `cosine_in`, `cosine_out`: cosine of a
    fixed probe vector with its image under the rotation accumulated since wrap; the paper's three phases show in it.
    """

    name: str
    merges: int
    q_norm_in: float
    q_norm_out: float
    orthogonality: float
    norm_drift: float
    spectral_drift: float | None
    cosine_in: float
    cosine_out: float


@torch.no_grad()
def measure(model: nn.Module) -> list[LayerMeasure]:
    """Measures of each POET layer of `model`. Costs a few products of each weight's size, and an SVD where tracked."""
    return [_measure_layer(layer) for layer in poet_layers(model)]


def _measure_layer(layer: PoetLinear) -> LayerMeasure:
    weight = layer.effective_weight()
    drift = None
    if layer.poet_spectrum is not None:
        start = layer.poet_spectrum.double()
        drift = ((torch.linalg.svdvals(weight).double() - start).norm() / start.norm()).item()
    blocks = [*layer.rotation_blocks("in"), *layer.rotation_blocks("out")]
    turned_in, turned_out = layer.rotated_probes()
    start_in, start_out = layer.start_probes()
    return LayerMeasure(
        layer.poet_name,
        layer.merges,
        _q_norm(layer.poet_in, layer.poet_blocks_in),
        _q_norm(layer.poet_out, layer.poet_blocks_out),
        max(_largest_norm(orthogonality_error(block.double())) for block in blocks),
        (weight.double().norm() / layer.poet_norm.double()).item() - 1,
        drift,
        _cosine(start_in, turned_in),
        _cosine(start_out, turned_out),
    )


def _q_norm(upper: Tensor, blocks: Blocks) -> float:
    return max(_largest_norm(skew_symmetric(part, size)) for part, size in blocks.split(upper))


def _largest_norm(matrices: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrices, 2).max())


def _cosine(first: Tensor, second: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0).item()
