"""The reaction BERT's two fine-tunes on held-out reactions: ready made, so that nothing is trained but a probe.

`bert_ft_10k_25s` has a head for the 50 classes. `bert_ft`, another fine-tune, has none: a linear probe (multinomial
logistic regression on the pooled output) is fitted once on training reactions with the fine-tune's own weights, and is
then left as it is for the base and for every edit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from real_weights import reactions, rxnfp_pair
from score_reactions import choose, classify, encode, load_model, read_data, read_vocabulary
from study.data import folder
from study.scoring import Scores, score_classes, set_weights
from study.tuning import State

PROBE_EXAMPLES, CLASSES = 2000, 50
HEAD = "classifier."


@dataclass(frozen=True)
class Reactions:
    """A classifier, the weights of base and fine-tune by the model's names, and how to score what it holds."""

    model: Any
    base: State
    tuned: State
    score: Callable[[str], Scores]  # of "test" or "train"


def load_reactions(variant: str, count: int) -> Reactions:
    """`bert_ft_10k_25s` or `bert_ft`, scored on `count` reactions."""
    pair = rxnfp_pair(variant)
    headed = rxnfp_pair().fine_tuned
    vocabulary = read_vocabulary(headed)
    test, train = read_data(reactions(), "test"), read_data(reactions(), "train")
    model = load_model(headed, vocabulary, test.classes)
    base, tuned = load_file(pair.base / "model.safetensors"), load_file(pair.fine_tuned / "model.safetensors")
    if variant == "bert_ft":
        tuned = {f"bert.{name}": tensor for name, tensor in tuned.items()}
    names = [name for name, _ in model.named_parameters()]
    base = {name: base[name] for name in names if name in base and not name.startswith(HEAD)}
    tuned = {name: tuned[name] for name in names if name in tuned}
    chosen = {"test": choose(test.examples, count), "train": choose(train.examples, min(count, 300))}

    def prepare(examples: list[Any]) -> tuple[list[list[int]], Tensor]:
        ids = [encode(each.reaction, vocabulary, model.config.max_position_embeddings) for each in examples]
        return ids, torch.tensor([each.label for each in examples])

    sets = {split: prepare(examples) for split, examples in chosen.items()}
    if variant == "bert_ft":
        tuned |= load_probe(model, tuned, prepare(choose(train.examples, PROBE_EXAMPLES)), vocabulary["[PAD]"])

    def score(split: str) -> Scores:
        encoded, labels = sets[split]
        with torch.autocast("cpu", torch.bfloat16):
            logs = classify(model, encoded, vocabulary["[PAD]"], 64)
        return score_classes(logs, labels)

    return Reactions(model, base, tuned, score)


def load_probe(model: Any, tuned: State, data: tuple[list[list[int]], Tensor], padding: int) -> State:
    """Head of a linear probe on the fine-tune's pooled outputs. Cached."""
    kept = folder() / f"probe-{PROBE_EXAMPLES}.safetensors"
    if not kept.exists():
        set_weights(model, {name: p.detach().clone() for name, p in model.named_parameters()}, tuned)
        encoded, labels = data
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        found: dict[int, Tensor] = {}
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(order), 64):
                at = order[start : start + 64]
                ids = torch.nn.utils.rnn.pad_sequence(
                    [torch.tensor(encoded[i]) for i in at], batch_first=True, padding_value=padding
                )
                pooled = model.bert(input_ids=ids, attention_mask=(ids != padding).long()).pooler_output
                found |= dict(zip(at, pooled.float(), strict=True))
        features = torch.stack([found[i] for i in range(len(encoded))]).double().clone()
        save_file(fit_probe(features, labels), kept)
    return load_file(kept)


def fit_probe(features: Tensor, labels: Tensor, decay: float = 1e-4) -> State:
    """Multinomial logistic regression by L-BFGS: examples x features, float64."""
    weight = torch.zeros(CLASSES, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def close() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(close)
    return {HEAD + "weight": weight.detach().float(), HEAD + "bias": bias.detach().float()}
