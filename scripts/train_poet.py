#!/usr/bin/env python3
"""Fine-tune a causal language model by POET, AdamW or Muon, with one loop for all.

    scripts/train_poet.py MODEL DATA.jsonl OUT --method poet-bs --epochs 1

MODEL is a folder that transformers loads, with its tokenizer. A line of DATA.jsonl is {"text": ...}, or {"prompt": ...,
"completion": ...}, where only the completion is learnt. OUT becomes a checkpoint like MODEL. The same command goes on
where an interrupted run stopped: OUT/training.pt holds the state of every --save-every steps, OUT/log.jsonl the losses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from pome.poet import Merger, PoetConfig, PoetLinear, parameter_groups, unwrap, wrap

METHODS = ("poet-bs", "poet-fs", "adamw", "muon")


def make_optimizers(
    model: nn.Module, method: str, *, lr: float, matrix_lr: float, weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Optimisers of `method`. `matrix_lr` is the rate of what the method is about: of rotations for POET, of the
    linear layers but the head for Muon; `lr` is that of all else, by AdamW. AdamW takes `matrix_lr` for all.
    """
    if method.startswith("poet"):
        groups = parameter_groups(model, lr=lr, poet_lr=matrix_lr, weight_decay=weight_decay)
        return [torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    if method == "adamw":
        groups = parameter_groups(model, lr=matrix_lr, weight_decay=weight_decay)
        return [torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"torch {torch.__version__} has no Muon; it came with 2.9")
    hidden = {id(parameter) for parameter in _hidden_matrices(model)}
    rest = parameter_groups(model, lr=lr, weight_decay=weight_decay)
    for group in rest:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in hidden]
    rest = [group for group in rest if group["params"]]
    muon = torch.optim.Muon(
        _hidden_matrices(model), lr=matrix_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, betas=(0.9, 0.98))] if rest else [muon]


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers other than the head and whatever is tied to it."""
    head = model.get_output_embeddings()
    apart = set() if head is None else {id(head.weight)}
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, kinds) and id(module.weight) not in apart and module.weight.requires_grad
    ]


def scale_rates(
    optimizers: list[torch.optim.Optimizer], step: int, steps: int, warmup: int, floor: float = 0.1
) -> None:
    """Sets every rate for the step to come: linear warm-up, then a cosine down to `floor` of the group's own rate."""
    if step < warmup:
        share = (step + 1) / warmup
    else:
        share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("full_lr", group["lr"])
            group["lr"] = group["full_lr"] * share


def read_examples(path: Path, tokenizer: Any, length: int) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each line, cut to `length`; -100 labels what is not learnt."""
    examples = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if "text" in row:
            ids = tokenizer(row["text"])["input_ids"] + end
            labels = list(ids)
        elif "prompt" in row and "completion" in row:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
            ids, labels = prompt + answer, [-100] * len(prompt) + answer
        else:
            raise SystemExit(f"{path}:{number}: neither 'text' nor 'prompt' and 'completion'")
        if any(label != -100 for label in labels[1:length]):
            examples.append((ids[:length], labels[:length]))
    if not examples:
        raise SystemExit(f"{path}: no line with anything to learn within {length} tokens")
    return examples


def pad(rows: list[tuple[list[int], list[int]]], filler: int) -> dict[str, Tensor]:
    """A batch of examples, filled on the right."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [filler] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }


def make_plan(count: int, batch: int, epochs: int, seed: int) -> list[list[int]]:
    """Numbers of the examples of every step: each epoch a shuffle of its own, so a resumed run finds its place."""
    plan = []
    for epoch in range(epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
        plan += [order[start : start + batch] for start in range(0, count, batch)]
    return plan


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes `state` so that an interruption leaves the old file or the new one."""
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    os.replace(fresh, path)


def run_step(model: nn.Module, rows: list, micro: int, filler: int, device: str, autocast: bool) -> float:
    """Accumulates the gradient of the mean loss per learnt token over `rows`, in parts of `micro`; that loss."""
    learnt = sum(label != -100 for _, labels in rows for label in labels[1:])
    total = 0.0
    for start in range(0, len(rows), micro):
        batch = {key: value.to(device) for key, value in pad(rows[start : start + micro], filler).items()}
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        (loss / learnt).backward()
        total += loss.item() / learnt
    return total


def train(arguments: argparse.Namespace) -> None:
    """The whole job from MODEL to OUT."""
    out: Path = arguments.out
    state_path, log_path = out / "training.pt", out / "log.jsonl"
    if (out / "config.json").exists():
        raise SystemExit(f"{out} holds a finished checkpoint; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model.to(arguments.device).train()
    if arguments.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    poet = arguments.method.startswith("poet")
    if poet:
        config = PoetConfig(
            sampling="block" if arguments.method == "poet-bs" else "full",
            block_size=arguments.block_size,
            neumann_terms=arguments.neumann_terms,
            include=arguments.include,
            exclude=arguments.exclude,
            seed=arguments.seed,
            rounding="stochastic" if arguments.dtype == "bfloat16" else "nearest",
        )
        print(wrap(model, config), file=sys.stderr)
    optimizers = make_optimizers(
        model, arguments.method, lr=arguments.lr, matrix_lr=arguments.matrix_lr, weight_decay=arguments.weight_decay
    )
    merger = Merger(model, optimizers, every=arguments.merge_every, ramp=arguments.ramp) if poet else None
    examples = read_examples(arguments.data, tokenizer, arguments.length)
    plan = make_plan(len(examples), arguments.batch, arguments.epochs, arguments.seed)[: arguments.steps]
    asked = {key: str(value) for key, value in sorted(vars(arguments).items()) if key not in ("out", "save_every")}
    done = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=arguments.device)
        if state["asked"] != asked:
            changed = [key for key in asked if state["asked"].get(key) != asked[key]]
            raise SystemExit(f"{out} was begun with other options ({', '.join(changed)}); choose another folder")
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        if merger is not None:
            merger.load_state_dict(state["merger"])
        torch.set_rng_state(state["random"].cpu())
        done = state["step"]
        lines = log_path.read_text().splitlines()[:done]
        log_path.write_text("".join(line + "\n" for line in lines))
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    warmup = max(1, int(arguments.warmup * len(plan)))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress, log_path.open("a") as log:
        task = progress.add_task(arguments.method, total=len(plan), completed=done, loss=float("nan"))
        for step in range(done, len(plan)):
            scale_rates(optimizers, step, len(plan), warmup)
            for optimizer in optimizers:
                optimizer.zero_grad()
            rows = [examples[number] for number in plan[step]]
            loss = run_step(model, rows, arguments.micro or len(rows), filler, arguments.device, arguments.autocast)
            norm = nn.utils.clip_grad_norm_(model.parameters(), arguments.clip or math.inf).item()
            for optimizer in optimizers:
                optimizer.step()
            merged = merger.step() if merger is not None else False
            log.write(json.dumps({"step": step + 1, "loss": loss, "gradient": norm, "merged": merged}) + "\n")
            log.flush()
            progress.update(task, advance=1, loss=loss)
            if (step + 1) % arguments.save_every == 0 and step + 1 < len(plan):
                kept = {
                    "asked": asked,
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "merger": merger.state_dict() if merger is not None else {},
                    "random": torch.get_rng_state(),
                }
                save_atomically(kept, state_path)
    if poet:
        unwrap(model)
    assert not any(isinstance(module, PoetLinear) for module in model.modules())
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    state_path.unlink(missing_ok=True)


def fraction_or_count(text: str) -> int | float:
    """An integer, or a fraction with a point."""
    return float(text) if "." in text else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=METHODS, default="poet-bs")
    parser.add_argument("--matrix-lr", type=float, help="rate of rotations (POET), of matrices (Muon), of all (AdamW)")
    parser.add_argument("--lr", type=float, default=2e-5, help="rate of all other parameters (default 2e-5)")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--batch", type=int, default=16, help="examples a step (default 16)")
    parser.add_argument("--micro", type=int, help="examples at once; gradients of a step are accumulated")
    parser.add_argument("--length", type=int, default=512, help="longest example in tokens (default 512)")
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the steps (default 0.03)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; 0 for none")
    parser.add_argument("--block-size", type=fraction_or_count, default=256, help="an integer, or a fraction as 0.5")
    parser.add_argument("--neumann-terms", type=lambda text: text if text == "exact" else int(text), default=3)
    parser.add_argument("--merge-every", type=int, default=200, help="optimiser steps between merges (default 200)")
    parser.add_argument("--ramp", type=int, default=0, help="steps over which the rate rises after a merge")
    parser.add_argument("--include", help="regular expression of the layers to wrap")
    parser.add_argument("--exclude", help="regular expression of the layers to leave; replaces heads and embeddings")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16, weights as --dtype says")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.matrix_lr is None:
        arguments.matrix_lr = 1e-3 if arguments.method.startswith("poet") else 2e-5
    train(arguments)


if __name__ == "__main__":
    main()
