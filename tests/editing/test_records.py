"""Records of edited matrices, held against the weights on disk and against torch.linalg in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pome import EditSpec, edit
from pome.manifest import Manifest, sample_spectrum
from support.checkpoints import llama_pair, read_tensors


@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 1.7}, {"rank": 1, "scale": "spectral"}, {"rank_ratio": 1.0, "scale": "mean"}, {"scale": "unit"}],
)
def test_departure_is_the_distance_from_the_fine_tuned_weight(tmp_path: Path, options: dict[str, Any]) -> None:
    base, ft = llama_pair(tmp_path)
    manifest = edit(base, ft, tmp_path / "out", EditSpec.from_given({"layers": ("ffn",), **options}))
    W, W_ft, W_out = (read_tensors(folder) for folder in (base, ft, tmp_path / "out"))
    assert len(manifest.tensors) == 6
    for record in manifest.tensors:
        before, tuned, after = (side[record.name].double() for side in (W, W_ft, W_out))
        # float32 weights of about 0.05 are stored to 4e-9, a delta's entries are 5e-3.
        assert record.departure == pytest.approx(float((after - tuned).norm() / (tuned - before).norm()), rel=1e-5)


def test_spectrum_holds_singular_values_of_the_delta(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    manifest = edit(base, ft, tmp_path / "out", EditSpec(layers=("ffn",)))
    W, W_ft = read_tensors(base), read_tensors(ft)
    for record in manifest.tensors:
        sigma = torch.linalg.svdvals(W_ft[record.name].double() - W[record.name].double())
        assert [index for index, _ in record.spectrum] == list(range(1, 17))
        assert [s for _, s in record.spectrum] == pytest.approx(sigma.tolist(), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 24, 25, 4096])
def test_spectrum_is_sampled_from_end_to_end(rank: int) -> None:
    points = sample_spectrum([1.0 / (1 + i) for i in range(rank)])
    assert points[0] == (1, 1.0) and points[-1][0] == rank and len(points) <= 24
    for index, sigma in points:
        assert sigma == pytest.approx(1 / index, rel=1e-5)
    # Evenly in the logarithm: no two neighbours are farther apart than the 24th part of the axis, or one step.
    for (a, _), (b, _) in zip(points, points[1:], strict=False):
        assert b - a == 1 or b / a < rank ** (1 / 23) * 1.5


def test_the_manifest_is_the_same_when_read_back_and_has_a_line_for_each_record(tmp_path: Path) -> None:
    manifest = edit(*llama_pair(tmp_path), tmp_path / "out", EditSpec(layers=("ffn",)))
    text = (tmp_path / "out/pome_manifest.json").read_text()
    assert Manifest.from_json(text, "here") == manifest
    for record in manifest.tensors:
        (line,) = [line for line in text.splitlines() if f'"name": "{record.name}"' in line]
        assert json.loads(line.strip().removesuffix(","))["spectrum"] == [list(point) for point in record.spectrum]


@pytest.mark.parametrize("broken", [[[1]], [[1, "x"]], [["1", 2.0]], [[1, True]], "text", [[1.5, 2.0]]])
def test_a_spectrum_of_another_kind_is_refused(tmp_path: Path, broken: object) -> None:
    manifest = edit(*llama_pair(tmp_path), tmp_path / "out")
    raw = json.loads(manifest.to_json())
    raw["tensors"][0]["spectrum"] = broken
    with pytest.raises(Exception, match="here: not a manifest of pome"):
        Manifest.from_json(json.dumps(raw), "here")
