"""Random draws of POET from (seed, layer name, number): permutations, probes and rounding.

A draw uses a generator of its own, on the CPU, so it touches no global random state and comes out the same on every
rank and device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from pome.errors import SpecError
from pome.poet.config import SpectrumFunction
from pome.poet.rotation import Blocks


def generator(*parts: int | str) -> torch.Generator:
    """Generator seeded by a hash of `parts`."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_index(seed: int, name: str, side: str, number: int, dimension: int, blocks: Blocks) -> Tensor:
    """Rotated dimensions, block after block, (blocks.dimensions,) int64; sorted within a block for locality."""
    shuffled = torch.randperm(dimension, generator=generator(seed, name, side, number))[: blocks.dimensions]
    border = blocks.full * blocks.size
    full = shuffled[:border].view(blocks.full, blocks.size).sort(1).values.flatten()
    return torch.cat([full, shuffled[border:].sort().values])


def draw_probe(seed: int, name: str, side: str, dimension: int) -> Tensor:
    """Probe vector of one side, (dimension,) float32, standard normal."""
    return torch.randn(dimension, generator=generator(seed, name, side, "probe"))


def round_stochastically(weight: Tensor, randomness: torch.Generator) -> Tensor:
    """A float32 tensor in bfloat16, rounded up or down with the probability that makes the mean exact."""
    noise = torch.randint(0, 1 << 16, weight.shape, generator=randomness, dtype=torch.int32).to(weight.device)
    bits = weight.contiguous().view(torch.int32) + noise
    return bits.bitwise_and(~0xFFFF).view(torch.float32).to(torch.bfloat16)


def draw_weight(init: str | SpectrumFunction, fan_out: int, fan_in: int, seed: int, name: str) -> Tensor:
    """A weight for training from scratch, (fan_out, fan_in) float32; `init` as in `PoetConfig`."""
    randomness = generator(seed, name, "init")
    gaussian = torch.randn(fan_out, fan_in, generator=randomness)
    if init == "normalized":
        return nn.functional.normalize(gaussian, dim=1)
    if init == "standard":
        return 0.02 * gaussian
    if init == "xavier":
        bound = (6 / (fan_in + fan_out)) ** 0.5
        return torch.empty(fan_out, fan_in).uniform_(-bound, bound, generator=randomness)
    short = min(fan_out, fan_in)
    if init == "uniform":
        spectrum = torch.ones(short, dtype=torch.float64)
    elif init == "power-law":
        spectrum = torch.arange(1, short + 1, dtype=torch.float64) ** -0.5
        spectrum = spectrum * (short / spectrum.square().sum()).sqrt()
    else:
        assert not isinstance(init, str)
        spectrum = given_spectrum(init, short, name)
    left, _ = torch.linalg.qr(torch.randn(fan_out, short, generator=randomness))
    right, _ = torch.linalg.qr(torch.randn(fan_in, short, generator=randomness))
    return torch.mm(left * spectrum.float(), right.T)


def given_spectrum(init: SpectrumFunction, count: int, name: str) -> Tensor:
    """Singular values of the user's function for one layer, (count,) float64. Raises `SpecError` for others."""
    spectrum = torch.as_tensor(init(count), dtype=torch.float64).cpu()
    if spectrum.shape != (count,) or not bool(spectrum.isfinite().all()) or bool((spectrum < 0).any()):
        raise SpecError(
            f"init for {name} gave {tuple(spectrum.shape)}; it must give {count} finite values of at least 0"
        )
    return spectrum
