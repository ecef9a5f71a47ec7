"""Overrides: other options for the tensors that a pattern finds, in YAML, in Python and in the manifest."""

import json

import pytest

from pome import EditSpec, edit, verify
from pome.cli.batch import read_batch
from pome.config.spec import Override
from pome.config.yaml_text import read_config
from pome.errors import SelectionError, SpecError
from support.checkpoints import llama_pair, read_manifest, run_python

YAML = """beta: 1.2
overrides:
  - match: layers\\.0\\.
    beta: 0.5
    rank_rule: effective
  - match: layers\\.[01]\\.
    scale: mean
"""


def test_every_override_that_matches_applies_and_later_ones_win():
    spec = EditSpec(rank_ratio=0.25, overrides=[{"match": "a", "beta": 2.0}, {"match": "b", "beta": 3.0, "rank": 4}])
    assert spec.resolve("zz") == EditSpec(rank_ratio=0.25)
    assert spec.resolve("a").beta == 2.0
    both = spec.resolve("ab")
    assert (both.beta, both.rank_rule, both.rank, both.overrides) == (3.0, "fixed", 4, ())
    assert EditSpec(rank=3, overrides=[{"match": "a", "energy": 0.8}]).resolve("a").rank_rule == "energy"


def test_the_manifest_tells_the_overrides_and_what_each_tensor_got(tmp_path):
    base, ft = llama_pair(tmp_path)
    (tmp_path / "edit.yaml").write_text(YAML)
    spec = EditSpec(**read_config(tmp_path / "edit.yaml"))
    edit(base, ft, tmp_path / "out", spec)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["spec"]["overrides"] == [
        {"match": "layers\\.0\\.", "rank_rule": "effective", "beta": 0.5},
        {"match": "layers\\.[01]\\.", "scale": "mean"},
    ]
    first, second = manifest["tensors"]
    assert (first["beta"], second["beta"]) == (0.5, 1.2)
    # Each as the whole edit would make it with those options.
    alone = EditSpec(rank_rule="effective", scale="mean", beta=0.5)
    other = edit(base, ft, tmp_path / "alone", alone).tensors[0]
    assert (first["k"], first["alpha"]) == (other.k, other.alpha)
    # What is verified is recomputed from the manifest's own spec.
    assert verify(tmp_path / "out", base, ft, full=True).ok


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("overrides:\n  - match: up\n    betta: 1\n", "{path}:3: unknown key 'betta'; did you mean 'beta'?"),
        ("overrides:\n  - match: up\n    beta: 0\n", "{path}:1: overrides: 'up': beta: 0 is not a number from 1e-06"),
        ("overrides:\n  - beta: 1\n", "{path}:1: overrides: each needs match"),
        ("overrides:\n  - match: up\n", "{path}:1: overrides: 'up' changes nothing"),
        ("overrides:\n  - match: (\n    beta: 1\n", "{path}:1: overrides: '(' is not a regular expression"),
        ("overrides: up\n", "{path}:1: overrides: not a list"),
        ("overrides:\n  - match: up\n    rank_rule: fixed\n", "overrides: 'up': rank_rule: 'fixed' needs rank"),
    ],
)
def test_a_malformed_override_is_refused_by_line(tmp_path, text, said):
    path = tmp_path / "edit.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        EditSpec.from_mapping(read_config(path))
    assert said.format(path=path) in str(error.value)


def test_python_refuses_an_unknown_key_too():
    with pytest.raises(SpecError, match="unknown key 'layer'"):
        EditSpec(overrides=[{"match": "a", "layer": "up"}])
    assert EditSpec(overrides=[Override("a", beta=2.0)]).overrides == (Override("a", beta=2.0),)


def test_an_override_that_matches_nothing_is_a_slip(tmp_path):
    base, ft = llama_pair(tmp_path)
    with pytest.raises(SelectionError, match="'layers.7' matches no edited tensor"):
        edit(base, ft, tmp_path / "out", EditSpec(overrides=[{"match": "layers.7", "beta": 2.0}]))


def test_a_batch_inspects_pairs_and_outputs(tmp_path):
    base, ft = llama_pair(tmp_path)
    html, csv = tmp_path / "after.html", tmp_path / "before.csv"
    file = tmp_path / "jobs.yaml"
    file.write_text(
        f"defaults: {{base: {base}, fine_tuned: {ft}}}\n"
        f"jobs:\n- {{command: inspect, csv: {csv}}}\n- {{out: {tmp_path}/out}}\n"
        f"- {{command: inspect, out: {tmp_path}/out, html: {html}}}\n"
    )
    jobs = read_batch(file)
    assert [(job.command, job.base, job.spec.layers == ("up",)) for job in jobs] == [
        ("inspect", str(base), False), ("edit", str(base), True), ("inspect", None, False)
    ]  # fmt: skip
    run = run_python("-m", "pome", "batch", str(file), "--json")
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)["jobs"]
    assert [(result["status"], result["matrices"]) for result in results] == [("done", 10), ("done", 2), ("done", 2)]
    assert csv.read_text().count("\n") == 11
    assert "What the edit did" in html.read_text()


def test_only_an_inspection_writes_reports(tmp_path):
    file = tmp_path / "jobs.yaml"
    file.write_text("jobs:\n- {base: a, fine_tuned: b, out: c, html: d}\n")
    with pytest.raises(SpecError, match="html: the command edit does not take that; inspect and sweep may"):
        read_batch(file)
