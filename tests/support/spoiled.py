"""Wrong answers that a broken driver might give."""

import math

import torch

from pome.kernel.solvers.svd import solve_svd
from support.recipes import make_rule

WRONG = [
    *("scaled", "rank too high", "rank too low", "wrong directions", "sign", "one entry", "not a number", "zero"),
    "half precision",
]


def spoil(delta, found, how):
    """A P of a delta that a broken driver might return instead of the one that was found."""
    P, k = found.M.clone(), found.k
    if how == "scaled":
        P *= 1.001
    elif how == "rank too high":
        P = solve_svd(delta, make_rule(rank=k + 1)).M
    elif how == "rank too low":
        P = solve_svd(delta, make_rule(rank=k - 1)).M
    elif how == "wrong directions":
        U, _, Vh = torch.linalg.svd(delta)
        chosen = torch.cat((torch.arange(k - 5), torch.arange(k, k + 5)))
        P = U[:, chosen] @ Vh[chosen]
    elif how == "sign":
        P = -P
    elif how == "one entry":
        P[3, 4] += 0.01
    elif how == "not a number":
        P[0, 0] = math.nan
    elif how == "zero":
        P.zero_()
    elif how == "half precision":
        P = P.bfloat16().float()
    return P
