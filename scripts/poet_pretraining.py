#!/usr/bin/env python3
"""Pretrain a small Llama from scratch by AdamW, Muon, POET-BS and POET-FS on the same real text, and make the table.

    scripts/poet_pretraining.py OUT                  all runs; hours. Those in OUT/results.jsonl are not made again
    scripts/poet_pretraining.py OUT --table          the table of the runs so far, in Markdown
    scripts/poet_pretraining.py OUT --steps 20 --tune-steps 10 --only tune,main      a look

The text is the GNU dictionary of English that Debian ships as dict-gcide (40 MB; fetched by apt-get into OUT, or give
--text FILE), cut into tokens by a byte-level BPE of 1,024 made from its beginning; the last twentieth is for
validation. Every method has the same model, batches, schedule and number of steps, and its rate is the best of the same
four by short runs (`tune`). Muon and POET train what is not theirs (embeddings, head, norms) by AdamW at AdamW's best
rate. `main` has three seeds a method; `ablate` has one seed, POET-BS, one thing changed at a time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

from pome.poet import Merger, PoetConfig, measure, unwrap, wrap
from train_poet import make_optimizers, scale_rates

METHODS = ("adamw", "muon", "poet-bs", "poet-fs")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
LENGTH, VALIDATION_WINDOWS = 256, 64
VOCABULARY = 1024
DEFAULTS = {
    "block_size": {"poet-bs": 64, "poet-fs": 0.5},
    "every": 200,
    "terms": 3,
    "correct": True,
    "init": "normalized",
}


def fetch_text(folder: Path) -> str:
    """Text of the dictionary, unpacked from the Debian package, lines joined to paragraphs."""
    unpacked = folder / "usr/share/dictd/gcide.dict.dz"
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "dict-gcide"], cwd=folder, check=True)
        package = next(folder.glob("dict-gcide_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
    return re.sub(r"[ \t]*\n[ \t]+", " ", gzip.open(unpacked).read().decode("utf-8", "replace"))


def load_tokens(out: Path, text_file: Path | None) -> tuple[Tensor, Tensor, float]:
    """Training tokens, validation tokens, and bytes a validation token; made once and kept in OUT."""
    kept = out / "tokens.pt"
    if not kept.exists():
        text = text_file.read_text(encoding="utf-8") if text_file else fetch_text(out / "text")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(
            (text[place : place + 100_000] for place in range(0, 4_000_000, 100_000)), trainer
        )
        border = len(text) * 19 // 20
        parts = []
        for part in (text[:border], text[border:]):
            pieces = tokenizer.encode_batch([part[place : place + 100_000] for place in range(0, len(part), 100_000)])
            parts.append(torch.tensor([token for piece in pieces for token in piece.ids], dtype=torch.int16))
        state = {"train": parts[0], "validation": parts[1], "bytes": len(text[border:].encode()) / len(parts[1])}
        torch.save(state, kept)
    state = torch.load(kept, weights_only=True)
    return state["train"], state["validation"], state["bytes"]


def make_windows(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random windows, (count, LENGTH + 1)."""
    starts = torch.randint(len(tokens) - LENGTH - 1, (count,), generator=generator)
    return torch.stack([tokens[start : start + LENGTH + 1] for start in starts.tolist()]).long()


def run_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss in nats a token."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, tokens: Tensor) -> float:
    """Loss on the same windows for every run."""
    windows = make_windows(tokens, VALIDATION_WINDOWS, torch.Generator().manual_seed(7))
    return statistics.fmean(run_loss(model, part).item() for part in windows.split(16))


def make_model(seed: int) -> transformers.LlamaForCausalLM:
    """The Llama, about 2 million parameters."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def train(job: dict[str, Any], train_tokens: Tensor, validation: Tensor, byte_share: float) -> dict[str, Any]:
    """One run; its results. A loss that is not finite ends it as diverged."""
    model, method = make_model(job["seed"]), job["method"]
    poet = method.startswith("poet")
    if poet or job["init"] != "standard":
        config = PoetConfig(
            sampling="full" if method == "poet-fs" else "block",
            block_size=job["block_size"] if poet else 1.0,
            neumann_terms=job["terms"],
            correct=job["correct"],
            init=job["init"],
            seed=job["seed"],
            track_spectrum=True,
        )
        wrap(model, config)
    if not poet and job["init"] != "standard":
        unwrap(model)
    optimizers = make_optimizers(model, method, lr=job["lr"], matrix_lr=job["rate"], weight_decay=0.1)
    merger = Merger(model, optimizers, every=job["every"]) if poet else None
    generator = torch.Generator().manual_seed(1000 + job["seed"])
    curve: list[dict[str, float]] = []
    pace = 0.0
    loss = math.nan
    for step in range(job["steps"]):
        start = time.process_time()
        scale_rates(optimizers, step, job["steps"], max(1, job["steps"] // 20))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_now = run_loss(model, make_windows(train_tokens, job["batch"], generator))
        if not math.isfinite(loss_now.item()):
            break
        loss_now.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if merger is not None:
            merger.step()
        pace += time.process_time() - start
        if (step + 1) % max(1, job["steps"] // 10) == 0:
            loss = validate(model, validation)
            point = {"step": step + 1, "loss": loss}
            if poet:
                found = measure(model)
                point["cosine_in"] = statistics.fmean(each.cosine_in for each in found)
                point["cosine_out"] = statistics.fmean(each.cosine_out for each in found)
                point["q_norm"] = max(max(each.q_norm_in, each.q_norm_out) for each in found)
                point["spectral_drift"] = max(each.spectral_drift or 0.0 for each in found)
            curve.append(point)
    finished = len(curve) > 0 and curve[-1]["step"] == job["steps"] and math.isfinite(loss)
    return {
        **job,
        "loss": loss if finished else None,
        "bits_per_byte": loss / math.log(2) / byte_share if finished else None,
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "cpu_seconds_per_step": pace / job["steps"],
        "curve": curve,
    }


def make_job(
    phase: str, method: str, seed: int, steps: int, batch: int, rate: float, lr: float, **changed: Any
) -> dict[str, Any]:
    """Description of a run; two runs with the same one are the same run."""
    poet = method.startswith("poet")
    return {
        "phase": phase,
        "method": method,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "lr": lr,
        "block_size": DEFAULTS["block_size"].get(method),
        "every": DEFAULTS["every"],
        "terms": DEFAULTS["terms"],
        "correct": DEFAULTS["correct"],
        "init": DEFAULTS["init"] if poet else "standard",
        **changed,
    }


def list_jobs(results: list[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs in order. `results` grows meanwhile: rates are chosen from the tuning runs that it holds."""

    def best(method: str) -> float:
        tuned = [row for row in results if row["phase"] == "tune" and row["method"] == method and row["loss"]]
        if not tuned:
            raise SystemExit(f"no finished tuning run of {method}; run with --only tune first")
        return min(tuned, key=lambda row: row["loss"])["rate"]

    only, steps, batch = set(arguments.only.split(",")), arguments.steps, arguments.batch
    if "tune" in only:
        for method in METHODS:
            for rate in RATES:
                yield make_job(
                    "tune", method, 0, arguments.tune_steps, batch, rate, rate if method == "adamw" else best("adamw")
                )
    if "main" in only:
        for seed in range(arguments.seeds):
            for method in METHODS:
                yield make_job("main", method, seed, steps, batch, best(method), best("adamw"))
    if "ablate" in only:
        rates = best("poet-bs"), best("adamw")
        changes: list[dict[str, Any]] = [{"every": 25}]
        changes += [{"terms": terms, "correct": correct} for correct in (True, False) for terms in (0, 1, 2, 3)]
        changes += [{"init": init} for init in ("standard", "xavier", "uniform", "power-law")]
        changes += [{"terms": "exact"}, {"block_size": 32}, {"block_size": 192}, {"every": 100}, {"every": 400}]
        for change in changes:
            job = make_job("ablate", "poet-bs", 0, steps, batch, *rates, **change)
            if job != make_job("ablate", "poet-bs", 0, steps, batch, *rates):
                yield job
        yield make_job("ablate", "adamw", 0, steps, batch, best("adamw"), best("adamw"), init="normalized")


def is_same(job: dict[str, Any], row: dict[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in job.items())


def make_table(results: list[dict[str, Any]]) -> str:
    """Markdown of the main runs, of what was tuned, and of the single changes."""
    lines = [
        "| method | rate | trained | bits a byte, mean (seeds) | loss | CPU s a step |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        rows = [row for row in results if row["phase"] == "main" and row["method"] == method]
        done = [row for row in rows if row["loss"]]
        if rows:
            each = ", ".join(f"{row['bits_per_byte']:.4f}" if row["loss"] else "diverged" for row in rows)
            mean = f"{statistics.fmean(row['bits_per_byte'] for row in done):.4f}" if done else "-"
            loss = f"{statistics.fmean(row['loss'] for row in done):.3f}" if done else "-"
            pace = statistics.fmean(row["cpu_seconds_per_step"] for row in rows)
            head = f"| {method} | {rows[0]['rate']:g} | {rows[0]['trained']:,} "
            lines.append(f"{head}| {mean} ({each}) | {loss} | {pace:.2f} |")
    lines += ["", "| tuning, bits a byte | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---|" + "---|" * 4]
    for method in METHODS:
        found = {row["rate"]: row for row in results if row["phase"] == "tune" and row["method"] == method}
        cells = [f"{found[r]['bits_per_byte']:.4f}" if r in found and found[r]["loss"] else "-" for r in RATES]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "| POET-BS, seed 0, one thing changed | bits a byte | spectral drift |", "|---|---|---|"]
    plain = [row for row in results if row["phase"] == "main" and row["method"] == "poet-bs" and row["seed"] == 0]
    for row in plain + [row for row in results if row["phase"] == "ablate"]:
        usual = make_job(*(row[key] for key in ("phase", "method", "seed", "steps", "batch", "rate", "lr")))
        changed = ", ".join(f"{key} = {row[key]}" for key in usual if row[key] != usual[key]) or "nothing"
        label = changed if row["method"] == "poet-bs" else f"{row['method']}, {changed}"
        drift = row["curve"][-1].get("spectral_drift") if row["curve"] else None
        score = f"{row['bits_per_byte']:.4f}" if row["loss"] else "diverged"
        lines.append(f"| {label} | {score} | {'-' if drift is None else format(drift, '.1e')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, help="another text, plain")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tune-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {LENGTH} tokens a step (default 8)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="tune,main,ablate", help="phases, separated by commas")
    parser.add_argument("--limit", type=int, help="stop after this many new runs")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table:
        print(make_table(results))
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    tokens = load_tokens(arguments.out, arguments.text)
    made = 0
    for job in list_jobs(results, arguments):
        if any(is_same(job, row) for row in results):
            continue
        if made == arguments.limit:
            break
        row = train(job, *tokens)
        made += 1
        results.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        score = f"{row['bits_per_byte']:.4f} bits a byte" if row["loss"] else "diverged"
        changed = {key: job[key] for key in ("phase", "method", "seed", "rate", "block_size", "every", "terms", "init")}
        print(f"{changed}: {score}, {row['cpu_seconds_per_step']:.2f} CPU s a step", flush=True)
    print(make_table(results))


if __name__ == "__main__":
    main()
