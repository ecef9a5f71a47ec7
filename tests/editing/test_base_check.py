"""BASE that is not the model FT was trained from: refused or warned of before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pome
from pome import EditSpec, PairingError
from pome.editing.base_check import SAMPLE, sample_units
from pome.editing.session import open_pair
from pome.inspection.suggest import suggest
from pome.inspection.survey import survey
from pome.output.progress import Progress
from support.checkpoints import LLAMA, perturb, random_llama, read_manifest, write_checkpoint

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def make(folder: Path, change: Change, layers: int = 3, **options: Any) -> list[Path]:
    base = random_llama(layers, **options)
    return [write_checkpoint(folder / n, t, config=LLAMA) for n, t in (("base", base), ("ft", change(base)))]


def redraw(base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(base[name].dtype) for name, t in random_llama(3, seed=99).items()}


OTHERS: dict[str, Change] = {
    "drawn anew": redraw,
    "the other sign": lambda base: {name: -t for name, t in base.items()},
    "layers in another order": lambda base: {
        name: base[name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace("x", "1")
                   if "layers" in name else name].clone()
        for name in base
    },
    "rows in another order": lambda base: {name: t.roll(1, 0) for name, t in base.items()},
    "no relation in scale or sign": lambda base: {name: 40 * torch.rand(t.shape) for name, t in base.items()},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", OTHERS)
def test_a_base_that_is_not_ft_s_is_refused_before_anything_is_staged(
    other: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, ft = make(tmp_path, OTHERS[other], dtype=dtype)
    with pytest.raises(PairingError, match=r"base: does not look like .* is taken as pretrained, .*allow_other_base"):
        pome.edit(base, ft, tmp_path / "out", EditSpec(layers=("ffn",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft"]
    notes = Notes()
    manifest = pome.edit(base, ft, tmp_path / "out", EditSpec(layers=("ffn",), allow_other_base=True), notes)
    assert manifest.spec["allow_other_base"] is True
    (note,) = notes.notes
    assert "does not look like" in note and read_manifest(tmp_path / "out")["notices"] == [note]


@pytest.mark.parametrize(("amount", "said"), [(0.0005, False), (0.01, False), (0.02, True), (0.05, True)])
def test_a_large_update_is_warned_of_and_written(amount: float, said: bool, tmp_path: Path) -> None:
    """Weights of deviation 0.05: the share of the update is `amount` over that, and 0.3 is too much."""
    base, ft = make(tmp_path, lambda base: perturb(base, amount))
    notes = Notes()
    pome.edit(base, ft, tmp_path / "out", progress=notes)
    assert ["is taken as pretrained" in note for note in notes.notes] == [True] * said


def test_half_of_the_sample_is_enough_to_go_on(tmp_path: Path) -> None:
    """Two of four layers trained anew, as when layers are added: no reason to refuse the others."""

    def change(base: dict[str, Tensor]) -> dict[str, Tensor]:
        fresh = random_llama(4, seed=99)
        return perturb({n: fresh[n] if "layers.0." in n or "layers.3." in n else t for n, t in base.items()})

    base, ft = make(tmp_path, change, layers=4)
    assert len(pome.edit(base, ft, tmp_path / "out").tensors) == 4
    with pytest.raises(PairingError, match="in 2 of 3 sampled tensors"):
        pome.edit(base, ft, tmp_path / "other", EditSpec(exclude=(r"layers\.1\.",)))


def test_the_sample_is_small_and_spread_over_the_depth(tmp_path: Path) -> None:
    base, ft = make(tmp_path, perturb, layers=30)
    with open_pair(base, ft, EditSpec()) as opened:
        layers = [int(unit.name.split(".")[2]) for unit in sample_units(opened.plan)]
    assert len(layers) == SAMPLE and layers == sorted(layers) and (layers[0], layers[-1]) == (0, 29)
    assert max(b - a for a, b in zip(layers, layers[1:], strict=False)) <= 5


def test_a_fused_half_is_compared_with_itself(tmp_path: Path) -> None:
    """Only the up half is trained from BASE; the gate half, drawn anew, is not what is edited."""
    name = "model.layers.0.mlp.gate_up_proj.weight"
    torch.manual_seed(0)
    base = {name: torch.randn(80, 16)}
    ft = {name: torch.cat([torch.randn(40, 16), base[name][40:] + 0.01 * torch.randn(40, 16)])}
    config = {"model_type": "phi3", "hidden_size": 16}
    sides = [write_checkpoint(tmp_path / side, t, config=config) for side, t in (("base", base), ("ft", ft))]
    assert len(pome.edit(*sides, tmp_path / "out").tensors) == 1
    with pytest.raises(PairingError, match="does not look like"):
        pome.edit(*sides, tmp_path / "gate", EditSpec(layers=("gate",)))


def test_a_suggestion_says_that_base_looks_wrong(tmp_path: Path) -> None:
    base, ft = make(tmp_path, redraw)
    found = survey(base, ft)
    suggestion = suggest(str(base), str(ft), found.matrices)
    assert (suggestion.title, suggestion.command) == ("BASE looks wrong", "")
    assert f"{base} is taken as pretrained" in suggestion.why
