"""Rotation of activations by permuted diagonal blocks, as an autograd function that keeps only its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pome.poet.cayley import Cayley, Terms, cayley, cayley_pullback, skew_symmetric, upper_triangle


class Blocks(NamedTuple):
    """Division of the rotated `dimensions` into blocks of `size` and one smaller block of what is left."""

    dimensions: int
    size: int

    @property
    def full(self) -> int:
        return self.dimensions // self.size

    @property
    def rest(self) -> int:
        return self.dimensions % self.size

    @property
    def parameters(self) -> int:
        """Number of free entries: the strict upper triangles of all blocks."""
        return self.full * _triangle(self.size) + _triangle(self.rest)

    def split(self, upper: Tensor) -> list[tuple[Tensor, int]]:
        """Upper triangles by block size: (blocks, size (size - 1) / 2) and size, for the full blocks and the rest."""
        border = self.full * _triangle(self.size)
        parts = [(upper[:border].view(self.full, -1), self.size)]
        if self.rest:
            parts.append((upper[border:].view(1, -1), self.rest))
        return parts


def _triangle(size: int) -> int:
    return size * (size - 1) // 2


def rotations(upper: Tensor, blocks: Blocks, terms: Terms, correct: bool) -> list[Cayley]:
    """Rotation blocks of one side from its flat parameter: the full blocks, then the smaller one if there is one."""
    return [cayley(skew_symmetric(part, size), terms, correct) for part, size in blocks.split(upper)]


def apply_blocks(rows: Tensor, values: list[Tensor], index: Tensor, inverse: Tensor | None) -> Tensor:
    """Rows x R for each row x of (tokens, features), R = I + E on the dimensions that `index` lists.

    `inverse` undoes `index` where it lists every dimension; None where the other dimensions stay as they are.
    """
    chosen = rows.index_select(1, index)
    values = [value.to(rows.dtype) for value in values]
    if inverse is None:
        return rows.index_add(1, index, _multiply(chosen, values, keep=0))
    return _multiply(chosen, values, keep=1).index_select(1, inverse)


def _multiply(chosen: Tensor, values: list[Tensor], keep: int) -> Tensor:
    """`keep` x + x E by blocks, for (tokens, dimensions) x in the order of the blocks."""
    parts = _divide(chosen, values)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        made = [torch.baddbmm(part, part, value, beta=keep) for part, value in zip(parts, values, strict=True)]
        return torch.cat([part.transpose(0, 1).flatten(1) for part in made], 1)
    # Straight into the layout of the rows: reordering afterwards would take as long as the product.
    result = torch.empty_like(chosen)
    for part, value, target in zip(parts, values, _divide(result, values), strict=True):
        torch.baddbmm(part, part, value, beta=keep, out=target)
    return result


def _divide(rows: Tensor, values: list[Tensor]) -> list[Tensor]:
    """(tokens, dimensions) as views (blocks, tokens, b), one for each tensor of `values`, (blocks, b, b)."""
    widths = [value.shape[0] * value.shape[1] for value in values]
    return [
        part.view(-1, value.shape[0], value.shape[1]).transpose(0, 1)
        for part, value in zip(torch.split(rows, widths, 1), values, strict=True)
    ]


class _Rotate(torch.autograd.Function):
    """x R for (tokens, features) x. Saves x and the parameter; the blocks are made again in the backward pass.

    Plain autograd would keep about seven tensors of the blocks' size for each side, and a permuted copy of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        upper: Tensor,
        index: Tensor,
        inverse: Tensor | None,
        blocks: Blocks,
        terms: Terms,
        correct: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, upper, index, inverse)
        ctx.blocks, ctx.terms, ctx.correct = blocks, terms, correct
        with torch.autocast(rows.device.type, enabled=False):
            values = [made.value for made in rotations(upper, blocks, terms, correct)]
            return apply_blocks(rows, values, index, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, upper, index, inverse = ctx.saved_tensors
        blocks, terms, correct = ctx.blocks, ctx.terms, ctx.correct
        of_rows: Tensor | None = None
        of_upper: Tensor | None = None
        with torch.autocast(rows.device.type, enabled=False):
            made = rotations(upper, blocks, terms, correct)
            values = [rotation.value for rotation in made]
            pulled = gradient.index_select(1, index)
            if ctx.needs_input_grad[0]:
                back = [value.mT.to(rows.dtype) for value in values]
                turned = _multiply(pulled, back, keep=int(inverse is not None))
                of_rows = gradient.index_add(1, index, turned) if inverse is None else turned.index_select(1, inverse)
            if ctx.needs_input_grad[1]:
                chosen = rows.index_select(1, index)
                parts = []
                for rotation, left, right in zip(made, _divide(chosen, values), _divide(pulled, values), strict=True):
                    of_value = torch.bmm(left.mT, right).to(upper.dtype)
                    parts.append(upper_triangle(cayley_pullback(rotation, of_value, terms)).flatten())
                of_upper = torch.cat(parts)
        return of_rows, of_upper, None, None, None, None, None


rotate: Callable[..., Tensor] = _Rotate.apply
