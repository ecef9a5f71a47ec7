"""The expected memory of a plan against the peak that the kernel reports for the same edit."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.checkpoints import environment, perturb, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc"),
]

# VmHWM and not ru_maxrss: the latter begins at what the parent held when it started the process.
CHILD = """
import sys
import pome
from pome.editing.session import open_pair
with open_pair(*sys.argv[1:3], pome.EditSpec()) as opened:
    expected = opened.plan.memory
pome.edit(*sys.argv[1:4])
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(expected, int(peak) * 1024)
"""


@functools.cache
def measure(folder: Path, shape: tuple[int, int], dtype: torch.dtype, cores: int = 1) -> tuple[int, int]:
    """(expected, measured) bytes of the edit of matrices of this shape, two for each core."""
    torch.manual_seed(0)
    base = {f"layers.{i}.mlp.up_proj.weight": (torch.randn(shape) * 0.02).to(dtype) for i in range(2 * cores)}
    place = folder / f"{shape}{dtype}{cores}"
    sides = [write_checkpoint(place / name, t) for name, t in (("base", base), ("ft", perturb(base, 0.001)))]
    command = [sys.executable, "-c", CHILD, *map(str, sides), str(place / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | {"OMP_NUM_THREADS": str(cores)})
    assert done.returncode == 0, done.stderr
    expected, peak = map(int, done.stdout.split())
    return expected, peak


@pytest.mark.parametrize(
    ("shape", "dtype", "cores"),
    [
        ((2200, 2200), torch.float32, 1),
        ((12000, 1000), torch.bfloat16, 1),
        ((1600, 1600), torch.float64, 1),
        ((2200, 2200), torch.float32, 2),  # with both threads
        ((9000, 1000), torch.bfloat16, 3),  # three side by side
        ((1300, 1300), torch.float32, 2),
    ],
)
def test_expected_memory_is_the_measured_peak(
    shape: tuple[int, int], dtype: torch.dtype, cores: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What the matrices take beyond a run with tiny ones is foretold to a third, and all in all to a fifth.

    How torch's allocator rounds, and what a run holds besides, differ between machines.
    """
    folder = tmp_path_factory.getbasetemp()
    expected, peak = measure(folder, shape, dtype, cores)
    least, idle = measure(folder, (64, 64), torch.bfloat16)
    assert 0.67 < (expected - least) / (peak - idle) < 1.33
    assert peak < 1.2 * expected
