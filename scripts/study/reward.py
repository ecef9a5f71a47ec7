"""Fine-tuning by reward: the model is given 1 where its sampled answer is right, and is never shown an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from study.data import Row
from train_poet import pad, scale_rates

STEPS, PROMPTS, SAMPLES = 80, 8, 8  # updates; prompts of an update; answers sampled for each


def train_by_reward(model: Any, rows: Sequence[Row], rate: float, seed: int) -> None:
    """Policy gradient with the mean reward of a prompt's answers as the baseline, over their deviation: GRPO
    (arXiv 2402.03300) without its clip and its divergence, which one update for each sample leaves idle."""
    torch.manual_seed(seed)
    dice = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(STEPS):
        scale_rates([optimizer], step, STEPS, 3)
        chosen = [split_row(row) for row in dice.sample(list(rows), PROMPTS)]
        prompts = [prompt for prompt, _ in chosen for _ in range(SAMPLES)]
        wanted = [answer for _, answer in chosen for _ in range(SAMPLES)]
        answers = sample(model.eval(), prompts, [len(answer) for answer in wanted])
        reward = torch.tensor([float(said == answer) for said, answer in zip(answers, wanted, strict=True)])
        groups = reward.reshape(PROMPTS, SAMPLES)
        advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        if not bool(advantage.any()):
            continue
        model.train()
        said = [(p + a, [-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
        given = pad(said, 0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits
        targets = given["labels"][:, 1:]
        nats = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none"
        )
        loss = (nats.reshape(targets.shape).sum(1) * advantage).sum() / int((targets != -100).sum())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"reward, step {step}: {float(reward.mean()):.3f} right", flush=True)


def split_row(row: Row) -> tuple[list[int], list[int]]:
    """Prompt and answer of a row."""
    ids, labels = row
    start = next(place for place, label in enumerate(labels) if label != -100)
    return ids[:start], ids[start:]


@torch.no_grad()
def sample(model: Any, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """An answer to each prompt, as many tokens of it as are wanted, from the model's own probabilities."""
    texts = [list(prompt) for prompt in prompts]
    for place in range(max(lengths)):
        open_ones = [number for number, length in enumerate(lengths) if place < length]
        given = pad([(texts[number], texts[number]) for number in open_ones], 0)
        with torch.autocast("cpu", torch.bfloat16):
            inside = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
            hidden = model.model(**inside, use_cache=False).last_hidden_state
            last = given["attention_mask"].sum(1) - 1
            logits = model.lm_head(hidden[torch.arange(len(open_ones)), last])
        drawn = torch.multinomial(torch.softmax(logits.float(), 1), 1)[:, 0].tolist()
        for number, token in zip(open_ones, drawn, strict=True):
            texts[number].append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
