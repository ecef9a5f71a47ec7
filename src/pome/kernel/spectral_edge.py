"""Edge of the singular spectrum of a noise matrix whose entries do not all vary alike.

Some rows and columns of a weight are many times larger than the others (outlier channels), and so is the rounding
noise in them: its largest singular value is up to twice that of even noise of the same norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINTS, ZOOMS, REACH = 24, 6, 20.0  # six zooms into one of 23 cells leave 3e-7 of logits from -20 to 20


def find_edge(rows: Tensor, columns: Tensor) -> tuple[float, tuple[float, float]]:
    """Edge (about the largest singular value) of independent noise, and the shape of the even noise that fluctuates
    like it.

    `rows` (2 x m) and `columns` (2 x n), float64, sum the variances of the entries in each, and their squares. For the
    single variances v_ij = rows_i columns_j / T is taken, T being the whole sum. By Lehner's formula ("Computing norms
    of free operators with matrix coefficients", Amer. J. Math. 121(3), 1999; that it holds for such noise: Bandeira,
    Boedihardjo and van Handel, "Matrix concentration inequalities and free probability", Invent. Math. 234, 2023) the
    edge is

        min over x, y > 0 of max_ij {1 / x_i + sum_j v_ij y_j, 1 / y_j + sum_i v_ij x_i},

    which here comes down to two numbers: with s = a max(rows) and t = b max(columns) in (0, 1),

        edge^2 = min h / (a b),    h T = sum_i a rows_i / (1 - a rows_i) = sum_j b columns_j / (1 - b columns_j),

    found where the logarithmic slopes of the two sums agree. Even noise gives sqrt(v) (sqrt(m) + sqrt(n)).
    """
    total = float(rows[0].sum())
    highest = float(rows[0].max()), float(columns[0].max())
    r, c = rows[0] / highest[0], columns[0] / highest[1]
    span_s = span_t = -REACH, REACH
    for _ in range(ZOOMS):
        at_s, height_s, slope_s = tabulate_sum(r, *span_s)
        at_t, height_t, slope_t = tabulate_sum(c, *span_t)
        j = torch.searchsorted(height_t, height_s).clamp_(1, POINTS - 1)
        share = ((height_s - height_t[j - 1]) / (height_t[j] - height_t[j - 1])).clamp_(0.0, 1.0)
        # Both slopes grow from 1, so that this falls from 2: the minimum lies where it passes 1.
        falling = 1.0 / slope_s + 1.0 / torch.lerp(slope_t[j - 1], slope_t[j], share)
        i = min(max(int((falling > 1.0).sum()), 1), POINTS - 1)
        span_s = float(at_s[i - 1]), float(at_s[i])
        span_t = float(at_t[j[i - 1] - 1]), float(at_t[j[i]])
    s, t = at_s[i].sigmoid(), torch.lerp(at_t[j - 1], at_t[j], share)[i].sigmoid()
    square = float(height_s[i].exp() / (s * t)) * highest[0] * highest[1] / total
    m, along = count_carriers(rows, 1.0 - s * r)
    n, across = count_carriers(columns, 1.0 - t * c)
    return math.sqrt(square), (m, along) if m * along < n * across else (across, n)


def tabulate_sum(weights: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of s from `low` to `high`, and for each of them log(sum_i s w_i / (1 - s w_i)) and its slope in log(s)."""
    logits = torch.linspace(low, high, POINTS, dtype=torch.float64)
    x = logits.sigmoid()[:, None] * weights
    rest = 1.0 - x
    x /= rest
    sums = x.sum(1)
    return logits, sums.log(), x.div_(rest).sum(1) / sums


def count_carriers(sums: Tensor, rest: Tensor) -> tuple[float, float]:
    """Effective number of rows that carry the edge, and of entries in each of them (or of columns, and their entries).

    A variance in row i moves edge^2 by 1 / rest_i^2, all else being equal. The effective number of shares p is
    1 / sum(p^2): of the m rows of even noise all m.
    """
    effect = rest.pow(-2.0)
    whole = (effect * sums[0]).sum().square()
    squares = effect.square()
    lines = float(whole / (squares * sums[0].square()).sum())
    return lines, float(whole / (squares * sums[1]).sum()) / lines
