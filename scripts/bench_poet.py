#!/usr/bin/env python3
"""Memory and time of one training step of POET layers, beside a plain linear layer and a dense-rotation POET.

    scripts/bench_poet.py                                  2048 x 5632 and 576 x 1536, 1,024 tokens, one thread
    scripts/bench_poet.py --shapes 576x1536 --tokens 8192 --skip dense

A step is forward, backward with the gradient of the input, and AdamW. The dense rotation is POET without primitives: a
rotation of each whole side, and the product R W P formed. Time is the least CPU time of --repeat steps of each case, in
turn, in one process; so other work on the machine matters little. `trained` counts trainable numbers. `state` is
parameters in training, their gradients and moments; `kept` what the forward pass keeps for the backward pass beside
the input and the weights. `peak` is what the process had resident at most, in a process for each case, above what it
had before the layer was made. Ratios are to the plain layer.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pome.poet import PoetConfig, wrap
from pome.poet.cayley import cayley, skew_symmetric

MEGABYTE = 1 << 20


class DenseRotation(nn.Module):
    """y = x (R_out^T W R_in^T)^T with one rotation of each whole side and the product formed."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in) / fan_in**0.5, requires_grad=False)
        self.upper_in = nn.Parameter(torch.zeros(1, fan_in * (fan_in - 1) // 2))
        self.upper_out = nn.Parameter(torch.zeros(1, fan_out * (fan_out - 1) // 2))

    def forward(self, x: Tensor) -> Tensor:
        fan_out, fan_in = self.weight.shape
        turn_in = cayley(skew_symmetric(self.upper_in, fan_in), 3, True).value[0]
        turn_out = cayley(skew_symmetric(self.upper_out, fan_out), 3, True).value[0]
        weight = self.weight + self.weight @ turn_in.T
        return nn.functional.linear(x, weight + turn_out.T @ weight)


def make_poet(fan_in: int, fan_out: int, **options: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(fan_in, fan_out, bias=False))
    wrap(model, PoetConfig(**options))
    return model


CASES: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": lambda fan_in, fan_out: nn.Linear(fan_in, fan_out, bias=False),
    "BS 64": lambda fan_in, fan_out: make_poet(fan_in, fan_out, block_size=64),
    "BS 256": lambda fan_in, fan_out: make_poet(fan_in, fan_out, block_size=256),
    "BS 256 uncorrected": lambda fan_in, fan_out: make_poet(fan_in, fan_out, block_size=256, correct=False),
    "BS 256 exact": lambda fan_in, fan_out: make_poet(fan_in, fan_out, block_size=256, neumann_terms="exact"),
    "FS 256": lambda fan_in, fan_out: make_poet(fan_in, fan_out, sampling="full", block_size=256),
    "FS 1/8": lambda fan_in, fan_out: make_poet(fan_in, fan_out, sampling="full", block_size=0.125),
    "dense": DenseRotation,
}


class Step:
    """One training step of a layer on fixed data."""

    def __init__(self, case: str, fan_in: int, fan_out: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.layer = CASES[case](fan_in, fan_out)
        self.trained = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=0)
        self.x = torch.randn(tokens, fan_in, requires_grad=True)
        self.gradient = torch.randn(tokens, fan_out)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.x.grad = None
        self.layer(self.x).backward(self.gradient)
        self.optimizer.step()

    def count_kept(self) -> int:
        """Bytes that the forward pass keeps beside its input, the weights and the buffers."""
        own = {t.untyped_storage().data_ptr() for t in [*self.layer.parameters(), *self.layer.buffers(), self.x]}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = self.layer(self.x)
        size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
        del result
        return size

    def count_state(self) -> int:
        """Bytes of the parameters in training, their gradients and the optimiser's moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        grads = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        return sum(tensor.nbytes for tensor in [*self.trained, *grads, *moments])


def resident() -> int:
    """Bytes resident at most so far in this process."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands getrusage's peak on to a child, so a child's own is read here.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_peak(case: str, fan_in: int, fan_out: int, tokens: int) -> None:
    """Prints the growth of the resident size by two steps; to be run in a process of its own."""
    Step("plain", 8, 8, 8)()
    before = resident()
    step = Step(case, fan_in, fan_out, tokens)
    step()
    step()
    print(resident() - before)


def run_shape(fan_in: int, fan_out: int, cases: list[str], tokens: int, repeat: int) -> None:
    """Prints the table of one shape."""
    steps, best = {}, dict.fromkeys(cases, float("inf"))
    for case in cases:
        steps[case] = Step(case, fan_in, fan_out, tokens)
        steps[case]()
    for number in range(repeat):
        for case in cases:
            if case == "dense" and number:
                continue
            start = time.process_time()
            steps[case]()
            best[case] = min(best[case], time.process_time() - start)
    print(f"\n{fan_in} x {fan_out}, {tokens} tokens, {torch.get_num_threads()} thread(s), float32")
    print("| layer | trained | state MB | kept MB | peak MB | step ms | time ratio | state ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        step = steps[case]
        trained = sum(parameter.numel() for parameter in step.trained)
        command = [sys.executable, __file__, "--peak", case, "--shapes", f"{fan_in}x{fan_out}", "--tokens", str(tokens)]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {case} | {trained:,} | {step.count_state() / MEGABYTE:.1f} | {step.count_kept() / MEGABYTE:.1f} "
            f"| {peak / MEGABYTE:.0f} | {best[case] * 1e3:.1f} | {best[case] / best['plain']:.2f} "
            f"| {step.count_state() / steps['plain'].count_state():.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048x5632,576x1536", help="fan_in x fan_out, separated by commas")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip", default="", help=f"cases to leave out, separated by commas: {', '.join(CASES)}")
    parser.add_argument("--peak", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    if arguments.peak:
        measure_peak(arguments.peak, *shapes[0], arguments.tokens)
        return
    skipped = set(arguments.skip.split(",")) - {"", "plain"}
    for fan_in, fan_out in shapes:
        run_shape(fan_in, fan_out, [case for case in CASES if case not in skipped], arguments.tokens, arguments.repeat)


if __name__ == "__main__":
    main()
