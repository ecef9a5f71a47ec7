"""Edits of the study, made in memory in float32: POME's, its neighbours, and the controls without which a gain says
nothing about equalizing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pome.choices import GROUPS
from pome.kernel.decomposition import DecompositionCache
from pome.kernel.equalize import Recipe, equalize_matrix
from pome.kernel.noise import storage_noise_floor
from pome.kernel.rank import RankRule, measure_effective
from pome.roles.roles import find_layouts
from study.data import State

EVERYTHING = ("gate", "up", "down", "q", "k", "v", "o", "embed")
GROUP_ROLES = {**GROUPS, "all": EVERYTHING}


@dataclass(frozen=True)
class Edit:
    """One edit. kind: `pome`, `truncate`, `equivalence`, `step` towards the default edit as far as a bound on the
    departure lets, and the controls `scale` (the delta times beta), `rotate` (the kept left and right directions
    paired at random) and `noise` (a random matrix as long as the default edit departs).

    roles: a role or a group; `model` is every parameter. number: K, or what the rank rule takes.
    """

    kind: str
    roles: str
    number: float | None = 0.5
    beta: float = 1.0
    power: float = 0.0
    rule: str = "ratio"
    bound: float = 0.0

    @property
    def name(self) -> str:
        """How tables call it."""
        if self.kind == "scale":
            return f"{self.roles}: delta times {self.beta:g}"
        if self.kind == "step":
            return f"{self.roles}: step, departure at most {self.bound:g}"
        if self.kind in ("equivalence", "noise"):
            return f"{self.roles}: {self.kind}"
        rule = {"ratio": "K=", "energy": "energy ", "fixed": "k="}.get(self.rule, self.rule)
        said = f"{self.roles}: {self.kind} {rule}{'' if self.number is None else format(self.number, 'g')}"
        if self.kind == "pome":
            said += f" beta={self.beta:g}" + (f" power={self.power:g}" if self.power else "")
        return said


def pome(roles: str, number: float | None = 0.5, beta: float = 1.0, power: float = 0.0, rule: str = "ratio") -> Edit:
    """An equalized edit whose beta keeps its meaning at every power."""
    return Edit("pome", roles, number, beta, power, rule)


# Twelve edits, fixed before anything was scored; every cell has them.
FIXED = [
    pome("up"),
    pome("up", beta=1.5),
    pome("down"),
    pome("attention"),
    pome("ffn"),
    pome("all"),
    pome("ffn", 1.0, power=0.5),
    Edit("truncate", "ffn", 0.25),
    Edit("equivalence", "ffn"),
    Edit("step", "ffn", bound=0.1),
    Edit("scale", "ffn", beta=1.1),
    Edit("scale", "model", beta=1.1),
]


def list_wide(roles: Iterable[str]) -> list[Edit]:
    """The whole grid, for the roles that a model has."""
    ffn = [role for role in ("up", "gate", "down") if role in set(roles)]
    edits = list(FIXED)
    for role in (*ffn, "ffn"):
        edits += [pome(role, K) for K in (0.25, 0.5, 0.75, 1.0)]
        edits += [pome(role, beta=beta) for beta in (0.5, 0.7, 1.3, 1.5, 2.0)]
    edits += [pome("attention", K, beta) for K, beta in ((0.25, 1), (1, 1), (0.5, 0.5), (0.5, 0.7), (0.5, 1.5))]
    edits += [pome(role) for role in ("q", "k", "v", "o", "embed")] + [pome("embed", beta=0.5), pome("embed", 1.0)]
    edits += [pome("all", K, beta) for K, beta in ((1, 1), (0.5, 0.5), (0.5, 0.7), (0.5, 1.5))]
    edits += [pome(role, power=0.5) for role in ("up", "ffn", "all")] + [pome("up", 1.0, power=0.5)]
    edits += [pome(role, power=1.0) for role in ("up", "ffn", "all")] + [pome("all", 1.0, power=0.8)]
    for role in ("up", "ffn"):
        edits += [pome(role, 0.9, rule="energy"), pome(role, 16, rule="fixed")]
        edits += [pome(role, None, rule=rule) for rule in ("noise-floor", "gavish-donoho", "effective")]
    edits += [Edit("truncate", role, K) for role in ("up", "ffn", "all") for K in (0.1, 0.25, 0.5)]
    edits += [Edit("equivalence", role) for role in ("up", "all")]
    edits += [Edit("step", role, bound=bound) for role in ("up", "ffn", "all") for bound in (0.05, 0.1, 0.2)]
    edits += [Edit("scale", role, beta=c) for role in ("ffn", "model") for c in (0.8, 0.9, 1.1, 1.2, 1.3)]
    edits += [Edit("scale", "up", beta=c) for c in (0.8, 1.2)]
    edits += [Edit(kind, role) for kind in ("rotate", "noise") for role in ("up", "ffn")]
    edits += [
        pome("without-" + role)
        for role in ("up", "gate", "down", "attention", "embed")
        if role != "gate" or len(ffn) == 3
    ]
    return list(dict.fromkeys(edits))


@dataclass
class Pair:
    """The weights of a base and of a fine-tune by name, with what is known of each delta."""

    base: State
    tuned: State
    stored: torch.dtype = torch.float32
    roles: dict[str, str] = field(default_factory=dict)
    _caches: dict[str, DecompositionCache] = field(default_factory=dict)
    _found: dict[tuple[Any, ...], tuple[Tensor, int]] = field(default_factory=dict)
    _svd: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tuned.items() if name in self.base}
        found = find_layouts(shapes, None)
        self.roles = {
            name: layout.parts[0].role
            for name, layout in found.items()
            if self.tuned[name].ndim == 2 and self.tuned[name].shape == self.base[name].shape
            and not torch.equal(self.tuned[name], self.base[name]) and layout.parts[0].role in EVERYTHING
            and min(self.tuned[name].shape) > 2
        }  # fmt: skip

    def select(self, roles: str) -> list[str]:
        """Names of the matrices of a role or a group; `without-ROLE` is everything but it."""
        without = roles.removeprefix("without-")
        wanted = set(GROUP_ROLES.get(without, (without,)))
        if roles != without:
            wanted = set(EVERYTHING) - wanted
        return [name for name, role in self.roles.items() if role in wanted]

    def delta(self, name: str) -> Tensor:
        """D, m x n."""
        return self.tuned[name] - self.base[name]

    def apply(self, edit: Edit, seed: int = 0) -> tuple[State, float]:
        """The edited weights (only those that differ from the fine-tuned ones), and the median departure
        norm(W_E - W_ft) / norm(D). Empty where the model has no such matrix."""
        if edit.roles == "model":
            shared = [
                name for name in self.tuned if name in self.base and self.base[name].shape == self.tuned[name].shape
            ]
            return {name: self.base[name] + edit.beta * self.delta(name) for name in shared}, abs(edit.beta - 1.0)
        changed, departures = {}, []
        generator = torch.Generator().manual_seed(seed)
        for name in self.select(edit.roles):
            value = self.edit_delta(name, edit, generator)
            D = self.delta(name)
            changed[name] = self.base[name] + value
            departures.append(float((value - D).norm() / D.norm()))
        return changed, float(torch.tensor(departures).median()) if departures else math.nan

    def edit_delta(self, name: str, edit: Edit, generator: torch.Generator) -> Tensor:
        """What takes the place of D, m x n."""
        D = self.delta(name)
        if edit.kind == "scale":
            return edit.beta * D
        if edit.kind == "truncate":
            return self.equalize(name, "ratio", edit.number, 1.0, "unit")[0]
        if edit.kind == "equivalence":
            U, _, Vh = torch.linalg.svd(self.tuned[name].double(), full_matrices=False)
            kept = torch.linalg.svdvals(self.base[name].double())
            return ((U * kept) @ Vh - self.base[name].double()).float()
        value, _ = self.equalize(name, edit.rule, edit.number, edit.power, "frobenius")
        if edit.kind == "step":
            return D + min(1.0, edit.bound / float((value - D).norm() / D.norm())) * (value - D)
        if edit.kind == "noise":
            noise = torch.randn(D.shape, generator=generator)
            return D + noise * ((value - D).norm() / noise.norm())
        if edit.kind == "rotate":
            U, S, Vh = self.decompose(name)
            k = max(1, round((edit.number or 0.5) * int((S > 0).sum())))
            turn, _ = torch.linalg.qr(torch.randn(k, k, generator=generator))
            return (U[:, :k] @ turn @ Vh[:k]) * (D.norm() / math.sqrt(k))
        return edit.beta * value

    def equalize(self, name: str, rule: str, number: float | None, power: float, scale: str) -> tuple[Tensor, int]:
        """The edit of a delta at beta 1, and its k: one decomposition serves all."""
        key = (name, rule, number, power, scale)
        if key not in self._found:
            floor = storage_noise_floor(self.tuned[name].to(self.stored))
            number = int(number) if rule == "fixed" and number is not None else number
            recipe = Recipe(RankRule(rule, number, floor), scale, 1.0, power)
            found = equalize_matrix(self.delta(name), recipe, self._caches.setdefault(name, {}))
            if len(self._found) > 400:
                self._found.clear()
            self._found[key] = found.value, found.k
        return self._found[key]

    def decompose(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """torch's SVD of D in float32."""
        if name not in self._svd:
            self._svd[name] = torch.linalg.svd(self.delta(name), full_matrices=False)
        return self._svd[name]

    def describe(self) -> list[dict[str, Any]]:
        """Spectral features of each matrix, for the predictor; no data is used."""
        rows = []
        for name, role in self.roles.items():
            D, W = self.delta(name), self.base[name]
            sigma = torch.linalg.svdvals(D.double())
            value, _ = self.equalize(name, "ratio", 0.5, 0.0, "frobenius")
            floor = storage_noise_floor(self.tuned[name].to(self.stored))
            rows.append({
                "name": name,
                "role": role,
                "stable_rank": round(float(sigma.square().sum() / sigma[0] ** 2), 3),
                "entropy_rank": round(measure_effective(sigma) / min(D.shape), 4),
                "delta_over_weight": round(float(D.norm() / W.norm()), 5),
                "energy_half": round(float(sigma[: len(sigma) // 2].square().sum() / sigma.square().sum()), 4),
                "above_noise": round(float((sigma > floor).sum() / len(sigma)), 4),
                "departure": round(float((value - D).norm() / D.norm()), 4),
            })  # fmt: skip
        return rows
