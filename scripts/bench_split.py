#!/usr/bin/env python3
"""Time small and large matrices side by side against one after the other with all threads, by size.

    scripts/bench_split.py [--shapes 64x32,128x64,...] [--seconds S] [--patience P]

For each shape and in turn: all cores on one matrix at a time, one matrix on each core with one thread, and one worker
with one thread alone, which tells what workers cost each other (two that do not are twice as fast). All through the
edit of a unit in memory (read, subtract, equalize, certify, add, round). The rule of pome.planning.split is chosen
from the last column. On a shared machine a round counts only where other processes took less than a twentieth of the
processors' time; the script waits up to P seconds a shape for three such rounds, and says how many it got.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

from pome.editing.measurement import Probe, make_sample, time_units
from pome.planning.split import count_cores

SHAPES = "64x32,128x64,256x128,512x256,768x384,768x2048,1024x1024,1536x576,1408x2048,2048x2048,5632x2048,4096x4096"
ROUNDS, OTHERS = 3, 0.05


def read_busy() -> float:
    """Seconds of processor time that the whole machine has spent so far, over all cores."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure_round(sample: tuple[Any, Any], workers: int, threads: int, count: int) -> tuple[float, float]:
    """Seconds a unit, and the share of the processors that others took meanwhile."""
    busy, mine, begun = read_busy(), time.process_time(), time.perf_counter()
    seconds = time_units(*sample, ["cpu"] * workers, threads, count)
    spent = time.perf_counter() - begun
    others = (read_busy() - busy) - (time.process_time() - mine)
    return seconds, others / spent / (os.cpu_count() or 1)


def bench_shape(shape: str, cores: int, wanted: float, patience: float) -> None:
    m, n = map(int, shape.split("x"))
    sample = make_sample(Probe(m, n))
    time_units(*sample, ["cpu"], cores, 1)
    once = time_units(*sample, ["cpu"], cores, 1)
    count = max(2 * cores, int(wanted / once))
    rounds: list[list[tuple[float, float]]] = [[], [], []]
    ends = time.monotonic() + patience
    while time.monotonic() < ends and not all(sum(o < OTHERS for _, o in way) >= ROUNDS for way in rounds):
        for way, (workers, threads) in zip(rounds, ((1, cores), (cores, 1), (1, 1)), strict=True):
            way.append(measure_round(sample, workers, threads, count))
    quiet = [sorted(seconds for seconds, others in way if others < OTHERS) for way in rounds]
    best = [way[0] if way else min(seconds for seconds, _ in all_) for way, all_ in zip(quiet, rounds, strict=True)]
    got = "/".join(str(len(way)) for way in quiet)
    times = f"{1e3 * best[0]:.2f} | {1e3 * best[1]:.2f} | {best[0] / best[1]:.2f} | {best[2] / best[1]:.2f}"
    print(f"| {m} x {n} | {times} | {got} of {len(rounds[0])} |", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", default=SHAPES)
    options.add_argument("--seconds", type=float, default=1.0, help="of a round")
    options.add_argument("--patience", type=float, default=60.0)
    given = options.parse_args()
    cores = count_cores()
    print(f"{cores} cores; milliseconds a matrix\n")
    print("| matrix | one after the other, all threads | side by side, one thread each | ratio | "
          "one worker of one thread / side by side | quiet rounds |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in given.shapes.split(","):
        bench_shape(shape, cores, given.seconds, given.patience)


if __name__ == "__main__":
    main()
