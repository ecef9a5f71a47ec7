"""The report: a page that a browser opens without errors and without a network, tables, and plots."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import os
import re
import sys
from array import array
from unittest.mock import Mock

import pytest
from rich.console import Console

from pome import EditSpec, edit
from pome.cli.app import run_command
from pome.cli.tables import Columns, make_survey_tables
from pome.config.outputs import Reports
from pome.errors import OutputError
from pome.inspection.records import Survey
from pome.inspection.suggest import list_warnings, suggest
from pome.inspection.survey import survey
from pome.reports.inspection import check_targets, make_csv, make_page, write_texts
from pome.reports.sheet import make_edit_sheet, make_sheet, spread_indices, summarise_roles
from support.browser import open_page, read_attribute
from support.checkpoints import llama_pair, run_python

EVIL = "</script><script>window.errors.push('pwned')</script><img src=x onerror=\"errors.push('img')\">'\"&"


def draw_sheet(found):
    return make_sheet(found, list_warnings(found.matrices), suggest(found.base, found.fine_tuned, found.matrices))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return survey(*llama_pair(tmp_path_factory.mktemp("pair"), layers=3))


@pytest.fixture(scope="module")
def large(small):
    """61 layers of 256 experts: names and spectra made up, as many as a model of 671 B parameters has."""
    model = small.matrices[0]
    sigma = array("f", (0.3 / (i + 1) for i in range(2048)))
    made = []
    for layer in range(61):
        stem = f"model.layers.{layer}."
        experts = [(f"{stem}mlp.experts.{e}", role) for e in range(256) for role in ("gate", "up", "down")]
        names = [(f"{expert}.{role}_proj.weight", role) for expert, role in experts]
        names += [(f"{stem}self_attn.{role}_proj.weight", role) for role in "qkvo"]
        for i, (name, role) in enumerate(names):
            place, share = f"model.layers.{layer}", 0.01 + 0.0001 * layer + 1e-6 * i
            made.append(
                dataclasses.replace(
                    model, name=name, role=role, place=place, shape=(2048, 7168), sigma=sigma, relative_norm=share
                )
            )
    return Survey("base", "ft", tuple(made), ())


def assert_drawn(dom, count):
    assert read_attribute(dom, "data-errors") is None
    assert read_attribute(dom, "data-drawn") == str(count)


@pytest.fixture(scope="module")
def real(rxnfp):
    return survey(*rxnfp)


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_of_a_real_pair_shows_every_matrix_and_asks_nobody(tmp_path, real, width):
    found = real
    page = tmp_path / "report.html"
    page.write_text(make_page(draw_sheet(found)))
    # The page itself tells how wide its content is: on a phone nothing may stick out.
    dom = open_page(page, width, script="document.documentElement.dataset.wide = document.body.scrollWidth;")
    assert_drawn(dom, len(found.matrices))
    # Headless Chromium has windows of 500 at least.
    assert int(read_attribute(dom, "data-wide")) <= max(width, 500)
    listed = html.unescape(re.search(r'<select id="list".*?</select>', dom, re.S)[0])
    for matrix in found.matrices:
        assert f'title="{matrix.name}"' in listed
    assert "<svg" in dom and "gavish-donoho k = " in dom and "pome edit " in dom


def test_the_page_names_no_address_and_forbids_itself_the_network(small):
    page = make_page(draw_sheet(small))
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:|//)", page)


def test_a_page_that_asks_the_network_is_caught(tmp_path):
    page = tmp_path / "asks.html"
    page.write_text('<html><body><img src="http://127.0.0.1:1/x.png"></body></html>')
    with pytest.raises(AssertionError, match="the page sent 1 requests"):
        open_page(page)


def test_names_from_checkpoints_are_text_and_nothing_else(tmp_path, small):
    first = small.matrices[0]
    evil = [dataclasses.replace(first, name=EVIL, place=EVIL), dataclasses.replace(first, name="\u2028<!--<script>")]
    found = Survey(EVIL, EVIL, (*evil, *small.matrices), small.kept)
    page = tmp_path / "evil.html"
    page.write_text(make_page(draw_sheet(found)))
    dom = open_page(page, script="document.documentElement.dataset.errors2 = window.errors.join();")
    assert_drawn(dom, len(found.matrices))
    assert read_attribute(dom, "data-errors2") == ""
    elements = dom.partition("<body>")[2].partition("<script")[0]  # what was drawn, up to the page's own scripts
    assert "<img" not in elements and "&lt;img" in elements


def test_every_quantity_cell_page_and_search_can_be_used(tmp_path, small):
    page = tmp_path / "used.html"
    page.write_text(make_page(draw_sheet(small)))
    script = """
      const select = document.getElementById("quantity");
      for (const option of select.options) { select.value = option.value; select.onchange(); }
      for (let i = 0; i < data.names.length; i++) choose(i);
      for (const head of document.querySelectorAll("#all th button")) head.click();
      const box = document.getElementById("heat").getBoundingClientRect();
      document.getElementById("heat").onclick({clientX: box.left + heat.left + 5, clientY: box.top + heat.top + 5});
      const find = document.getElementById("find");
      find.value = "layers.2 down"; find.oninput();
      document.documentElement.dataset.found = document.getElementById("list").length;
    """
    dom = open_page(page, script=script)
    assert_drawn(dom, len(small.matrices))
    assert read_attribute(dom, "data-found") == "1"


def test_the_spectrum_in_the_page_is_that_of_the_survey(tmp_path, small):
    page = tmp_path / "spectrum.html"
    page.write_text(make_page(draw_sheet(small)))
    dom = open_page(page, script="document.documentElement.dataset.read = JSON.stringify(readSpectrum(3));")
    read = json.loads(read_attribute(dom, "data-read"))
    wanted = list(draw_sheet(small).rows[3].points)
    assert [k for k, _ in read] == [k for k, _ in wanted]
    # A step of the page's scale is 1.1 %.
    assert [s for _, s in read] == pytest.approx([s for _, s in wanted], rel=0.006)


def test_a_model_of_47_thousand_matrices_fits_and_scrolls(tmp_path, large):
    text = make_page(draw_sheet(large))
    assert len(large.matrices) == 61 * (3 * 256 + 4)
    assert len(text.encode()) < 15e6
    page = tmp_path / "large.html"
    page.write_text(text)
    script = """
      const begun = performance.now();
      for (let i = 0; i < 20; i++) { scrollTo(0, i * 100); document.body.getBoundingClientRect(); drawHeat(); }
      document.documentElement.dataset.frame = (performance.now() - begun) / 20;
      document.documentElement.dataset.nodes = document.querySelectorAll("*").length;
    """
    dom = open_page(page, script=script)
    assert_drawn(dom, len(large.matrices))
    # The page holds what is seen, not the model; a frame is drawn in well under the fifth of a second that feels slow,
    # even on a machine that is busy with something else (a tenth of that when it is not).
    assert int(read_attribute(dom, "data-nodes")) < 4000
    assert float(read_attribute(dom, "data-frame")) < 500


def test_an_output_is_drawn_from_its_manifest_before_and_after(tmp_path):
    base, ft = llama_pair(tmp_path)
    manifest = edit(base, ft, tmp_path / "out", EditSpec(layers=("ffn",)))
    page = tmp_path / "out.html"
    run = run_python("-m", "pome", "inspect", str(tmp_path / "out"), "--html", str(page), "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["tensors"][0]["name"] == manifest.tensors[0].name
    dom = open_page(page)
    assert_drawn(dom, len(manifest.tensors))
    assert "What the edit did" in dom and "after: 8 values of" in dom


def test_an_output_is_drawn_without_torch(tmp_path):
    base, ft = llama_pair(tmp_path)
    edit(base, ft, tmp_path / "out")
    code = (
        "import sys; from pome.cli.app import run_command; "
        f"status = run_command(['inspect', {str(tmp_path / 'out')!r}, '--html', {str(tmp_path / 'o.html')!r}]); "
        "assert status == 0; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr


def test_the_csv_is_read_back_by_its_own_names_and_runs_no_formula(small):
    odd = dataclasses.replace(small.matrices[0], name='=HYPERLINK("x"),\n')
    sheet = draw_sheet(Survey("b", "f", (odd, *small.matrices), ()))
    rows = list(csv.DictReader(io.StringIO(make_csv(sheet))))
    assert {row["name"] for row in rows} == {f"'{odd.name}", *(m.name for m in small.matrices)}
    by_name = {row["name"]: row for row in rows}
    for m in small.matrices:
        row = by_name[m.name]
        assert (int(row["fan_out"]), int(row["fan_in"]), int(row["k_ratio"])) == (*m.shape, m.k["ratio"])
        assert float(row["drift"]) == m.drift


def test_roles_are_summarised_by_medians(small):
    sheet = draw_sheet(small)
    found = {role: (count, medians) for role, count, medians in summarise_roles(sheet, ["drift"])}
    drifts = sorted(m.drift for m in small.matrices if m.role == "up")
    assert found["up"] == (3, {"drift": drifts[1]})


@pytest.mark.parametrize("n", [1, 2, 95, 96, 97, 100, 4096])
def test_a_sampled_spectrum_keeps_both_ends(n):
    indices = spread_indices(n, 96)
    assert (indices[0], indices[-1]) == (1, n) and len(indices) <= 96
    assert indices == sorted(set(indices))


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


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ({"html": "nowhere/report.html"}, "nowhere/report.html: its folder does not exist"),
        ({"csv": "ft"}, "ft: lies in ft, which is an input or OUT"),
        ({"csv": "ft/model.safetensors"}, "lies in ft"),
        ({"html": "ft/more/page.html"}, "lies in ft"),
        ({"html": "link/config.json"}, "link/config.json: lies in ft"),
        ({"csv": "out/table.csv"}, "lies in out"),
        ({"plots": "base/plots"}, "lies in base"),
        ({"html": "other/config.json"}, "other holds a checkpoint"),
        ({"csv": "made/README.md"}, "made holds a checkpoint"),
        ({"plots": "other"}, "other holds a checkpoint"),
        ({"html": "x", "csv": "./x"}, "./x: two reports would be written there"),
        ({"html": "free"}, "free: a folder; name the file"),
        ({"plots": "free/file"}, "free/file: a file; name the folder"),
        ({"csv": "free/fifo"}, "free/fifo: no regular file"),
        ({"csv": "/proc/self/table.csv"}, "/proc/self/table.csv: cannot be written"),
    ],
)
def test_no_report_is_written_over_a_checkpoint_or_where_it_cannot_be(tmp_path, monkeypatch, reports, said):
    monkeypatch.chdir(tmp_path)
    for folder, file in (("ft", "config.json"), ("other", "model.safetensors"), ("made", "pome_manifest.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "ft/more").mkdir()
    (tmp_path / "link").symlink_to("ft")
    (tmp_path / "free").mkdir()
    (tmp_path / "free/file").write_text("kept")
    os.mkfifo(tmp_path / "free/fifo")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=said):
        check_targets(Reports(**reports), ("base", "ft", "out"))
    check_targets(Reports(html="free/file", csv="free/table.csv", plots="free"), ("base", "ft", "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    target, link = tmp_path / "page.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to("page.html")
    with (
        pytest.raises(OutputError, match="page.html: cannot be written: No space left"),
        monkeypatch.context() as patch,
    ):
        patch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
        write_texts(Reports(html=str(target)), lambda: "new", lambda: "")
    assert (target.read_text(), len(list(tmp_path.iterdir()))) == ("old", 2)
    write_texts(Reports(html=str(link)), lambda: "new", lambda: "")
    assert (target.read_text(), link.is_symlink(), len(list(tmp_path.iterdir()))) == ("new", True, 2)


def show_at(width, *tables):
    console = Console(width=width, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [200, 140, 80, 45, 12])
def test_no_number_is_cut_or_folded_where_width_is_short(small, width):
    matrices = [dataclasses.replace(m, noise_share=1.71e-07, drift=6.66e-05) for m in small.matrices]
    tables = make_survey_tables(draw_sheet(Survey("b", "f", tuple(matrices), ())))
    drawn = show_at(width, *tables)
    assert max(map(len, drawn.splitlines())) <= width
    for whole, part in (("1.71e-07", "1.71"), ("6.66e-05", "6.66")):
        assert drawn.replace(whole, "").count(part) == 0
    heads = tables[0].heads
    first = drawn.splitlines()[0].rstrip()
    count = next(n for n in range(len(heads), 0, -1) if first.endswith(heads[n - 1]))
    dropped = " ".join(drawn.split()).partition("not shown for want of width: ")[2]
    assert dropped.startswith(f"{', '.join(heads[count:])}; --csv has them") if count < len(heads) else not dropped


def test_long_names_give_way_to_numbers():
    table = Columns("name", "k", where="")
    table.add_row("x" * 100, "1234567890")
    table.add_row("[red]y[/red]", "2")
    lines = show_at(40, table).splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["k", "1234567890"]
    assert "".join(line.split()[0] for line in lines[1:-1]) == "x" * 100
    assert lines[-1].split() == ["[red]y[/red]", "2"]


@pytest.mark.parametrize(
    "change",
    [{"role": "uup"}, {"delta_norm": 0.0}, {"sigma_k": 0.0}, {"sigma_max": -1.0}, {"k": 10**9}, {"k": 0},
     {"alpha": 10**400}, {"shape": ("40", 16)}, {"shape": (None, 16)}],
)  # fmt: skip
def test_a_manifest_that_pome_did_not_write_is_one_error(tmp_path, capsys, change):
    base, ft = llama_pair(tmp_path)
    made = edit(base, ft, tmp_path / "out")
    odd = dataclasses.replace(made.tensors[0], **change)
    (tmp_path / "out/pome_manifest.json").write_text(dataclasses.replace(made, tensors=(odd,)).to_json())
    assert run_command(["inspect", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 1
    err = capsys.readouterr().err
    assert (
        err
        == f"error: pome_manifest.json: the record of {odd.name} is not one that pome writes; give an output of pome\n"
    )
