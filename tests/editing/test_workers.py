"""Workers of one machine: equal threads give equal bytes, the split survives a resume, interrupts lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import pome
from pome.editing.unit import list_devices
from pome.editing.workers import map_on_devices
from pome.output.staging import Staging
from pome.planning.units import Unit
from support.checkpoints import environment, hash_tree, perturb, write_checkpoint
from support.units import make_unit

EDIT = "import sys, pome; pome.edit(*sys.argv[1:4])"
WITH_THREADS = """
import sys, torch, pome
from pome.editing import workers
from pome.engines.local import map_units
def map_alone(units, devices, cores, read, work):
    torch.set_num_threads(int(sys.argv[4]))
    for unit in units:
        yield work(unit, read(unit), "cpu")
workers.map_on_devices = map_alone
pome.edit(*sys.argv[1:4])
"""


def write_pair(folder: Path, shapes: list[tuple[int, int]]) -> list[str]:
    torch.manual_seed(0)
    base = {f"layers.{i}.mlp.up_proj.weight": torch.randn(shape) * 0.02 for i, shape in enumerate(shapes)}
    sides = (("base", base), ("ft", perturb(base, 0.001)))
    return [str(write_checkpoint(folder / name, tensors)) for name, tensors in sides]


def edit(pair: list[str], out: Path, cores: int, *more: str, code: str = EDIT) -> dict[str, str]:
    """Hashes of an output made by a process with so many cores; its manifest is left out, whose times differ."""
    done = run_python_on(cores, "-c", code, *pair, str(out), *more)
    assert done.returncode == 0, done.stderr
    return {name: digest for name, digest in hash_tree(out).items() if name != "pome_manifest.json"}


def run_python_on(cores: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = environment() | {"OMP_NUM_THREADS": str(cores)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=env)


SMALL, LARGE = [(1500, 800)] * 3, [(1700, 1600)]


@pytest.mark.slow
def test_side_by_side_gives_the_bytes_of_one_after_the_other_with_one_thread(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, SMALL)
    alone = edit(pair, tmp_path / "alone", 1)
    assert edit(pair, tmp_path / "beside", 3) == alone
    # Not because threads make no difference to such a matrix: then nothing would be told by equal bytes.
    assert edit(pair, tmp_path / "threads", 3, "3", code=WITH_THREADS) != alone


@pytest.mark.slow
def test_a_large_matrix_takes_all_cores(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, LARGE)
    assert edit(pair, tmp_path / "two", 2) == edit(pair, tmp_path / "by-hand", 2, "2", code=WITH_THREADS)


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_split_that_it_began_with(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, LARGE + SMALL)
    wanted = edit(pair, tmp_path / "wanted", 2)
    stop = (
        "import sys, pome\nfrom pome.output import commits as module\n"
        "module.COMMIT_UNITS = 1\n"
        "class Stop(pome.Progress):\n    def advance(self, task, amount, nbytes=0, note='', work=0.0):\n"
        "        if task == 'edit' and amount: raise KeyboardInterrupt\n"
        "pome.edit(*sys.argv[1:4], progress=Stop())"
    )
    out = tmp_path / "out"
    done = run_python_on(2, "-c", stop, *pair, str(out))
    assert "KeyboardInterrupt" in done.stderr and not out.exists()
    journal = [json.loads(line) for line in (tmp_path / "out.pome-staging" / "journal").read_text().splitlines()]
    assert {"cores": 2} in journal and sum("unit" in entry for entry in journal) < 4
    done = run_python_on(1, "-m", "pome", "edit", *pair, str(out))
    assert done.returncode == 0, done.stderr
    assert "going on with the split over 2 cores of the earlier run" in done.stderr
    assert {name: digest for name, digest in hash_tree(out).items() if name != "pome_manifest.json"} == wanted


def test_the_split_of_a_staging_folder_is_the_first_one_said(tmp_path: Path) -> None:
    command = {"a": 1}
    with Staging(tmp_path / "out", command, fresh=False) as staging:
        assert staging.cores is None and staging.keep_cores(4) == 4 and staging.keep_cores(2) == 4
    with Staging(tmp_path / "out", command, fresh=False) as staging:
        assert staging.cores == 4 and staging.keep_cores(2) == 4
        staging.clear_output()
        assert staging.keep_cores(2) == 2
    with Staging(tmp_path / "out", command, fresh=True) as staging:
        assert staging.cores is None


@pytest.mark.parametrize("said", [0, -1, True, "2", 1.5, None])
def test_a_journal_line_with_no_number_of_cores_ends_what_is_read(said: object, tmp_path: Path) -> None:
    with Staging(tmp_path / "out", {}, fresh=False):
        pass
    (tmp_path / "out.pome-staging" / "journal").write_text(json.dumps({"cores": said}) + "\n")
    with Staging(tmp_path / "out", {}, fresh=False) as staging:
        assert staging.cores is None


SIZES = [(200, 100), (3000, 2000), (400, 300), (3000, 2000), (200, 100), (900, 800)]


def make_units() -> list[Unit]:
    return [make_unit(shape, start=i) for i, shape in enumerate(SIZES)]


def list_readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pome-read")]


def test_each_unit_has_its_threads_and_workers_and_all_is_as_before() -> None:
    units, before, running, most = make_units(), torch.get_num_threads(), [0], {}

    def work(unit: Unit, start: int, device: str) -> tuple[int, int]:
        assert (start, device) == (unit.start, "cpu")
        running[0] += 1
        time.sleep(0.05)
        threads = torch.get_num_threads()
        most[threads] = max(most.get(threads, 0), running[0])
        running[0] -= 1
        return unit.start, threads

    found = dict(map_on_devices(units, ["cpu"], 6, lambda unit: unit.start, work))
    assert found == {unit.start: unit.count_threads(6) for unit in units}
    assert most == {2: 2, 1: 4}  # of six cores: both large ones on three workers, four small ones on six
    fresh: list[int] = []
    later = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == before and fresh == [before]


def test_accelerators_take_the_costly_units_first() -> None:
    first: list[int] = []
    waiting = threading.Barrier(2)

    def read(unit: Unit) -> None:
        first.append(unit.start)
        if len(first) <= 2:
            waiting.wait()  # each worker's first unit, before either has gone on

    found = list(map_on_devices(make_units(), ["cuda:0", "cuda:1"], 2, read, lambda unit, _, device: device))
    assert set(found) == {"cuda:0", "cuda:1"} and sorted(first[:2]) == [1, 3] and len(first) == len(SIZES)
    alone = list(map_on_devices(make_units(), ["cuda:0"], 2, lambda unit: None, lambda unit, _, __: unit.start))
    assert alone == list(range(6))  # the order of the files


@pytest.mark.parametrize("where", ["read", "work"])
def test_an_error_of_one_worker_ends_all_with_what_was_done(where: str) -> None:
    before, done = torch.get_num_threads(), []

    def step(stage: str, unit: Unit) -> int:
        if stage == where and unit.start == 2:
            raise OSError(f"{stage} of {unit.start}")
        return unit.start

    results = map_on_devices(
        make_units(), ["cpu"], 4, lambda unit: step("read", unit), lambda unit, _, __: step("work", unit)
    )
    with pytest.raises(OSError, match=f"{where} of 2"):
        for start in results:
            done.append(start)
    assert {1, 3} <= set(done)  # the group of the large ones was through
    assert not list_readers() and torch.get_num_threads() == before


def test_ctrl_c_yields_what_every_worker_is_at() -> None:
    units = [make_unit((200, 100), start=i) for i in range(50)]
    together, sent, found = threading.Barrier(3), threading.Event(), []

    def work(unit: Unit, _: None, device: str) -> int:
        if not sent.is_set() and together.wait() == 0:
            sent.set()  # once: a second one waits for nothing, and a third would hit another test
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)  # in which the main thread mostly hears it
        return unit.start

    with pytest.raises(KeyboardInterrupt):
        for start in map_on_devices(units, ["cpu"], 3, lambda unit: None, work):
            found.append(start)
    assert 3 <= len(set(found)) == len(found) < len(units)
    assert not list_readers()


def test_cuda_is_every_cuda_device_and_a_number_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert list_devices("cuda") == list_devices("auto") == ["cuda:0", "cuda:1", "cuda:2"]
    assert list_devices("cuda:1") == ["cuda:1"] and list_devices("cpu") == ["cpu"]
    for absent in ("cuda:3", "mps"):
        with pytest.raises(pome.NumericalError, match=f"device {absent} is not there"):
            list_devices(absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list_devices("auto") == ["cpu"]
    with pytest.raises(pome.NumericalError, match="device cuda is not there"):
        list_devices("cuda")
