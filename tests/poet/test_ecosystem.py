"""POET in processes of their own: the Trainer of transformers with a resume in mid-interval, and DDP over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import pome
from pome.errors import SpecError
from pome.poet import PoetCallback, PoetConfig, wrap

from .worker import ten_steps, trainer

WORKER = Path(__file__).with_name("worker.py")
SOURCE = str(Path(pome.__file__).parents[1])


def start(*arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCE}
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output


@pytest.mark.slow
def test_trainer_resumes_bitwise_in_mid_interval(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    trainer(first, None)
    checkpoint = first / "run" / "checkpoint-7"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["PoetCallback"]
    assert saved["attributes"]["merger"] == {"steps": 7, "since_merge": 3, "merges": 1}
    finish(start("trainer", second, checkpoint))
    whole, resumed = (torch.load(folder / "end.pt", weights_only=True) for folder in (first, second))
    assert whole["counters"] == resumed["counters"] == {"steps": 10, "since_merge": 0, "merges": 3}
    assert resumed["losses"].items() <= whole["losses"].items() and set(resumed["losses"]) >= {8, 9, 10}
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    # At the end the rotations are folded in, so the weights alone are the model.
    assert not any(tensor.any() for name, tensor in whole["model"].items() if name.endswith(("poet_in", "poet_out")))
    moments, moments_too = (each["optimizer"]["state"] for each in (whole, resumed))
    assert moments.keys() == moments_too.keys()
    for number, state in moments.items():
        assert all(torch.equal(value, moments_too[number][key]) for key, value in state.items())


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finish(*(start("ddp", tmp_path, rank, 2, port) for rank in range(2)))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = ten_steps()
    assert int(alone["0.poet_counts"][2]) == 3 and alone["0.poet_in"].any()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)


def test_callback_refuses_a_checkpoint_without_its_state():
    model = nn.Sequential(nn.Linear(4, 4))
    wrap(model, PoetConfig(block_size=2))
    callback = PoetCallback()
    state = transformers.TrainerState(global_step=3, stateful_callbacks=[])
    with pytest.raises(SpecError, match="holds no state of PoetCallback"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
