"""A LoRA merged into bfloat16: what storage rounding adds to its delta is told apart from its own directions."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor

import pome
from support.checkpoints import read_tensors, run_python, write_checkpoint
from support.reference import reference_edit

RANK = 16
LAYERS = (0, 10, 27)  # with even rounding noise, with outlier rows, and with one row that carries most of it
SHARES = (0.01, 0.1)  # the LoRA's norm by its weight's: half an ulp, and many
LEAVES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def merged(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Layers of a real language model in bfloat16, and the same with a random LoRA merged by PEFT."""
    folder = tmp_path_factory.mktemp("lora")
    names = {f"model.layers.{i}.mlp.{leaf}.weight" for i in LAYERS for leaf in LEAVES}
    base = {name: t for name, t in read_tensors(smollm2).items() if name in names}
    config = json.loads((smollm2 / "config.json").read_bytes())
    return write_checkpoint(folder / "base", base, config=config), write_checkpoint(
        folder / "ft", merge(base), config=config
    )


def merge(base: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT makes of a weight and a LoRA of random directions, the shares of the norm alternating."""
    torch.manual_seed(0)
    found = {}
    for at, (name, W) in enumerate(base.items()):
        module = torch.nn.Sequential(torch.nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype))
        with torch.no_grad():
            module[0].weight.copy_(W)
        model = peft.get_peft_model(module, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
        lora = model.base_model.model[0]
        with torch.no_grad():
            A, B = lora.lora_A["default"].weight.normal_(), lora.lora_B["default"].weight.normal_()
            B *= SHARES[at % len(SHARES)] * float(W.float().norm()) / float((B.float() @ A.float()).norm())
        found[name] = model.merge_and_unload()[0].weight.detach().clone()
    return found


def test_the_default_edit_of_a_merged_lora_warns_with_numbers_and_the_way_out(
    merged: tuple[Path, Path], tmp_path: Path
) -> None:
    manifest = pome.edit(*merged, tmp_path / "out", pome.EditSpec(layers=("ffn",)))
    assert len(manifest.tensors) == len(LAYERS) * len(LEAVES)
    for record in manifest.tensors:
        assert record.k > 10 * RANK  # the rounding has full rank
        (warning,) = [text for text in record.warnings if "noise" in text]
        assert f"only {RANK} of the {record.k} kept" in warning
        assert f"{record.noise_floor:.2e}" in warning
        assert f"--rank-rule noise-floor keeps k={RANK}" in warning


def test_the_noise_floor_rule_recovers_the_rank_of_a_merged_lora_in_every_matrix(
    merged: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = pome.edit(*merged, out, pome.EditSpec(layers=("ffn",), rank_rule="noise-floor"))
    assert [record.k for record in manifest.tensors] == [RANK] * len(LAYERS) * len(LEAVES)
    assert not any("noise" in text for record in manifest.tensors for text in record.warnings)
    base, ft, edited = (read_tensors(folder) for folder in (*merged, out))
    for record in manifest.tensors[::4]:  # one of each role, in each of the layers
        delta = ft[record.name].double() - base[record.name].double()
        wanted = reference_edit(delta, k=RANK).value
        lost = edited[record.name].double() - (base[record.name].double() + wanted)
        # The edit is the definition's, but for what bfloat16 loses of it, which the record tells; 1e-4 as promised.
        assert float(lost.norm() / wanted.norm()) == pytest.approx(record.rounding, abs=2e-4)


def test_the_command_advises_the_noise_floor_rule(merged: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_python("-m", "pome", "edit", *map(str, merged), str(tmp_path / "out"), "--layers", "gate")
    assert done.returncode == 0
    assert "--rank-rule noise-floor" in done.stdout + done.stderr


def test_an_ordinary_update_does_not_warn(smollm2: Path, tmp_path: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    W = read_tensors(smollm2)[name]
    torch.manual_seed(0)
    # Ten times the spacing of bfloat16 (2^-8 of an entry): a full-rank update that rounding hardly touches.
    ft = (W.float() + 0.04 * W.float().std() * torch.randn(W.shape)).bfloat16()
    base = write_checkpoint(tmp_path / "base", {name: W})
    manifest = pome.edit(base, write_checkpoint(tmp_path / "ft", {name: ft}), tmp_path / "out")
    assert [record.warnings for record in manifest.tensors] == [()]


def test_the_weights_are_a_language_model_that_transformers_runs(smollm2: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        following = model(**inputs).logits[0, -1]
    assert tokenizer.decode([int(following.argmax())]) == " Paris"
