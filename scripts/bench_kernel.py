"""Time the kernel beside what it replaces and beside what it cannot avoid.

    python scripts/bench_kernel.py                      every shape and spectrum, 2 threads (about half an hour)
    python scripts/bench_kernel.py --shapes 5632x2048 --spectra flat,inverse --repeat 3
    python scripts/bench_kernel.py --shapes 5632x2048,11008x4096 --ranks 8,16,32,64,128,256 --power 1
    python scripts/bench_kernel.py --shapes 1536x576,5632x2048 --equivalence

For each matrix, in one process and in turn: `pome.kernel.equalize`, `torch.linalg.svd(full_matrices=False)` in float32
with the two products that make its P, and the floor: one Gram product, one float32 `eigh` of the short side, and the
two products with the long side. Each is the best of --repeat. Then many experts in a loop, and an adapter's factors.

With --ranks: the thin route beside the ladder, for each of these numbers of directions, whether or not pome would try
it. `rule` says whether it would. `leading` is the time of an extraction's own rung. The true share of the optimum comes
from singular values in float64.

With --equivalence: the method `equivalence` on a bfloat16 pair of Gaussian weights beside the equalizing edit of the
same pair, and beside its definition by `torch.linalg.svd` and `svdvals` in float64.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch
from torch import Tensor

from pome.kernel import ladder
from pome.kernel.certificate import certify
from pome.kernel.decomposition import Truncation
from pome.kernel.equalize import Recipe, equalize, equalize_matrix, equalize_product
from pome.kernel.equivalence import match_spectrum
from pome.kernel.ladder import SHARE, is_thin
from pome.kernel.rank import RankRule

Result = TypeVar("Result")
RECIPE = Recipe(RankRule("ratio", 0.5))
SHAPES = "5632x2048,11008x4096,4096x14336"
SPECTRA = ("flat", "inverse", "inverse-root", "strong", "rounded-lora", "deficient")


def make_delta(kind: str, m: int, n: int) -> Tensor:
    """A float32 m x n delta with the named spectrum, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    r = min(m, n)
    i = torch.arange(1.0, r + 1)
    if kind == "flat":
        return draw(m, n) * 1e-3
    if kind == "inverse":
        return plant(1.0 / i, m, n, draw)
    if kind == "inverse-root":
        return plant(1.0 / i.sqrt(), m, n, draw)
    if kind == "strong":  # 64 directions, 3 to 300 times above the edge of the noise
        strength = torch.logspace(0.5, 2.5, 64) * (m**0.5 + n**0.5) / (m * n) ** 0.5
        return (draw(m, n) + (draw(m, 64) * strength) @ draw(64, n)) * 1e-4
    if kind == "rounded-lora":  # rank 16, merged into bfloat16 weights and rounded
        base = (draw(m, n) * 0.02).bfloat16().float()
        return (base + draw(m, 16) @ draw(16, n) * 5e-5).bfloat16().float() - base
    if kind == "deficient":
        return draw(m, r // 2) @ draw(r // 2, n) * 1e-4
    raise SystemExit(f"unknown spectrum {kind!r}: one of {', '.join(SPECTRA)}")


def plant(sigma: Tensor, m: int, n: int, draw: Callable[..., Tensor]) -> Tensor:
    """A matrix with these singular values between random orthonormal bases."""
    left = torch.linalg.qr(draw(max(m, n), sigma.numel())).Q
    right = torch.linalg.qr(draw(sigma.numel(), sigma.numel())).Q
    tall = (left * sigma) @ right
    return tall if m >= n else tall.mT.contiguous()


def run_svd(D: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The obvious way: P and the singular values."""
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    return U[:, :k] @ Vh[:k], s.double()


def run_floor(D: Tensor, k: int) -> Tensor:
    """What no route through a Gram matrix avoids, and what alone is not accurate enough."""
    tall = D if D.shape[0] >= D.shape[1] else D.mT
    _, V = torch.linalg.eigh(tall.mT @ tall)
    kept = V[:, -k:]
    return (tall @ kept) @ kept.mT


def clock(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    return clock_result(work)[0]


def clock_result(work: Callable[..., Result], *arguments: object) -> tuple[float, Result]:
    """Seconds that `work` takes, and what it gives."""
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


def bench_matrix(shape: str, kind: str, repeat: int) -> None:
    m, n = (int(side) for side in shape.split("x"))
    D = make_delta(kind, m, n)
    ours, svd, floor, proof = [], [], [], []
    for _ in range(repeat):
        seconds, edit = clock_result(equalize, D)
        ours.append(seconds)
        floor.append(clock_result(run_floor, D, edit.k)[0])
        seconds, (P, sigma) = clock_result(run_svd, D, edit.k)
        svd.append(seconds)
        found = Truncation(P, sigma, edit.rank, edit.k, 0.0)
        seconds, theirs = clock_result(certify, found, (D,))
        proof.append(seconds)
    print(
        f"{shape:>11} {kind:<13} {edit.solver:<17}{min(ours):7.3f}{min(svd):7.3f}{min(floor):7.3f}"
        f"{min(svd) / min(ours):9.2f}{min(ours) / min(floor):9.2f}{100 * min(proof) / min(ours):7.1f}%"
        f"{edit.rank:7}{edit.k:6}{1 - edit.objective:10.0e}{edit.orthogonality:9.0e}"
        f"{1 - theirs.objective:10.0e}{theirs.orthogonality:9.0e}",
        flush=True,
    )


def bench_thin(shape: str, kind: str, ranks: list[int], power: float, repeat: int) -> None:
    """Thin route and ladder in turn, and how far the thin answer is from the optimum by float64 singular values."""
    m, n = (int(side) for side in shape.split("x"))
    D = make_delta(kind, m, n)
    tall = (D if m >= n else D.mT).double()
    sigma = torch.linalg.eigvalsh(tall.mT @ tall).flip(0).clamp_min(0.0).sqrt()
    del tall
    for k in ranks:
        rule = RankRule("fixed", k)
        chosen, thin, slow, leading = is_thin(D, rule), [], [], []
        for _ in range(repeat):
            for share, times in ((0.0, slow), (1.0, thin)):
                ladder.SHARE = share
                seconds, edit = clock_result(equalize_matrix, D, Recipe(rule, power=power))
                times.append(seconds)
            ladder.SHARE = SHARE
            leading.append(clock_result(equalize_matrix, D, Recipe(rule, power=power, leading_only=True))[0])
        objective = float(sum((D[i] * edit.value[i]).double().sum() for i in range(m))) / edit.alpha
        objective /= float(sigma[:k].pow(1.0 + power).sum())
        print(
            f"{shape:>11} {kind:<13}{k:5} {edit.solver:<17}{min(thin):8.3f}{min(slow):8.3f}"
            f"{min(leading):9.3f}{min(slow) / min(thin):13.2f}{'thin' if chosen else 'ladder':>8}"
            f"{1 - edit.objective:10.0e}{1 - objective:10.0e}{edit.orthogonality:9.0e}{edit.power_residual:10.0e}",
            flush=True,
        )


def bench_equivalence(shape: str, repeat: int) -> None:
    m, n = (int(side) for side in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    W_base = (torch.randn(m, n, generator=generator) * 0.02).bfloat16()
    W_ft = (W_base.float() + 0.001 * torch.randn(m, n, generator=generator)).bfloat16()

    def define() -> Tensor:
        U, _, Vh = torch.linalg.svd(W_ft.double(), full_matrices=False)
        return (U * torch.linalg.svdvals(W_base.double())) @ Vh - W_base.double()

    ours, other, svd = [], [], []
    for _ in range(repeat):
        seconds, found = clock_result(match_spectrum, W_base, W_ft)
        ours.append(seconds)
        other.append(clock_result(lambda: equalize(W_ft.float() - W_base.float()))[0])
        seconds, edit = clock_result(define)
        svd.append(seconds)
    error = float((found.value.double() - edit).norm() / edit.norm())
    print(
        f"{shape:>11} {found.solver:<13}{min(ours):8.2f}{min(other):10.2f}{min(svd):8.2f}"
        f"{min(ours) / min(other):15.2f}{min(svd) / min(ours):10.2f}{error:9.0e}",
        flush=True,
    )


def bench_experts(count: int, m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(count, m, n, generator=generator) * 1e-3
    k = equalize(experts[0]).k
    ours = clock(lambda: [equalize(expert) for expert in experts])
    svd = clock(lambda: [run_svd(expert, k) for expert in experts])
    print(f"{count} experts of {m}x{n}: {ours:.2f} s, SVD loop {svd:.2f} s, {svd / ours:.2f} times faster")
    some = experts[:8]
    squares = some @ some.mT
    for name, loop, batch in (
        ("Gram products", lambda: [matrix @ matrix.mT for matrix in some], lambda: some @ some.mT),
        ("eigh", lambda: [torch.linalg.eigh(square) for square in squares], lambda: torch.linalg.eigh(squares)),
    ):
        one, all_at_once = (min(clock(work) for _ in range(3)) for work in (loop, batch))
        print(f"  {name} of 8 experts: loop {one:.3f} s, batch {all_at_once:.3f} s")


def bench_adapter(m: int, n: int, r: int) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    equalize_product(b, a, RECIPE)
    thin = min(clock(lambda: equalize_product(b, a, RECIPE)) for _ in range(5))
    dense = clock(lambda: equalize(make_delta("rounded-lora", m, n)))
    print(f"rank-{r} adapter on {m}x{n}: {thin:.4f} s, {100 * thin / dense:.2f} % of the dense {dense:.2f} s")


MEMORY = """
import pathlib, re, resource, sys, torch
from pome.kernel.equalize import equalize
m, n = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with what the process that started this one had
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
equalize(torch.randn(64, 32))  # what torch loads when it computes for the first time
before = peak()
equalize(torch.randn(m, n))
print((peak() - before) / (4 * m * n))
"""


def measure_memory(m: int, n: int) -> None:
    """Peak resident memory of one unit, its delta included, in a process of its own."""
    said = subprocess.run(
        [sys.executable, "-c", MEMORY, str(m), str(n)], check=True, capture_output=True, text=True
    ).stdout
    print(f"memory of one {m}x{n}, the delta included: {float(said):.2f} times the matrix in float32")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", default=SHAPES)
    options.add_argument("--spectra", default=",".join(SPECTRA))
    options.add_argument("--repeat", type=int, default=2)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--experts", type=int, default=128)
    options.add_argument("--ranks", help="compare the thin route with the ladder, at these numbers of directions")
    options.add_argument("--power", type=float, default=0.0)
    options.add_argument("--equivalence", action="store_true", help="time the method equivalence alone")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, seconds, best of {given.repeat}\n")
    if given.equivalence:
        print(
            f"{'shape':>11} {'solver':<13}{'ours':>8}{'equalize':>10}{'svd':>8}"
            f"{'ours/equalize':>15}{'svd/ours':>10}{'error':>9}"
        )
        for shape in given.shapes.split(","):
            bench_equivalence(shape, given.repeat)
        return
    if given.ranks:
        print(
            f"{'shape':>11} {'spectrum':<13}{'k':>5} {'solver':<17}{'thin':>8}{'ladder':>8}{'leading':>9}"
            f"{'ladder/thin':>13}{'rule':>8}{'1-obj':>10}{'true':>10}{'orth':>9}{'residual':>10}"
        )
        for shape in given.shapes.split(","):
            for kind in given.spectra.split(","):
                bench_thin(shape, kind, [int(k) for k in given.ranks.split(",")], given.power, given.repeat)
        return
    print(
        f"{'shape':>11} {'spectrum':<13} {'solver':<17}{'ours':>7}{'svd':>7}{'floor':>7}{'svd/ours':>9}{'/floor':>9}"
        f"{'proof':>8}{'rank':>7}{'k':>6}{'1-obj':>10}{'orth':>9}{'svd 1-obj':>10}{'orth':>9}"
    )
    for shape in filter(None, given.shapes.split(",")):
        for kind in given.spectra.split(","):
            bench_matrix(shape, kind, given.repeat)
    print()
    if given.experts:
        bench_experts(given.experts, 768, 2048)
        bench_adapter(11008, 4096, 16)
        measure_memory(11008, 4096)
    unit = 1024 if sys.platform == "linux" else 1
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
