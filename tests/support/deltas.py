"""Float32 matrices of kinds that have broken solvers."""

import torch

from support.reference import plant


def make_delta(kind, m, n, seed):
    """A float32 matrix (m x n) of one of KINDS; with both sides over 96 the whole ladder is tried."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    r = min(m, n)
    i = torch.arange(r, dtype=torch.float64)
    spectra = {
        "inverse": 1.0 / (i + 1.0),
        "inverse-root": 1.0 / (i + 1.0).sqrt(),
        "geometric": 10.0 ** (-8.0 * i / r),
        "gentle": 10.0 ** (-2.0 * i / r),
        "staircase": 10.0 ** -(i * 6 / r).floor(),
        "spike": torch.where(i < 2, 1e6, 1.5 - i / r),
        "step": torch.where(i < r // 2, 1.0, 0.9985),
        "clusters": 10.0 ** -(i * 3 / r).floor() * (1.0 + 1e-4 * torch.rand(r, generator=generator)),
        "at-the-threshold": torch.where(i < r // 3, 1.5 - i / r, 10.0 ** (-6.2 - i / r)),
        "deficient": torch.where(i < 2 * r // 3, 1.0 / (i + 1.0).sqrt(), 0.0),
        "orthogonal": torch.ones(r),
    }
    if kind in spectra:
        return plant(spectra[kind], m, n, seed)
    if kind == "noise":
        return draw(m, n) * 1e-3
    if kind == "strong":
        return draw(m, n) + (draw(m, 20) * torch.logspace(0, 2, 20)) @ draw(20, n)
    if kind == "rounded-lora":
        base = (draw(m, n) * 0.02).bfloat16().float()
        return (base + draw(m, 8) @ draw(8, n) * 1e-4).bfloat16().float() - base
    if kind == "low-rank":
        return draw(m, 7) @ draw(7, n)
    if kind == "integer":
        return torch.randint(-3, 4, (m, n), generator=generator).float()
    if kind == "sparse":
        return draw(m, n) * (torch.rand(m, 1, generator=generator) < 0.3) * (torch.rand(n, generator=generator) < 0.6)
    if kind == "signs":
        return draw(m, n).sign() * 2e-5
    assert kind == "hilbert"
    return 1.0 / (torch.arange(m)[:, None] + torch.arange(n) + 1.0)


KINDS = [
    *("inverse", "inverse-root", "geometric", "gentle", "staircase", "spike", "step", "clusters", "at-the-threshold"),
    *("deficient", "orthogonal", "noise", "strong", "rounded-lora", "low-rank", "integer", "sparse", "signs"),
    "hilbert",
]
