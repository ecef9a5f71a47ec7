"""Every rung on every device of this machine, held to a float64 decomposition on the CPU.

`scripts/bench_gpu.py` runs this file beside its measurements. Without an accelerator the CPU is the only device.
"""

from __future__ import annotations

import pytest
import torch

from pome.config.spec import EditSpec
from pome.editing.unit import TORCH_DTYPES, list_devices, patch_unit, to_bytes
from pome.kernel.certificate import certify
from pome.kernel.equalize import equalize
from pome.kernel.ladder import RUNGS, move
from pome.kernel.rank import RankRule
from pome.planning.units import Unit
from support.units import make_unit

DEVICES = list(dict.fromkeys(["cpu", *list_devices("auto")]))


def make_delta(m: int, n: int) -> torch.Tensor:
    """Strong directions over noise, as a fine-tuning delta has them, with a gap at n // 2."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(side, n, dtype=torch.float64)).Q for side in (m, n))
    sigma = torch.cat((torch.linspace(30.0, 3.0, n // 2), torch.linspace(1.0, 0.5, n - n // 2)))
    return (U * sigma) @ V.mT


def find_polar(D: torch.Tensor, k: int) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(D.double().cpu(), full_matrices=False)
    return U[:, :k] @ Vh[:k]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rung", [name for name, _ in RUNGS])
@pytest.mark.parametrize("shape", [(500, 240), (240, 500)])
def test_a_rung_is_certified_and_right(rung: str, device: str, shape: tuple[int, int]) -> None:
    D = make_delta(max(shape), min(shape)).float()
    D = (D if shape[0] >= shape[1] else D.mT.contiguous()).to(device)
    found = dict(RUNGS)[rung](D, RankRule("ratio", 0.5))
    assert found.k == 120 and certify(move(found, D.device), (D,)).find_fault() is None
    wanted = find_polar(D, 120)
    assert float((found.M.cpu().double() - wanted).norm() / wanted.norm()) < 1e-4  # what decides of a gap, SUBSPACE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_ladder_gives_what_the_cpu_gives(device: str, power: float) -> None:
    D = make_delta(400, 200).float()
    here, there = equalize(D, power=power), equalize(D.to(device), power=power)
    assert (here.rank, here.k) == (there.rank, there.k)
    assert float((there.value.cpu() - here.value).norm() / here.value.norm()) < 2e-4


@pytest.mark.parametrize("device", DEVICES)
def test_an_edit_on_a_device_writes_what_the_cpu_writes_but_for_the_last_bit(device: str) -> None:
    unit: Unit = make_unit((400, 200))
    base = torch.randn(400, 200, dtype=torch.float64) * 0.02
    ft = base + 1e-3 * make_delta(400, 200)
    data = [to_bytes(side.to(TORCH_DTYPES["F32"])) for side in (ft, base)]
    outs = []
    for place in ("cpu", device):
        patch = patch_unit(unit, bytearray(data[0]), data[1], EditSpec(), place)
        assert patch.data is not None
        outs.append(torch.frombuffer(patch.data, dtype=torch.float32))
    assert float((outs[0] - outs[1]).abs().max()) < 1e-5
