"""The real weights are what their packages hold, and are refused when they cannot be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import real_weights
from real_weights import RXNFP, Pair, RealWeightsError, Trio
from support.checkpoints import read_tensors


def test_the_bert_pair_holds_every_tensor(rxnfp: Pair, rxnfp_bare: Pair) -> None:
    base = load_file(rxnfp.base / "model.safetensors")
    fine_tuned = load_file(rxnfp.fine_tuned / "model.safetensors")
    bare = load_file(rxnfp_bare.fine_tuned / "model.safetensors")
    assert (len(base), len(fine_tuned), len(bare)) == (207, 201, 199)
    # Tied in the package: both names are kept, each with its own copy.
    assert base["cls.predictions.decoder.weight"].equal(base["bert.embeddings.word_embeddings.weight"])
    shared = {name for name in fine_tuned if name in base}
    assert {f"bert.{name}" for name in bare} == shared
    assert any(not base[name].equal(fine_tuned[name]) for name in shared)
    assert (rxnfp.base / "config.json").is_file()


def test_the_trio_agrees_but_for_the_row_that_tcr_has_more(anarcii: Trio) -> None:
    shapes = [{name: t.shape for name, t in read_tensors(folder).items()} for folder in anarcii]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 66
    other = {name: (shape, shapes[2][name]) for name, shape in shapes[0].items() if shape != shapes[2][name]}
    assert len(other) == 3
    assert all(theirs == (ours[0] + 1, *ours[1:]) for ours, theirs in other.values())


def test_a_package_that_cannot_be_had_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RealWeightsError, match="could not download rxnfp==0.1.0"):
        real_weights.rxnfp_pair()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / RXNFP.wheel).write_bytes(b"PK")
    monkeypatch.setattr(
        real_weights.subprocess, "run", lambda *_, **__: real_weights.subprocess.CompletedProcess([], 0)
    )
    with pytest.raises(RealWeightsError, match="not the package that was checked"):
        real_weights._download(RXNFP, tmp_path)
