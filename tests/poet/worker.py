"""Training runs, here or in a process of their own.

`worker.py trainer OUT [CHECKPOINT]`, `worker.py ddp OUT RANK SIZE PORT`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from pome.poet import Merger, PoetConfig, parameter_groups, wrap


def trainer(out: Path, checkpoint: str | None) -> None:
    """Ten optimiser steps of the Trainer with a save after the seventh; merges every four, a new draw every two."""
    import transformers

    from pome.poet import PoetCallback

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config)
    wrap(model, PoetConfig(block_size=6))
    rows = [{"input_ids": [(7 * i + 3 * j) % 31 for j in range(12)]} for i in range(40)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = transformers.TrainingArguments(
        output_dir=str(out / "run"),
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=7,
        logging_steps=1,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, poet_lr=2e-2, weight_decay=0.01))
    callback = PoetCallback(every=4, resample_every=2, ramp=2)
    run = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[callback]
    )
    run.train(resume_from_checkpoint=checkpoint)
    losses = {row["step"]: row["loss"] for row in run.state.log_history if "loss" in row}
    counters = callback.merger.state_dict()
    state = run.optimizer.state_dict()
    torch.save(
        {"model": model.state_dict(), "losses": losses, "counters": counters, "optimizer": state}, out / "end.pt"
    )


def ddp(out: Path, rank: int, size: int, port: int) -> None:
    """One rank of a run on `size` processes; its end is saved as OUT/RANK.pt."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    torch.save(ten_steps(rank, size), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def ten_steps(rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    """State after ten steps on this rank's share of every batch of eight; merges every three."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 10))
    wrap(model, PoetConfig(block_size=6))
    # Global random state that differs by rank must not matter.
    torch.manual_seed(rank)
    parallel = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, poet_lr=0.02))
    merger = Merger(parallel, optimizer, every=3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        x, y = torch.randn(8, 12, generator=generator), torch.randn(8, 10, generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(parallel(x.chunk(size)[rank]), y.chunk(size)[rank]).backward()
        optimizer.step()
        merger.step()
    return model.state_dict()


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    if mode == "trainer":
        trainer(Path(folder), rest[0] if rest else None)
    else:
        ddp(Path(folder), *map(int, rest))
