"""Dense float64 reference of a POET layer, written from the formulas: explicit Q, R, permutations and P."""

from __future__ import annotations

import torch
from torch import Tensor

from pome.poet import PoetLinear


def dense_generator(upper: Tensor, size: int) -> Tensor:
    """Q, (size, size), from its strict upper triangle row by row."""
    matrix = [[upper.new_zeros(()) for _ in range(size)] for _ in range(size)]
    position = 0
    for row in range(size):
        for column in range(row + 1, size):
            matrix[row][column] = upper[position]
            matrix[column][row] = -upper[position]
            position += 1
    return torch.stack([torch.stack(line) for line in matrix])


def dense_rotation(generator: Tensor, terms: int | str, correct: bool) -> Tensor:
    """R = (I + Q) (I + Q + ... + Q^terms), or the exact Cayley transform, then one Newton-Schulz step."""
    identity = torch.eye(generator.shape[0], dtype=generator.dtype)
    if terms == "exact":
        return (identity + generator) @ torch.linalg.inv(identity - generator)
    series = sum((torch.linalg.matrix_power(generator, power) for power in range(1, int(terms) + 1)), identity)
    rotation = (identity + generator) @ series
    return rotation @ (3 * identity - rotation.T @ rotation) / 2 if correct else rotation


def dense_side(upper: Tensor, index: Tensor, dimension: int, size: int, terms: int | str, correct: bool) -> Tensor:
    """The whole rotation of one side, (dimension, dimension): P^T diag(R_1, ..., R_B, I) P with explicit P."""
    count = index.numel()
    others = [place for place in range(dimension) if place not in set(index.tolist())]
    permutation = torch.eye(dimension, dtype=upper.dtype)[torch.tensor([*index.tolist(), *others])]
    blocks = []
    start = 0
    position = 0
    while start < count:
        width = min(size, count - start)
        numbers = width * (width - 1) // 2
        blocks.append(dense_rotation(dense_generator(upper[position : position + numbers], width), terms, correct))
        start += width
        position += numbers
    blocks.append(torch.eye(dimension - count, dtype=upper.dtype))
    return permutation.T @ torch.block_diag(*blocks) @ permutation


def dense_weight(layer: PoetLinear, upper_in: Tensor, upper_out: Tensor) -> Tensor:
    """R_out^T W R_in^T, (fan_out, fan_in), as a differentiable function of both parameters, in float64."""
    config = layer.poet_config
    sides = []
    for upper, index, dimension in (
        (upper_in, layer.poet_index_in, layer.fan_in),
        (upper_out, layer.poet_index_out, layer.fan_out),
    ):
        size = config.block_of(dimension)
        sides.append(dense_side(upper, index, dimension, size, config.neumann_terms, config.correct))
    stored = layer.weight.detach().double()
    weight = stored.T if layer.poet_transposed else stored
    return sides[1].T @ weight @ sides[0].T
