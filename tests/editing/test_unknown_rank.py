"""Matrices of which a few directions are known and no rank: what is recorded, shown and verified of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

import pome
from pome import EditSpec
from pome.cli.tables.edit import make_closing_table
from pome.kernel import ladder
from pome.manifest import Manifest, TensorRecord, show_median
from pome.output.card import make_card
from pome.reports.inspection import make_csv, make_page
from pome.reports.plots import write_plots
from pome.reports.sheet import make_edit_sheet
from support.browser import open_page, read_attribute
from support.checkpoints import read_tensors, write_checkpoint
from support.reference import plant, reference_edit

K = 3


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the thin route."""
    monkeypatch.setattr(ladder, "THIN", 0)
    monkeypatch.setattr(ladder, "SHARE", 1.0)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """A pair whose deltas have singular values 0.02 / i, so that a few of them are found without the others."""
    shapes = {"gate_proj": (90, 60), "up_proj": (90, 60), "down_proj": (60, 90)}
    names = {f"model.layers.{i}.mlp.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    base = {name: plant([0.05] * 60, *shape, seed=2) for name, shape in names.items()}
    sigma = [0.02 / (i + 1) for i in range(60)]
    tuned = {name: W + plant(sigma, *W.shape, seed=1) for name, W in base.items()}
    return [write_checkpoint(tmp_path / name, tensors) for name, tensors in (("base", base), ("ft", tuned))]


@pytest.fixture
def made(pair: list[Path], tmp_path: Path) -> Manifest:
    return pome.edit(*pair, tmp_path / "out", EditSpec(layers=("ffn",), rank=K))


def test_the_record_holds_no_rank_and_the_values_that_are_known(
    made: Manifest, pair: list[Path], tmp_path: Path
) -> None:
    W, W_ft, W_out = (read_tensors(folder) for folder in (*pair, tmp_path / "out"))
    raw = json.loads((tmp_path / "out/pome_manifest.json").read_text())
    assert len(made.tensors) == 6 and [record["rank"] for record in raw["tensors"]] == [None] * 6
    assert Manifest.from_json((tmp_path / "out/pome_manifest.json").read_text(), "here") == made
    for record in made.tensors:
        D = W_ft[record.name].double() - W[record.name].double()
        wanted = reference_edit(D, k=K)
        assert (record.solver, record.k) == ("thin", K)
        assert [i for i, _ in record.spectrum] == list(range(1, K + 2))
        assert [s for _, s in record.spectrum] == pytest.approx(wanted.sigma[: K + 1].tolist(), rel=1e-4)
        edited = W_out[record.name].double() - W[record.name].double()
        assert float((edited - wanted.value).norm() / wanted.value.norm()) <= 1e-4


def test_every_report_of_it_leaves_the_rank_out(made: Manifest, tmp_path: Path) -> None:
    assert show_median(made.tensors, "rank", ".0f") == "-"
    whole = dataclasses.replace(made.tensors[0], rank=16)
    assert show_median([whole, *made.tensors[1:]], "rank", ".0f") == "16"
    with (console := Console(width=100)).capture() as table:
        console.print(make_closing_table(made))
    assert re.search(rf"up +2 +- +{K} ", table.get())
    assert f"| - | {K} |" in make_card(made, None)
    sheet = make_edit_sheet(made)
    rows = list(csv.DictReader(make_csv(sheet).splitlines()))
    assert [row["rank"] for row in rows] == [""] * 6 and [row["k"] for row in rows] == [str(K)] * 6
    assert all([i for i, _ in row.points] == list(range(1, K + 2)) for row in sheet.rows)
    assert write_plots(sheet, tmp_path / "plots")
    page = tmp_path / "page.html"
    page.write_text(make_page(sheet))
    dom = open_page(page)
    assert read_attribute(dom, "data-errors") is None and read_attribute(dom, "data-drawn") == "6"


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("where", ["here", "elsewhere", "elsewhere first"])
def test_an_output_verifies_on_a_machine_that_takes_another_route(
    monkeypatch: pytest.MonkeyPatch, pair: list[Path], tmp_path: Path, where: str, power: float
) -> None:
    if where == "elsewhere first":
        monkeypatch.setattr(ladder, "SHARE", 0.0)
    manifest = pome.edit(*pair, tmp_path / "out", EditSpec(layers=("ffn",), rank=K, power=power))
    assert (manifest.tensors[0].rank is None) == (where != "elsewhere first")
    if where != "here":
        monkeypatch.setattr(ladder, "SHARE", 1.0 if where == "elsewhere first" else 0.0)
    assert pome.verify(tmp_path / "out", *pair, full=True).differences == ()


@pytest.mark.parametrize("field, value", [("k", 2), ("rank", 2), ("rank", 61), ("sigma_next", 0.0), ("sigma_k", 0.011)])
def test_other_numbers_in_its_record_are_found(
    made: Manifest, pair: list[Path], tmp_path: Path, field: str, value: float
) -> None:
    changed = dataclasses.replace(made.tensors[0], **{field: value})  # type: ignore[arg-type]
    forged = dataclasses.replace(made, tensors=(changed, *made.tensors[1:])).sealed()
    (tmp_path / "out/pome_manifest.json").write_text(forged.to_json())
    assert not pome.verify(tmp_path / "out", *pair, full=True).ok


@pytest.mark.parametrize("wrong", ["16", 1.5, True, [16]])
def test_a_rank_of_another_kind_is_refused(made: Manifest, wrong: object) -> None:
    raw = {**json.loads(json.dumps(made.tensors[0].to_mapping())), "rank": wrong}
    with pytest.raises(TypeError, match="rank is"):
        TensorRecord.from_mapping(raw)
