"""The page of an inspection in a browser: drawn without errors, without a network, names as plain text."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import re
import shlex

import pytest
import torch

from pome import EditSpec, edit
from pome.cli.app import run_command
from pome.inspection.records import Survey
from pome.inspection.survey import survey
from pome.reports.inspection import make_csv, make_page
from pome.reports.sheet import make_edit_sheet
from support.browser import open_page, read_attribute
from support.checkpoints import llama_pair, read_tensors, run_python
from support.surveys import draw_sheet

EVIL = "</script><script>window.errors.push('pwned')</script><img src=x onerror=\"errors.push('img')\">'\"&"


def assert_drawn(dom, count):
    assert read_attribute(dom, "data-errors") is None
    assert read_attribute(dom, "data-drawn") == str(count)


@pytest.fixture(scope="module")
def real(rxnfp):
    return survey(*rxnfp)


WIDEST = """
  const root = document.documentElement;
  const cut = (node) => node.scrollWidth > node.clientWidth + 1;
  root.dataset.wide = document.body.scrollWidth;
  root.dataset.cut = [...document.querySelectorAll("p, li, dd, .tile, button, .two > div")].filter(cut).length;
  const tables = [...document.querySelectorAll(".scroll")].filter((node) => node.querySelector(".numbers"));
  root.dataset.tables = tables.filter(cut).length;
"""


def join_words(dom: str) -> str:
    """A page's DOM without the spans that keep words whole."""
    return re.sub(r'<span class="word">(.*?)</span>', r"\1", dom)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_of_a_real_pair_shows_every_matrix_and_asks_nobody(tmp_path, real, width, dark):
    page = tmp_path / "report.html"
    page.write_text(make_page(draw_sheet(real)))
    dom = open_page(page, width, dark=dark, script=WIDEST)
    assert_drawn(dom, len(real.matrices))
    assert int(read_attribute(dom, "data-wide")) <= width
    assert read_attribute(dom, "data-cut") == "0"
    if width == 1400:
        assert read_attribute(dom, "data-tables") == "0"
    listed = re.search(r'<ul id="list".*?</ul>', dom, re.S)[0]
    names = [re.sub(r"<[^>]*>", "", entry) for entry in re.findall(r"<button.*?</button>", listed)]
    assert sorted(names) == sorted(matrix.name for matrix in real.matrices)
    assert "<svg" in dom and "gavish-donoho k = " in dom and "pome edit " in join_words(dom)


@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_shows_what_was_measured_of_weights(tmp_path, width):
    found = survey(*llama_pair(tmp_path), weights=True)
    page = tmp_path / "report.html"
    page.write_text(make_page(draw_sheet(found)))
    script = """
      const drawn = [...document.querySelectorAll("#weights td")];
      root.dataset.cells = drawn.map((cell) => cell.textContent).join("|");
      byId("find").value = "layers.1 up"; byId("find").oninput(); byId("list").querySelector("button").click();
      root.dataset.facts = [...document.querySelectorAll("#facts div")].map((fact) => fact.textContent).join("|");
    """
    dom = open_page(page, width, script=WIDEST + script)
    assert_drawn(dom, len(found.matrices))
    assert int(read_attribute(dom, "data-wide")) <= width and read_attribute(dom, "data-cut") == "0"
    cells = read_attribute(dom, "data-cells").split("|")
    rows = {(cells[i], cells[i + 1]): cells[i + 2 : i + 8] for i in range(0, len(cells), 8)}
    drifts = sorted(m.weights.spectral_drift["fine_tuned"] for m in found.matrices if m.role == "up")
    energies = sorted(m.weights.hyperspherical_energy["base"] for m in found.matrices if m.role == "up")
    assert list(map(float, rows["up", "FT"][:3])) == pytest.approx([sum(drifts) / 2, *drifts], rel=5e-3)
    assert rows["up", "BASE"][:3] == ["-"] * 3
    assert list(map(float, rows["up", "BASE"][3:])) == pytest.approx([sum(energies) / 2, *energies], rel=1e-4)
    assert len(rows) == 4 * len({m.role for m in found.matrices})
    one = next(m for m in found.matrices if "layers.1.mlp.up" in m.name)
    assert f"spectral drift, FT{one.weights.spectral_drift['fine_tuned']:.3g}|" in read_attribute(dom, "data-facts")
    assert 'id="weights"' not in make_page(draw_sheet(survey(*(tmp_path / side for side in ("base", "ft")))))


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
      const said = new Set();
      for (const option of select.options) {
        select.value = option.value;
        select.onchange();
        said.add(byId("tip").textContent);
      }
      document.documentElement.dataset.said = said.size - select.options.length;
      for (let i = 0; i < data.names.length; i++) choose(i);
      for (const head of document.querySelectorAll("#all th button")) head.click();
      const box = document.getElementById("heat").getBoundingClientRect();
      document.getElementById("heat").onclick({clientX: box.left + heat.left + 5, clientY: box.top + heat.tops[0] + 5});
      const find = document.getElementById("find");
      find.value = "layers.2 down"; find.oninput();
      document.documentElement.dataset.found = document.getElementById("list").children.length;
    """
    dom = open_page(page, script=script)
    assert_drawn(dom, len(small.matrices))
    assert read_attribute(dom, "data-found") == "1"
    assert read_attribute(dom, "data-said") == "0"  # the readout speaks of every quantity in turn


def test_a_click_scrolls_to_the_matrix_that_it_shows(tmp_path, small):
    page = tmp_path / "clicked.html"
    page.write_text(make_page(draw_sheet(small)))
    script = """
      document.documentElement.style.scrollBehavior = "auto";
      const box = byId("heat").getBoundingClientRect();
      const y = data.places.indexOf("model.layers.1");
      byId("heat").onclick({clientX: box.left + heat.left + 5, clientY: box.top + heat.tops[y] + 5});
      const root = document.documentElement, sight = () => byId("matrix").getBoundingClientRect().top;
      Object.assign(root.dataset, {first: byId("chosen").textContent, firsttop: sight()});
      scrollTo(0, document.body.scrollHeight);
      document.querySelector("#all [data-matrix='2']").click();
      Object.assign(root.dataset, {second: chosen, secondtop: sight()});
    """
    dom = open_page(page, 1400, 500, script=script)
    assert_drawn(dom, len(small.matrices))
    first = read_attribute(dom, "data-first")
    assert first == next(row.name for row in draw_sheet(small).rows if row.place == "model.layers.1")
    assert read_attribute(dom, "data-second") == "2"
    assert all(abs(float(read_attribute(dom, f"data-{which}top"))) < 2 for which in ("first", "second"))


def test_each_warning_names_its_matrices_and_links_them(tmp_path, small):
    names = [m.name for m in small.matrices]
    far = {names[0], names[1]}
    matrices = [dataclasses.replace(m, relative_norm=0.9 if m.name in far else 0.1) for m in small.matrices]
    matrices = [dataclasses.replace(m, rounding=0.5 if m.name not in far else 0.0) for m in matrices]
    page = tmp_path / "warned.html"
    page.write_text(make_page(draw_sheet(Survey("b", "f", tuple(matrices), ()))))
    script = """
      const root = document.documentElement;
      root.dataset.linked = [...document.querySelectorAll(".notices [data-matrix]")].map((b) => b.textContent).join();
      document.querySelector(".notices [data-matrices]").click();
      root.dataset.listed = byId("list").children.length;
    """
    dom = open_page(page, script=script)
    assert_drawn(dom, len(matrices))
    linked = read_attribute(dom, "data-linked").split(",")
    assert far < set(linked) and len(linked) == 3 + 2
    assert read_attribute(dom, "data-listed") == str(len(matrices) - 2)
    (pattern,) = re.findall(r"--exclude (\S+)</code>", html.unescape(join_words(dom)))
    (excluded,) = shlex.split(pattern)
    assert {name for name in names if re.search(excluded, name)} == far


def test_a_cut_scale_says_at_least(tmp_path, small):
    matrices = [dataclasses.replace(m, drift=1.0 if i else 50.0) for i, m in enumerate(small.matrices * 20)]
    matrices = [
        dataclasses.replace(m, place=f"layers.{i}", name=f"layers.{i}.{m.role}") for i, m in enumerate(matrices)
    ]
    page = tmp_path / "cut.html"
    page.write_text(make_page(draw_sheet(Survey("b", "f", tuple(matrices), ()))))
    script = """
      for (const key of ["drift", "stable_rank"]) {
        byId("quantity").value = key;
        byId("quantity").onchange();
        document.documentElement.dataset[key] = byId("least").textContent + " to " + byId("most").textContent;
      }
    """
    dom = open_page(page, script=script)
    assert read_attribute(dom, "data-drift") == "1 to at least 1"
    assert "at least" not in read_attribute(dom, "data-stable_rank")


def test_marks_of_the_legend_are_drawn_as_the_lines(tmp_path, small):
    page = tmp_path / "legend.html"
    page.write_text(make_page(draw_sheet(small)))
    script = """
      const style = (node) => { const s = getComputedStyle(node); return s.stroke + " " + s.strokeDasharray; };
      const marks = [...document.querySelectorAll("svg.key line")].map(style);
      const lines = [...document.querySelectorAll("#spectrum > svg > *")].map(style);
      Object.assign(document.documentElement.dataset, {
        marks: marks.length, distinct: new Set(marks).size, drawn2: marks.filter((mark) => lines.includes(mark)).length,
      });
    """
    dom = open_page(page, script=script)
    # Before, after, the edge of storage rounding and five rules; the edge may lie below the picture.
    assert (read_attribute(dom, "data-marks"), read_attribute(dom, "data-distinct")) == ("8", "8")
    assert int(read_attribute(dom, "data-drawn2")) >= 7


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
      for (let i = 0; i < 20; i++) { scrollTo(0, i * 100); drawHeat(); }
      document.documentElement.dataset.nodes = document.querySelectorAll("*").length;
    """
    dom = open_page(page, script=script)
    assert_drawn(dom, len(large.matrices))
    # The page holds what is seen, not the model.
    assert int(read_attribute(dom, "data-nodes")) < 5000


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


def test_the_spectrum_of_an_output_is_a_true_curve(tmp_path):
    base, ft = llama_pair(tmp_path)
    manifest = edit(base, ft, tmp_path / "out")
    page = tmp_path / "out.html"
    page.write_text(make_page(make_edit_sheet(manifest)))
    dom = open_page(page, script="document.documentElement.dataset.read = JSON.stringify(readSpectrum(0));")
    W, W_ft = (read_tensors(side)[manifest.tensors[0].name].double() for side in (base, ft))
    sigma = torch.linalg.svdvals(W_ft - W).tolist()
    read = json.loads(read_attribute(dom, "data-read"))
    assert [i for i, _ in read] == list(range(1, 17))
    assert [s for _, s in read] == pytest.approx(sigma, rel=0.006)


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
