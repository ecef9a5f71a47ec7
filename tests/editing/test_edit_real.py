"""The edit on weights that somebody trained: a BERT and its two fine-tunes, and three small encoder-decoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import pome
from pome import EditSpec, PairingError
from real_weights import Pair, Trio
from support.checkpoints import assert_only_edited, count_ulps, read_tensors, write_checkpoint
from support.reference import Reference, reference_edit

LAYERS = range(12)
UP = [f"bert.encoder.layer.{i}.intermediate.dense.weight" for i in LAYERS]
DOWN = [f"bert.encoder.layer.{i}.output.dense.weight" for i in LAYERS]


@pytest.fixture(scope="module")
def references(rxnfp: Pair) -> dict[str, Reference]:
    """The edit of every FFN matrix of the BERT pair by definition."""
    base, ft = (read_tensors(folder) for folder in rxnfp)
    return {name: reference_edit(ft[name] - base[name]) for name in UP + DOWN}


def has_gap(reference: Reference) -> bool:
    s = [*reference.sigma.tolist(), 0.0]
    return s[reference.k - 1] - s[reference.k] > 1e-3 * s[reference.k - 1]


def test_a_real_pair_in_float32(rxnfp: Pair, references: dict[str, Reference], tmp_path: Path) -> None:
    manifest = pome.edit(*rxnfp, tmp_path / "out", EditSpec(layers=("ffn",)))
    assert {record.name for record in manifest.tensors} == set(UP + DOWN)
    assert_only_edited(rxnfp.fine_tuned, tmp_path / "out", UP + DOWN)
    base = read_tensors(rxnfp.base)
    compared = 0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as out:
        for record in manifest.tensors:
            wanted = references[record.name]
            assert (record.rank, record.k) == (wanted.rank, wanted.k)
            assert abs(1 - record.objective) <= 1e-5 and record.orthogonality <= 1e-5
            assert record.energy_kept > 0.9  # these deltas fall steeply, so that half the directions hold nearly all
            if has_gap(wanted):
                compared += 1
                edit = out.get_tensor(record.name).double() - base[record.name].double()
                # 1e-4 as promised; float32 storage of weights ten times as large as the edit loses some 1e-6 of it.
                assert float((edit - wanted.value).norm() / wanted.value.norm()) <= 1e-4
    assert compared >= 20


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_real_pair_in_sixteen_bits(rxnfp: Pair, references: dict[str, Reference], tmp_path: Path, dtype: str) -> None:
    """Written in 16 bits from float32, and from and to 16 bits: within a unit in the last place of the reference."""
    kind = getattr(torch, dtype)
    narrow = []
    for side, folder in zip(("base", "ft"), rxnfp, strict=True):
        tensors = {name: t.to(kind) for name, t in read_tensors(folder).items() if t.is_floating_point()}
        narrow.append(write_checkpoint(tmp_path / side, tensors))
    pome.edit(*rxnfp, tmp_path / "from32", EditSpec(dtype=dtype))
    pome.edit(*narrow, tmp_path / "from16")
    assert_only_edited(narrow[1], tmp_path / "from16", UP)
    base32, ft32 = (read_tensors(folder) for folder in rxnfp)
    base16, ft16 = (read_tensors(folder) for folder in narrow)
    outs = [read_tensors(tmp_path / name) for name in ("from32", "from16")]
    apart: list[Tensor] = []
    for name in UP:
        wanted = reference_edit(ft16[name].double() - base16[name].double())
        if has_gap(references[name]):
            apart.append(count_ulps(outs[0][name], (base32[name].double() + references[name].value).to(kind)))
        if has_gap(wanted):
            apart.append(count_ulps(outs[1][name], (base16[name].double() + wanted.value).to(kind)))
    assert len(apart) >= 20
    assert max(int(a.max()) for a in apart) <= 2
    assert float(torch.cat([a.flatten() for a in apart]).le(1).double().mean()) >= 0.999
    for name, tensor in outs[0].items():
        assert name in UP or torch.equal(tensor, ft32[name])


def test_a_real_pair_whose_names_lack_a_prefix(rxnfp_bare: Pair, tmp_path: Path) -> None:
    manifest = pome.edit(*rxnfp_bare, tmp_path / "out")
    bare = [name.removeprefix("bert.") for name in UP]
    assert [record.name for record in manifest.tensors] and {record.name for record in manifest.tensors} == set(bare)
    assert_only_edited(rxnfp_bare.fine_tuned, tmp_path / "out", bare)
    base, ft, out = (read_tensors(folder) for folder in (*rxnfp_bare, tmp_path / "out"))
    wanted = reference_edit(ft[bare[0]] - base[UP[0]])
    edit = out[bare[0]].double() - base[UP[0]].double()
    assert float((edit - wanted.value).norm() / wanted.value.norm()) <= 1e-4  # as promised


def test_equalize_on_a_real_delta(rxnfp: Pair, references: dict[str, Reference]) -> None:
    base, ft = (read_tensors(folder) for folder in rxnfp)
    for name in (UP[0], DOWN[11]):
        wanted = references[name]
        edit = pome.equalize(ft[name] - base[name])
        assert (edit.rank, edit.k) == (wanted.rank, wanted.k)
        assert edit.sigma_max == pytest.approx(float(wanted.sigma[0]), rel=1e-6)
        assert float((edit.value.double() - wanted.value).norm() / wanted.value.norm()) <= 1e-4  # as promised


# Named by an FFN of its own (`positionwise_feedforward`), found by rule without a config.json.
FFN = {
    f"{side}.layers.{i}.positionwise_feedforward.{leaf}.weight": role
    for side in ("encoder", "decoder")
    for i in range(2)
    for leaf, role in (("fc_1", "up"), ("fc_2", "down"))
}


@pytest.mark.parametrize("fine_tune", ["shark", "tcr"])
def test_encoder_decoders_pair_tower_by_tower(anarcii: Trio, tmp_path: Path, fine_tune: str) -> None:
    """Also where the vocabulary has a row more: what is edited has the same shape on both sides."""
    theirs = getattr(anarcii, fine_tune)
    manifest = pome.edit(anarcii.antibody, theirs, tmp_path / "out", EditSpec(layers=("ffn",)))
    assert {record.name: record.role for record in manifest.tensors} == FFN
    assert_only_edited(theirs, tmp_path / "out", FFN)
    base, ft, out = (read_tensors(folder) for folder in (anarcii.antibody, theirs, tmp_path / "out"))
    for record in manifest.tensors:
        wanted = reference_edit(ft[record.name] - base[record.name])
        assert (record.shape, record.k) == (tuple(ft[record.name].shape), wanted.k)
        if has_gap(wanted):
            edit = out[record.name].double() - base[record.name].double()
            # 1e-4 as promised, and what storage loses of an edit that is half a per cent of its weight.
            assert float((edit - wanted.value).norm() / wanted.value.norm()) <= 1e-4 + 2e-5


def test_a_fine_tune_with_another_vocabulary(anarcii: Trio, tmp_path: Path) -> None:
    with pytest.raises(PairingError, match=r"its shape \[137, .*is not BASE's \[136, .*exclude"):
        pome.edit(anarcii.antibody, anarcii.tcr, tmp_path / "out", EditSpec(layers=("re:weight$",)))
