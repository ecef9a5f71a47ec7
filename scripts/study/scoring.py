"""Scores of a model on examples: loss, whether it is right, calibration; and what storage in few bits does to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from study.data import Row, State
from study.experts import join_experts
from train_poet import pad

GROUPS = 50  # per-example results are kept as the means of so many groups of neighbours, in a random order
BINS = 10  # of calibration


@dataclass(frozen=True)
class Scores:
    """loss (examples), nats a token of the answer; right (examples), 1 where greedy decoding gives the answer; gap,
    the expected calibration error over answers' tokens or over classes."""

    loss: Tensor
    right: Tensor
    gap: float

    def to_json(self) -> dict[str, Any]:
        """What a line of the results holds."""
        return {
            "score": round(float(self.loss.mean()), 6),
            "accuracy": round(float(self.right.mean()), 5),
            "calibration": round(self.gap, 5),
            "loss": [round(float(group.mean()), 5) for group in self.loss.tensor_split(min(GROUPS, len(self.loss)))],
            "right": [round(float(group.mean()), 3) for group in self.right.tensor_split(min(GROUPS, len(self.loss)))],
        }


def measure_calibration(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of equal width."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [(confidence[bins == b].sum() - right[bins == b].sum()).abs() for b in range(BINS)]
    return float(sum(gaps)) / len(confidence)


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Row], batch: int = 25) -> Scores:
    """Scores of a causal model. An answer is right where every token of it is the likeliest after those before it,
    which is what greedy decoding would give."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    losses, rights, confidences, hits = torch.zeros(len(rows)), torch.zeros(len(rows)), [], []
    for start in range(0, len(order), batch):
        at = order[start : start + batch]
        given = pad([rows[i] for i in at], 0)
        targets = given["labels"][:, 1:]
        learnt = targets != -100
        with torch.autocast("cpu", torch.bfloat16):
            inside = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
            hidden = model.model(**inside, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][learnt])
        logs = torch.log_softmax(logits.float(), 1)
        owner = torch.arange(len(at))[:, None].expand_as(targets)[learnt]
        counts = torch.bincount(owner, minlength=len(at))
        nats = -logs.gather(1, targets[learnt][:, None])[:, 0]
        best, chosen = logs.max(1)
        hit = (chosen == targets[learnt]).float()
        losses[at] = torch.zeros(len(at)).index_add(0, owner, nats) / counts
        rights[at] = (torch.zeros(len(at)).index_add(0, owner, hit) == counts).float()
        confidences.append(best.exp())
        hits.append(hit)
    return Scores(losses, rights, measure_calibration(torch.cat(confidences), torch.cat(hits)))


def score_classes(logs: Tensor, labels: Tensor) -> Scores:
    """Scores of a classifier from its log-probabilities (examples x classes)."""
    best, chosen = logs.max(1)
    right = (chosen == labels).double()
    return Scores(-logs.gather(1, labels[:, None])[:, 0], right, measure_calibration(best.exp(), right))


def round_to_bits(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest on a symmetric grid of 2^bits - 1 levels for each row."""
    top = 2 ** (bits - 1) - 1
    step = (weight.abs().amax(1, keepdim=True) / top).clamp_min(1e-30)
    return (weight / step).round().clamp(-top, top) * step


def prune_half(weight: Tensor) -> Tensor:
    """The larger half of the entries by absolute value, zero elsewhere."""
    return torch.where(weight.abs() > weight.abs().flatten().median(), weight, 0.0)


COMPRESSIONS = {
    "8 bits": lambda weight: round_to_bits(weight, 8),
    "4 bits": lambda weight: round_to_bits(weight, 4),
    "half pruned": prune_half,
}


def compress(state: State, names: Iterable[str], how: str) -> State:
    """The matrices `names` of a state, compressed one by one."""
    return {name: COMPRESSIONS[how](state[name]) for name in names}


@torch.no_grad()
def set_weights(model: nn.Module, *states: State) -> None:
    """Parameters by name; the last state that has a name gives it."""
    merged = join_experts({name: tensor for state in states for name, tensor in state.items()})
    for name, parameter in model.named_parameters():
        parameter.copy_(merged[name])


def is_finite(scores: Scores) -> bool:
    """Whether the loss is a number at all."""
    return math.isfinite(float(scores.loss.mean()))
