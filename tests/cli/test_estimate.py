"""`pome estimate` and the time of a dry run: from the cache, the table or a measurement; none where nobody measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pome.cli.app import run_command
from pome.planning.devices import find_device
from pome.planning.flops import ROUTES
from pome.planning.rates import Rates, leave_rates, read_cache
from support.checkpoints import hash_tree, llama_pair, perturb, read_tensors, write_checkpoint

ALL = dict.fromkeys(ROUTES, ((10.0, 1000000000.0),))


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A small pair in the working folder, and an empty cache of rates."""
    llama_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "77")  # a device that no table has
    return "base", "ft"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = run_command(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_device_that_nobody_measured_gets_no_time(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "estimate", *pair, "--device", "cpu")
    assert (status, out) == (0, "")
    lines = err.splitlines()
    assert lines[0].endswith("2 of 11 tensors to edit (up), 9 kept   10.2 kB to read, 5.1 kB to write")
    assert lines[2].split()[:2] == ["svd-float64", "2"] and lines[2].endswith(" -")
    assert lines[3] == f"device {find_device('cpu').name}"
    assert lines[4] == "units: 10.2 kB to read, 5.1 kB to write"
    assert re.fullmatch(r"files: \d+\.\d kB to copy, \d+\.\d kB to hash", lines[5])
    assert re.fullmatch(r"memory: \d+\.\d kB for the largest unit, \d+\.\d MB in all", lines[6])
    assert lines[7] == f"no time: nobody measured {find_device('cpu').name}; --on this of `pome estimate` does"
    status, out, _ = run(capsys, "estimate", *pair, "--device", "cpu", "--json", "--quiet")
    document = json.loads(out)
    assert (document["seconds"], document["measured"]) == (None, None) and document["routes"]["svd-float64"][
        "flops"
    ] > 0


def test_rates_of_earlier_runs_give_a_time_to_estimate_and_dry_run_alike(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    leave_rates(find_device("cpu").name, Rates("monday, by runs here", 2.0, 1e6, 1e6, ALL))
    _, _, err = run(capsys, "estimate", *pair, "--device", "cpu", "--layers", "ffn")
    said = err.splitlines()[-1]
    assert re.match(r"expected time 2\.\d s: start 2\.\d s, copy 0\.0 s, edit 0\.0 s, hash 0\.1 s \(", said)
    assert said.endswith("(rates of monday, by runs here)")
    _, out, err = run(capsys, "edit", *pair, "out", "--dry-run", "--device", "cpu", "--layers", "ffn", "--json")
    assert any(line.startswith("expected time 2.") for line in err.splitlines())
    estimate = json.loads(out)["estimate"]
    assert estimate["seconds"] == pytest.approx(2.0, abs=0.5) and estimate["routes"]["svd-float64"]["matrices"] == 6
    assert not Path("out").exists() and not Path("out.pome-staging").exists()


def test_a_route_without_a_rate_is_named(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    leave_rates(find_device("cpu").name, Rates("monday", 2.0, 1e6, 1e6, {"gram-float64": ((10.0, 1e9),)}))
    _, _, err = run(capsys, "estimate", *pair, "--device", "cpu")
    assert "no time: route svd-float64 not measured (rates of monday)" in err


def test_another_device_is_meant_by_its_name(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    leave_rates("NVIDIA A100-SXM4-80GB", Rates("monday", 3.0, 1e6, 1e6, ALL))
    leave_rates("NVIDIA A100-PCIE-40GB", Rates("monday", 3.0, 1e6, 1e6, ALL))
    _, _, err = run(capsys, "estimate", *pair, "--on", "sxm4")
    assert "device NVIDIA A100-SXM4-80GB" in err and re.search(r"expected time 3\.\d s: .* \(rates of monday\)", err)
    assert run(capsys, "estimate", *pair, "--on", "B300")[0] == 0
    _, _, err = run(capsys, "estimate", *pair, "--on", "B300")
    assert "no time: nobody measured B300" in err
    status, out, err = run(capsys, "estimate", *pair, "--on", "a100")
    assert (status, out) == (2, "") and "--on: 'a100' is in the names of NVIDIA A100-PCIE-40GB; NVIDIA A100" in err


def test_this_is_measured_and_left_for_later(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pome.editing import measurement

    monkeypatch.setattr(measurement, "FILE_BYTES", 1 << 20)
    monkeypatch.setattr(measurement, "ROUND_SECONDS", 0.02)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = hash_tree(Path("."))
    status, _, err = run(capsys, "estimate", *pair, "--device", "cpu", "--layers", "ffn", "--on", "this")
    assert status == 0 and "expected time" in err.splitlines()[-1]
    (left,) = read_cache().values()
    assert set(left.routes) == {"svd-float64"} and left.copy_bytes and left.hash_bytes and left.startup_seconds
    after = {name: digest for name, digest in hash_tree(Path(".")).items() if not name.startswith("cache")}
    assert after == before  # what was copied to measure is gone
    _, _, later = run(capsys, "estimate", *pair, "--device", "cpu", "--layers", "ffn")
    assert "expected time" in later.splitlines()[-1]


def test_errors_are_those_of_an_edit(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("gone", "ft"): (1, "gone"),
        ("base", "base"): (1, "BASE and FT are the same files"),
        ("base", "ft", "--layers", "gate_proj"): (2, "'gate_proj' is neither a role"),
        ("base", "ft", "--layers", "q", "--exclude", "."): (1, "no tensor matches --layers q"),
        ("base", "ft", "--rank", "3", "--energy", "0.5"): (2, "energy"),
        ("base", "ft", "--on", ""): (2, "--on: empty"),
        ("base", "ft", "--device", "cuda:99", "--on", "this"): (1, "device cuda:99 is not there"),
    }
    for arguments, (status, said) in cases.items():
        found, out, err = run(capsys, "estimate", *arguments)
        assert (found, out) == (status, "") and said in err and "Traceback" not in err, arguments


def test_a_run_leaves_its_rates(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pome.editing import run_rates
    from pome.planning import estimate

    monkeypatch.setattr(run_rates, "LEAST_BYTES", 0)
    monkeypatch.setattr(run_rates, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(estimate, "LEAST_SECONDS", 0.0)
    assert run(capsys, "edit", *pair, "out", "--device", "cpu", "--quiet")[0] == 0
    (name,) = read_cache()
    left = read_cache()[name]
    assert name == find_device("cpu").name and left.measured.endswith("by runs here")
    assert set(left.routes) == {"svd-float64"} and left.copy_bytes and left.hash_bytes
    # A run that goes on, or whose decompositions are known already, tells nothing.
    tensors = read_tensors(Path("base"))
    write_checkpoint(tmp_path / "ft2", perturb(tensors, seed=5), config=json.loads(Path("ft/config.json").read_text()))
    grid = ("--rank-ratio", "0.5", "--score-cmd", "echo {model} >/dev/null; echo 1", "--write-best", "--quiet")
    Path("cache/pome/rates.json").unlink()
    assert run(capsys, "sweep", "base", "ft2", "best", *grid)[0] == 0
    assert read_cache() == {}
