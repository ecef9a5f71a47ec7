"""Plots: pictures in two formats, whatever the names."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from pome import edit
from pome.config.outputs import Reports
from pome.errors import OutputError
from pome.inspection.records import Survey
from pome.reports.files import check_targets
from pome.reports.sheet import make_edit_sheet
from support.checkpoints import llama_pair
from support.surveys import draw_sheet


def test_plots_are_pictures_of_every_role(tmp_path, small):
    from pome.reports.plots import write_plots

    made = write_plots(draw_sheet(small), tmp_path / "plots")
    names = {path.name for path in made}
    assert {"heat_relative_norm.png", "heat_energy_50.svg", "spectra_up.png", "spectra_embed.svg"} <= names
    for path in made:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") or b"<?xml" in head


def test_plots_of_an_edit_and_of_odd_names(tmp_path, small):
    from pome.reports.plots import write_plots

    odd = dataclasses.replace(small.matrices[0], name="$x$_{", place="$\\frac{", role="up")
    write_plots(draw_sheet(Survey("b", "f", (odd,), ())), tmp_path / "odd")
    base, ft = llama_pair(tmp_path)
    made = write_plots(make_edit_sheet(edit(base, ft, tmp_path / "out")), tmp_path / "edit")
    assert (tmp_path / "edit" / "heat_energy_kept.png") in made


def test_without_matplotlib_the_error_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError, match=r"pip install 'pome-edit\[plot\]'"):
        check_targets(Reports(plots=str(tmp_path / "plots")), ())
