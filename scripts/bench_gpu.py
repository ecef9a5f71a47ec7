#!/usr/bin/env python3
"""Everything about one accelerator in one go of under ten minutes; or about the CPU, at sizes that it can do.

    scripts/bench_gpu.py [--device cuda:0] [--beside-cpu] [--budget SECONDS] [--pair FOLDER] [--rates FILE] [--table]

prints, as tables in Markdown: rates of products in float32, TF32 and float64; `eigh` and every driver of
`torch.linalg.svd` at 768 to 16384; every rung of the kernel with its certificate; whether the device tests of the suite
pass; and the whole command on the pair of make_llama_pair.py (2.2 GB each). It writes the rates that `pome estimate`
reads, under the device's name, into --rates (default: rates.json here), and with --table into the repository's table.

Each section has its share of the budget. What would not fit, by the time of the size before, is left out and said so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch

from bench_edit import SCRIPTS, run
from bench_kernel import make_delta
from pome.editing.measurement import Probe, measure_device
from pome.editing.run_rates import COMMAND_SECONDS
from pome.editing.unit import list_devices
from pome.kernel.certificate import certify
from pome.kernel.decomposition import Undecided
from pome.kernel.ladder import RUNGS, move
from pome.kernel.precision import full_precision
from pome.kernel.rank import RankRule
from pome.planning.devices import find_device
from pome.planning.rates import TABLE, Rates, read_table, to_json
from pome.planning.split import count_cores

SIDES = (768, 1024, 2048, 4096, 8192, 16384)
SHAPES = ((1024, 512), (5632, 2048), (11008, 4096), (28672, 8192))
# Of the rates: the routes of small experts, of SmolLM2, of 1B, of 7B and more.
RATED = (
    Probe(64, 32), Probe(256, 128), Probe(768, 512), Probe(1536, 576), Probe(2048, 768), Probe(2048, 1408),
    Probe(5632, 2048), Probe(11008, 4096), Probe(1024, 512, "F64"), Probe(2048, 768, "BF16", 16),
    Probe(5632, 2048, "BF16", 16), Probe(5632, 2048, "BF16", 16, edited=False),
)  # fmt: skip
# Of the budget, in the order of the run.
SHARES = {"products": 0.08, "decompositions": 0.22, "rungs": 0.2, "rates": 0.25, "tests": 0.1, "command": 0.15}


class Section:
    """A part of the run with its share of the budget."""

    def __init__(self, name: str, budget: float) -> None:
        self.ends = time.monotonic() + SHARES[name] * budget

    def has_room(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self.ends


def clock(device: str, work: Callable[[], object], repeat: int = 2) -> float:
    """Seconds of the fastest of `repeat` calls; one that took over five seconds is not repeated."""
    best = math.inf
    for _ in range(repeat):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - begun)
        if best > 5.0:
            break
    return best


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure_cell(section: Section, device: str, before: float, growth: float, work: Callable[[], object]) -> float:
    """Seconds, or NaN where it would take longer than the section has left; `before` is the time of the last size."""
    if not section.has_room(growth * before):
        return math.nan
    try:
        return clock(device, work)
    except (RuntimeError, TypeError) as error:  # not on this device, out of memory, not converged
        print(f"<!-- {type(error).__name__}: {str(error).splitlines()[0][:120]} -->")
        return math.nan


def show(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds:.4g}"


def bench_products(device: str, section: Section) -> None:
    print(
        "\n## Products, operations a second in 10^12\n\n| side | float32 | TF32 | float64 |\n| --- | --- | --- | --- |"
    )
    last = [0.0, 0.0, 0.0]
    for n in SIDES[1:]:
        cells = []
        for column, dtype in enumerate((torch.float32, torch.float32, torch.float64)):
            exact = full_precision(torch.device(device)) if column != 1 else tf32()
            seconds = math.nan
            if not math.isnan(last[column]) and (column != 1 or device.startswith("cuda")):
                with exact:
                    seconds = measure_cell(
                        section, device, last[column], 16.0, lambda n=n, d=dtype: multiply(device, n, d)
                    )
            last[column] = seconds
            cells.append("-" if math.isnan(seconds) else f"{2 * n**3 / seconds / 1e12:.3g}")
        print(f"| {n} | {' | '.join(cells)} |", flush=True)


_held: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}


def multiply(device: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    return hold(device, n, dtype) @ hold(device, n, dtype)


def hold(device: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    """A random matrix, made once for the calls that follow each other."""
    if (device, n, dtype) not in _held:
        _held.clear()
        _held[device, n, dtype] = torch.randn(n, n).to(dtype).to(device)
    return _held[device, n, dtype]


def bench_decompositions(device: str, section: Section) -> None:
    drivers = ("gesvd", "gesvdj", "gesvda") if device.startswith("cuda") else (None,)
    columns: list[tuple[str, Callable[[int], object]]] = []
    for dtype in (torch.float32, torch.float64):
        short = str(dtype).removeprefix("torch.")
        columns.append((f"eigh {short}", lambda n, d=dtype: torch.linalg.eigh(hold(device, n, d))))
    for dtype in (torch.float32, torch.float64):
        for driver in drivers:
            short = f"svd {driver or ''} {str(dtype).removeprefix('torch.')}".replace("  ", " ")
            columns.append((short, lambda n, d=dtype, v=driver: torch.linalg.svd(hold(device, n, d), False, driver=v)))
    print("\n## Decompositions of a square matrix, seconds\n")
    print(f"| side | {' | '.join(name for name, _ in columns)} |\n| --- |{' --- |' * len(columns)}")
    last = [0.0] * len(columns)
    for n in SIDES:
        for i, (_, work) in enumerate(columns):
            if not math.isnan(last[i]):
                last[i] = measure_cell(section, device, last[i], 10.0, lambda n=n, work=work: work(n))
        print(f"| {n} | {' | '.join(map(show, last))} |", flush=True)


def bench_rungs(device: str, section: Section) -> None:
    print(
        "\n## Rungs of the kernel\n\n| matrix | spectrum | rung | seconds | 1 - objective | orthogonality | verdict |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    last = {name: 0.0 for name, _ in RUNGS}
    for m, n in SHAPES:
        for kind in ("flat", "strong"):
            D = make_delta(kind, m, n).to(device) if section.has_room(0.0) else None
            for name, solve in RUNGS:
                if D is None or not section.has_room(20.0 * last[name]):
                    print(f"| {m} x {n} | {kind} | {name} | - | | | left out for want of time |", flush=True)
                    last[name] = math.inf
                    continue
                try:
                    with full_precision(D.device):
                        synchronize(device)
                        begun = time.perf_counter()
                        found = solve(D, RankRule("ratio", 0.5))
                        synchronize(device)
                        last[name] = time.perf_counter() - begun
                        proof = certify(move(found, D.device), (D,))
                    said = proof.find_fault() or "certified"
                    numbers = f"{last[name]:.3g} | {1 - proof.objective:.0e} | {proof.orthogonality:.0e}"
                except (RuntimeError, Undecided) as failure:
                    said, numbers = str(failure).splitlines()[0][:80], " | | "
                print(f"| {m} x {n} | {kind} | {name} | {numbers} | {said} |", flush=True)


def bench_tests(section: Section) -> None:
    tests = SCRIPTS.parent / "tests" / "kernel" / "test_devices.py"
    print("\n## Device tests of the suite\n")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", tests, "-q"], capture_output=True, text=True, cwd=SCRIPTS.parent,
            timeout=max(30.0, section.ends - time.monotonic()),
        )  # fmt: skip
        print(f"{'passed' if done.returncode == 0 else 'FAILED'}: {(done.stdout.strip().splitlines() or ['?'])[-1]}")
    except subprocess.TimeoutExpired:
        print("left out for want of time")


def bench_command(devices: list[str], pair: Path | None, section: Section, layers: int) -> None:
    print("\n## The whole command\n\n| device | matrices | seconds | peak, MiB |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="pome-bench-") as work:
        if pair is None:
            pair = Path(work) / "pair"
            run(sys.executable, SCRIPTS / "make_llama_pair.py", pair, "--layers", str(layers))
        for device in devices:
            out = Path(work) / f"out-{device.replace(':', '-')}"
            edited = run(
                sys.executable, "-m", "pome", "edit", pair / "base", pair / "ft", out, "--device", device, "--quiet"
            )
            peak = f"{edited.peak / 2**20:.0f}" if edited.peak else "-"  # this process has held more
            print(f"| {device} | {layers} | {edited.seconds:.1f} | {peak} |", flush=True)


def measure_start() -> float:
    """Seconds that a process takes to load torch, the second time."""
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        seconds.append(time.perf_counter() - begun)
    return seconds[-1]


def write_rates(device: str, budget: float, file: Path, table: bool) -> None:
    name = find_device(device if device != "cpu" else "cpu").name
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    rates = measure_device(RATED, list_devices(device)[:1], count_cores(), ".", SHARES["rates"] * budget)
    measured = f"{datetime.date.today().isoformat()}, by scripts/bench_gpu.py with torch {torch.__version__}"
    rates = Rates(measured, COMMAND_SECONDS + measure_start(), rates.copy_bytes, rates.hash_bytes, rates.routes)
    file.write_text(to_json({name: rates}))
    print(f"\n## Rates of {name}\n\n| route | size | operations a second in 10^9 |\n| --- | --- | --- |")
    for route, points in rates.routes.items():
        for size, rate in points:
            print(f"| {route} | {size:.0f} | {rate / 1e9:.3g} |")
    if table:
        path = SCRIPTS.parent / "src" / "pome" / "planning" / TABLE
        path.write_text(to_json({**read_table(), name: rates}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--beside-cpu", action="store_true", help="the command and the rates of the CPU too")
    parser.add_argument("--budget", type=float, default=540.0)
    parser.add_argument("--pair", type=Path, help="folder of make_llama_pair.py; made unless given")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rates", type=Path, default=Path("rates.json"))
    parser.add_argument("--table", action="store_true", help="also into the repository's table")
    parser.add_argument("--only-rates", action="store_true", help="nothing but the rates that the estimate reads")
    given = parser.parse_args()
    device = list_devices(given.device)[0]
    if given.only_rates:
        write_rates(device, given.budget, given.rates, given.table)
        return
    begun = time.monotonic()
    print(f"# {find_device(device).name}\n\n{datetime.date.today().isoformat()}, torch {torch.__version__}, CUDA "
          f"{torch.version.cuda}, {platform.platform()}, {count_cores()} cores")  # fmt: skip
    bench_products(device, Section("products", given.budget))
    bench_decompositions(device, Section("decompositions", given.budget))
    bench_rungs(device, Section("rungs", given.budget))
    _held.clear()
    write_rates(device, given.budget, given.rates, given.table)
    if given.beside_cpu and device != "cpu":
        write_rates("cpu", given.budget / 3, given.rates.with_suffix(".cpu.json"), given.table)
    bench_tests(Section("tests", given.budget))
    both = [device, "cpu"] if given.beside_cpu and device != "cpu" else [device]
    bench_command(both, given.pair, Section("command", given.budget), given.layers)
    print(f"\n{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
