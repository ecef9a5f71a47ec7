"""Paired bootstrap over examples: confidence intervals of differences in score, alone and for the best of many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from pome.sweeping.scorers.base import Scored

DRAWS = 4000  # resamples: the ends of a 95 % interval are then known to 2 % of its length
LEVEL = 0.95
SEED = 20251006
BLOCK = 1 << 22  # indices drawn at a time


@dataclass(frozen=True)
class MeanDifference:
    """Difference in mean score of a candidate to the fine-tuned model, in the scorer's own units.

    interval: a 95 % confidence interval for this candidate alone. best_interval: 95 % for all candidates at once, by
    which the best of many may be judged. Both are None where there are no examples to resample.
    """

    delta: float
    interval: tuple[float, float] | None = None
    best_interval: tuple[float, float] | None = None


def compare(candidates: Sequence[Scored], reference: Scored) -> list[MeanDifference]:
    """Differences of all candidates to one reference, from one set of resamples.

    Examples are resampled in pairs, the same ones for every candidate and the reference, so that the difficulty of an
    example cancels. A candidate whose examples are not those of the reference (another number, other weights) has no
    interval.
    """
    deltas = [candidate.value - reference.value for candidate in candidates]
    usable = [i for i, candidate in enumerate(candidates) if _match(candidate, reference)]
    found = [MeanDifference(delta) for delta in deltas]
    if not usable or reference.examples is None:
        return found
    base = torch.tensor(reference.examples, dtype=torch.float64)
    pairs = torch.stack([torch.tensor(candidates[i].examples, dtype=torch.float64) - base for i in usable], 1)
    weights = torch.tensor(reference.weights or [1.0] * len(base), dtype=torch.float64)
    center = (weights @ pairs) / weights.sum()
    means = resample(pairs, weights)
    low, high = spread_levels(len(base))
    spread = means.std(0)
    # The largest deviation of any candidate, each in its own standard errors: the max-T bootstrap.
    steps = torch.where(spread > 0.0, (means - center).abs() / spread, 0.0).amax(1)
    most = float(torch.quantile(steps, LEVEL)) * math.sqrt(len(base) / max(len(base) - 1, 1))
    for at, i in enumerate(usable):
        ends = torch.quantile(means[:, at], torch.tensor([low, high], dtype=torch.float64)).tolist()
        reach = most * float(spread[at])
        best = (float(center[at]) - reach, float(center[at]) + reach)
        found[i] = MeanDifference(deltas[i], (ends[0], ends[1]), best)
    return found


def _match(candidate: Scored, reference: Scored) -> bool:
    mine, theirs = candidate.examples, reference.examples
    if mine is None or theirs is None or len(mine) != len(theirs) or len(mine) < 2:
        return False
    return candidate.weights == reference.weights


def resample(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted means (DRAWS x candidates) of resampled rows of `values` (examples x candidates), always the same draws.

    A resample is its counts, so that all candidates come from one product.
    """
    n = values.shape[0]
    generator = torch.Generator().manual_seed(SEED)
    means = []
    step = max(1, BLOCK // n)
    for start in range(0, DRAWS, step):
        rows = min(step, DRAWS - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        counts = torch.zeros(rows, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand(rows, n))
        counts *= weights
        means.append(counts @ values / counts.sum(1, keepdim=True))
    return torch.cat(means)


def spread_levels(n: int) -> tuple[float, float]:
    """Quantiles of the bootstrap means to read a LEVEL interval from, for n examples.

    Plain percentiles are too narrow for small n: they lack the factor sqrt(n / (n - 1)) and the tails of Student's t.
    Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69(4), 2015, section 4.4.2:
    the expanded percentile interval. Student's quantile by its Cornish-Fisher expansion, good to 1 % from n = 6.
    """
    normal = NormalDist()
    z = normal.inv_cdf(0.5 + LEVEL / 2.0)
    freedom = max(n - 1, 1)
    t = z + (z**3 + z) / (4.0 * freedom) + (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / (96.0 * freedom**2)
    high = normal.cdf(t * math.sqrt(n / freedom))
    return 1.0 - high, high


def beats(difference: MeanDifference, minimize: bool) -> bool:
    """Whether a candidate is better beyond noise: by the interval that allows for the choice among all of them, or,
    where there are no examples, by its score alone."""
    sign = -1.0 if minimize else 1.0
    if difference.best_interval is None:
        return sign * difference.delta > 0.0
    return min(sign * end for end in difference.best_interval) > 0.0
