"""Many jobs from one file: defaults, --only, a failed job that stops no other, the summary, exit statuses."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pome.cli.app import run_command
from support.checkpoints import assert_only_edited, hash_tree, llama_pair, read_manifest

UP = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]

JOBS = """\
defaults: {base: base, fine_tuned: ft, rank_ratio: 0.25}
jobs:
  - {name: first, out: one}
  - {name: second, out: two, fine_tuned: gone}
  - {name: third, out: three, rank: 3, layers: [gate]}
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for folder in llama_pair(tmp_path):
        # An input younger than an output, by the second that a manifest notes, would not count as what it was made of.
        os.utime(folder / "model.safetensors", (1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(capsys: pytest.CaptureFixture[str], text: str, *options: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a batch."""
    Path("jobs.yaml").write_text(text)
    status = run_command(["batch", "jobs.yaml", *options])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_a_failed_job_stops_no_other_and_the_batch_fails(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, JOBS, "--json")
    assert status == 1
    results = json.loads(out)["jobs"]
    assert [(job["name"], job["command"], job["status"], job["out"]) for job in results] == [
        ("first", "edit", "done", "one"), ("second", "edit", "failed", "two"), ("third", "edit", "done", "three")
    ]  # fmt: skip
    assert (results[0]["matrices"], results[2]["matrices"]) == (2, 2)
    assert "gone: no such file or folder" in results[1]["error"]
    assert all(job["seconds"] >= 0 for job in results)
    assert "error: second: gone: no such file or folder" in err
    assert_only_edited(Path("ft"), Path("one"), UP)
    assert not Path("two").exists()
    one, three = (read_manifest(Path(out)) for out in ("one", "three"))
    assert (one["spec"]["rank_ratio"], one["spec"]["rank"], {t["k"] for t in one["tensors"]}) == (0.25, None, {4})
    assert (three["spec"]["rank"], {t["role"] for t in three["tensors"]}) == (3, {"gate"})
    table = err[err.rindex("job ") :].splitlines()
    assert [line.split()[:3] for line in table[1:]] == [
        ["first", "done", "2"], ["second", "failed", "-"], ["third", "done", "2"]
    ]  # fmt: skip


def test_the_title_of_a_job_has_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, JOBS)
    titles = [line for line in err.splitlines() if line.startswith("[")]
    assert titles == ["[1/3] first", "[2/3] second", "[3/3] third"]


def test_all_variables_without_a_value_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = "variables: {tuned: null, out: null, k: 0.5, base: null}\njobs:\n"
    text += "  - {base: base, fine_tuned: '${tuned}', out: '${out}', rank_ratio: '${k}'}\n"
    said = "error: jobs.yaml:3: the variables 'tuned' and 'out' have no value; give --set tuned=VALUE --set out=VALUE\n"
    assert run(capsys, text) == (2, "", said)
    said = "error: jobs.yaml:3: the variable 'out' has no value; give --set out=VALUE\n"
    assert run(capsys, text, "--set", "tuned=ft") == (2, "", said)


def test_only_runs_the_named_jobs_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, JOBS, "--only", "third", "--only", "first", "--quiet")
    assert (status, out) == (0, "")
    assert sorted(path.name for path in Path().iterdir()) == ["base", "ft", "jobs.yaml", "one", "three"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs:\n  - {base: base, fine_tuned: ft, out: o}\n  - {base: base, fine_tuned: ft, ouy: p}\n",
         "error: jobs.yaml:3: unknown key 'ouy'; did you mean 'out'?\n"),
        ("jobs:\n  - {name: a, base: base, fine_tuned: ft, out: o}\n  - {name: a, base: base, fine_tuned: ft, out: p}",
         "error: jobs.yaml: two jobs have the name 'a'; each needs its own\n"),
        (JOBS.replace("0.25", "25"), "error: jobs.yaml:1: rank_ratio: 25 is not a number above 0 and at most 1\n"),
        ("", "error: jobs.yaml: empty; write options as 'key: value' lines\n"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_before_any_job_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str
) -> None:
    before = hash_tree(tmp_path)
    assert run(capsys, text) == (2, "", said)
    Path("jobs.yaml").unlink()
    assert hash_tree(tmp_path) == before


def test_a_job_that_nobody_named_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, JOBS, "--only", "frist")
    assert (status, err) == (2, "error: jobs.yaml: no job is named 'frist'; did you mean 'first'?\n")
    assert not Path("one").exists()


def test_a_batch_that_is_run_again_repeats_no_finished_job(capsys: pytest.CaptureFixture[str]) -> None:
    text = JOBS.replace("fine_tuned: gone", "beta: 2.0")
    assert run(capsys, text, "--only", "first")[0] == 0
    before = Path("one").stat().st_mtime_ns, hash_tree(Path("one"))
    assert run(capsys, text)[0] == 0
    assert (Path("one").stat().st_mtime_ns, hash_tree(Path("one"))) == before
    assert read_manifest(Path("two"))["spec"]["beta"] == 2.0
    # Another edit under the same name is not taken for done.
    status, _, err = run(capsys, text.replace("0.25", "0.75"), "--only", "first")
    assert status == 1
    assert "error: first: one: exists" in err


@pytest.mark.parametrize("harm", ["gone", "cut", "no card"])
def test_an_output_that_is_not_whole_is_not_called_done(capsys: pytest.CaptureFixture[str], harm: str) -> None:
    text = "jobs:\n  - {name: a, base: base, fine_tuned: ft, out: one}\n"
    assert run(capsys, text)[0] == 0
    weights = Path("one/model.safetensors")
    if harm == "gone":
        weights.unlink()
    elif harm == "cut":
        os.truncate(weights, 1000)
    else:
        text = text.replace("out: one", "out: one, card: true")
    status, _, err = run(capsys, text)
    assert status == 1 and "one: exists" in err and "done by an earlier run" not in err


def test_a_job_may_overwrite_and_an_edit_may_be_verified(capsys: pytest.CaptureFixture[str]) -> None:
    text = "jobs:\n  - {name: a, base: base, fine_tuned: ft, out: one, overwrite: true}\n"
    text += "  - {name: b, command: verify, out: one, base: base, fine_tuned: ft}\n"
    Path("one").mkdir()
    status, out, _ = run(capsys, text, "--json")
    assert (status, [job["status"] for job in json.loads(out)["jobs"]]) == (0, ["done", "done"])
    assert_only_edited(Path("ft"), Path("one"), UP)


def test_an_interrupted_batch_tells_what_became_of_every_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pome.editing.edit

    edit = pome.editing.edit.edit

    def stop(base: str, ft: str, out: Path, *arguments: Any, **options: Any) -> object:
        if out.name == "two":
            raise KeyboardInterrupt("interrupted; 0 of 2 units are safe")
        return edit(base, ft, out, *arguments, **options)

    monkeypatch.setattr(pome.editing.edit, "edit", stop)
    status, out, err = run(capsys, JOBS.replace("fine_tuned: gone", "beta: 2.0"), "--json")
    assert status == 130
    results = json.loads(out)["jobs"]
    assert [(job["name"], job["status"]) for job in results] == [
        ("first", "done"), ("second", "interrupted"), ("third", "not run")
    ]  # fmt: skip
    assert results[1]["error"] == "interrupted; 0 of 2 units are safe"
    assert "error: second: interrupted; 0 of 2 units are safe; 1 of 3 jobs came to an end before it\n" in err
    assert re.search(r"second +interrupted +- .*\nthird +not run +- ", err)


def test_an_output_in_the_home_folder_is_found_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = f"jobs:\n  - {{base: {tmp_path}/base, fine_tuned: {tmp_path}/ft, out: ~/one}}\n"
    (tmp_path / "home").mkdir()
    assert run(capsys, text)[0] == 0
    status, _, err = run(capsys, text)
    assert status == 0 and "done by an earlier run" in err


def test_a_sweep_whose_report_is_missing_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    scorer = "cksum < {model}/model.safetensors | cut -d' ' -f1"
    text = "jobs:\n  - {command: sweep, base: base, fine_tuned: ft, out: one, html: one.html, write_best: true, "
    text += f'score_cmd: "{scorer}"}}\n'
    assert run(capsys, text)[0] == 0
    assert "done by an earlier run" in run(capsys, text)[2]
    Path("one.html").unlink()
    status, _, err = run(capsys, text)
    assert status == 1
    assert "one: made by an earlier run, but one.html is not there; 'overwrite: true' runs it all again" in err
    assert run(capsys, text.replace("html: one.html", "card: true"))[0] == 1


def test_a_name_with_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "jobs:\n  - {name: '[red]x[/blue]', base: base, fine_tuned: ft, out: one}\n"
    status, _, err = run(capsys, text)
    assert status == 0
    assert err.count("[red]x[/blue]") == 2
