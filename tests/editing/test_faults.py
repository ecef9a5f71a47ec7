"""Whatever fails and whenever it does: inputs untouched, no OUT or the whole one, and the same command goes on.

scripts/prove_safety.py does the same at every call and in larger numbers.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from real_weights import Pair
from support.checkpoints import llama_pair, read_ranges
from support.faults import (
    CHANGES,
    FOLDERS,
    READS,
    SYNCS,
    WRITES,
    Disk,
    Fault,
    Launcher,
    Scene,
    check_message,
    hash_files,
)

KILLS = 25
FULL_DISKS = 20


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as running:
        yield running


@pytest.fixture(scope="module")
def scene(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """One file of weights, two units."""
    folder = tmp_path_factory.mktemp("scene")
    return Scene(launcher, *llama_pair(folder), folder / "work")


@pytest.fixture(scope="module")
def sharded(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Two shards, an index, a folder of code."""
    folder = tmp_path_factory.mktemp("sharded")
    base, ft = llama_pair(folder, shards=2)
    (ft / "code").mkdir()
    (ft / "code/model.py").write_text("x = 1\n")
    return Scene(launcher, base, ft, folder / "work", "--layers", "ffn")


@pytest.mark.parametrize("kind, calls", [("kill", (*WRITES, *FOLDERS)), ("tear", WRITES[:3])])
def test_killed_at_every_change_of_the_disk(scene: Scene, kind: str, calls: tuple[str, ...]) -> None:
    """Before each call that changes a file or a folder, and in the middle of each write."""
    for at in range(scene.count(*calls, commit_units=1)):
        assert scene.run(Fault(kind, calls, at), commit_units=1).status == -9
        scene.check_resume()


def test_killed_at_random_instants_of_a_real_run(launcher: Launcher, rxnfp: Pair, tmp_path: Path) -> None:
    real = Scene(launcher, *rxnfp, tmp_path / "work", "--exclude", r"layer\.([4-9]|1\d)\.")
    rng = Random(4)
    killed = 0
    for i in range(KILLS):
        ended = real.run(kill_after=rng.uniform(0, real.seconds), commit_units=1 + i % 4)
        killed += ended.status == -9
        real.check_resume()
    # The time that a run takes varies, so that some are done before their end comes; most must not be.
    assert killed > KILLS // 2


@pytest.mark.parametrize("calls, every", [((*READS, "open"), 5), ((*WRITES, *SYNCS, *FOLDERS, "fchmod"), 3)])
def test_an_error_at_a_read_or_a_write(scene: Scene, calls: tuple[str, ...], every: int) -> None:
    failed = 0
    for at in range(0, scene.count(*calls, commit_units=1), every):
        ended = scene.run(Fault("error", calls, at), commit_units=1)
        if ended.status == 0:  # a lock's or a probe's failure may be lived with, and so may litter
            scene.check_rest()
            scene.clear()
        else:
            failed += 1
            check_message(ended)
            scene.check_resume()
    assert failed >= 8


def test_bytes_that_a_failed_sync_dropped_are_written_again(sharded: Scene) -> None:
    """After a failed fsync Linux may drop what was written and report success next time."""
    calls = ("fdatasync",) if hasattr(os, "fdatasync") else SYNCS
    for at in range(sharded.count(*calls, commit_units=2)):
        ended = sharded.run(Fault("forget", calls, at), commit_units=2)
        check_message(ended)
        assert "Input/output error" in ended.stderr
        sharded.check_resume()


def test_a_file_system_that_becomes_read_only(scene: Scene) -> None:
    for at in range(0, scene.count(*CHANGES, commit_units=1), 6):
        ended = scene.run(Fault("broken", CHANGES, at, errno.EROFS), commit_units=1)
        if ended.status == 0:  # only the clearing up was left to do
            assert scene.out.exists()
        else:
            check_message(ended)
            assert "read-only" in ended.stderr
        scene.check_resume()


def test_calls_that_move_only_a_part(sharded: Scene) -> None:
    for calls in (READS, WRITES[:3]):
        assert sharded.run(Fault("short", calls), commit_units=1).status == 0
        sharded.check_rest()
        sharded.clear()


def mount_small(folder: Path) -> bool:
    """A file system of its own in memory, where we may mount one."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode == 0


def test_a_disk_that_is_full(launcher: Launcher, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A small file system, really full, at 20 sizes; where none can be mounted, the system's limit on file sizes."""
    pair = llama_pair(tmp_path, layers=24)
    work = tmp_path / "work"
    work.mkdir()
    mounted = mount_small(work)
    if mounted:
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(work)], check=True))
    full = Scene(launcher, *pair, work)
    used = sum(path.stat().st_size for path in pair[1].iterdir())
    for i in range(FULL_DISKS):
        limit = used * (i + 1) // (FULL_DISKS + 1)
        if mounted:
            resize(work, f"{limit // 4096 * 4096}")
            ended = full.run(ignore_space=True, commit_units=1)
            resize(work, "64m")
        else:
            ended = full.run(file_limit=limit, commit_units=1)
        check_message(ended)
        assert ("make room" if mounted else "raise the limit") in ended.stderr
        full.check_resume()


def resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def test_a_write_that_finds_no_space(scene: Scene) -> None:
    for at in range(0, scene.count(*WRITES), 2):
        ended = scene.run(Fault("broken", WRITES, at, errno.ENOSPC))
        check_message(ended)
        assert "No space left on device; make room there, then run the same command again" in ended.stderr
        scene.check_resume()


def test_an_overwrite_that_is_killed_leaves_the_old_or_the_new(launcher: Launcher, tmp_path: Path) -> None:
    scene = Scene(launcher, *llama_pair(tmp_path), tmp_path / "work", "--overwrite")
    old = tmp_path / "old"
    (old / "deep").mkdir(parents=True)
    (old / "deep/file").write_text("the former")
    (old / "pome_manifest.json").write_text("{}")
    calls = (*WRITES, *FOLDERS)
    shutil.copytree(old, scene.out)
    total = scene.count(*calls)
    seen = set()
    for at in range(total - 12, total + 1):
        shutil.copytree(old, scene.out)
        assert scene.run(Fault("kill", calls, at)).status in (-9, 0)
        replaced = scene.staging / "replaced"
        if not scene.out.exists():
            assert hash_files(replaced) == hash_files(old)
            seen.add("moved")
        elif (scene.out / "deep").exists():
            assert hash_files(scene.out) == hash_files(old)
            seen.add("old")
        else:
            scene.check_output()
            seen.add("new")
        assert scene.run().status == 0
        scene.check_output()
        assert [path.name for path in scene.work.iterdir()] == ["out"]
        scene.clear()
    assert seen == {"old", "moved", "new"}


def find_last(trace: list[tuple[Any, ...]], end: int, wanted: Callable[[tuple[Any, ...]], bool]) -> int:
    return max((i for i in range(end) if wanted(trace[i])), default=-1)


def test_syncs_come_in_the_order_that_a_power_cut_asks_for(sharded: Scene) -> None:
    trace = sharded.run(trace=True, commit_units=1).trace
    staged = str(sharded.staging / "output") + os.sep
    ranges = {name: place for file in sharded.ft.glob("*.safetensors") for name, place in read_ranges(file).items()}
    journalled = 0
    for i, op in enumerate(trace):
        if op[0] == "write" and op[1].endswith("/journal"):
            for entry in (entry for entry in map(json.loads, op[3].splitlines()) if "unit" in entry):
                journalled += 1
                unit, _ = json.loads(entry["unit"])
                path, (start, end) = staged + entry["file"], ranges[unit]
                wrote = find_last(trace, i, lambda o: o[0] == "write" and o[1] == path and start <= o[2] < end)  # noqa: B023
                synced = find_last(trace, i, lambda o: o[:2] == ("sync", path))  # noqa: B023
                assert 0 <= wrote < synced < i, f"{unit!r} was journalled before it was safe"
            for name in re.findall(rb'"copied": "([^"]+)"', op[3]):
                path = staged + name.decode()
                wrote = find_last(trace, i, lambda o: o[0] == "write" and o[1] == path)  # noqa: B023
                assert wrote < find_last(trace, i, lambda o: o[:2] == ("sync", path)) < i  # noqa: B023
    assert journalled == 6
    renamed = next(i for i, op in enumerate(trace) if op[0] == "rename")
    assert trace[renamed][1:] == (staged.rstrip(os.sep), str(sharded.out))
    files = {op[1] for op in trace[:renamed] if op[0] == "write" and op[1].startswith(staged)}
    assert {path.removeprefix(staged) for path in files} == sharded.expected.keys()
    for path in files:
        wrote = find_last(trace, renamed, lambda o: o[0] in ("write", "truncate") and o[1] == path)  # noqa: B023
        assert wrote < find_last(trace, renamed, lambda o: o[:2] == ("sync", path)), f"{path} was not safe"  # noqa: B023
        folder = os.path.dirname(path)
        made = find_last(trace, renamed, lambda o: o[:2] == ("create", path))  # noqa: B023
        assert made < find_last(trace, renamed, lambda o: o[:2] == ("sync", folder)), f"{folder} was not safe"  # noqa: B023
    assert trace[renamed + 1] == ("sync", str(sharded.work))
    removed = next(i for i, op in enumerate(trace) if op[0] == "unlink" and i > renamed)
    assert removed > renamed + 1


def test_a_power_cut_loses_no_finished_unit_and_leaves_no_wrong_output(sharded: Scene) -> None:
    """At 30 instants: in a third of them nothing is left that was not synced, else some of it is, and some is torn."""
    trace = sharded.run(trace=True, commit_units=1).trace
    rng = Random(7)
    for i in range(30):
        cut = rng.randint(0, len(trace))
        safe = find_last(trace, cut, lambda op: op[0] == "sync" and op[1].endswith("/journal"))
        journal = b"".join(op[3] for op in trace[: max(safe, 0)] if op[0] == "write" and op[1].endswith("/journal"))
        sharded.clear()
        Disk(str(sharded.work), trace[:cut]).cut(sharded.work, rng if i % 3 else None)
        unfinished = sharded.staging.exists() and not sharded.out.exists()
        again = sharded.check_resume()
        if unfinished and journal.count(b'"unit"'):
            found = re.search(r"going on: (\d+) of 6 units", again.stderr)
            assert found is not None and int(found[1]) >= journal.count(b'"unit"')


def test_the_power_cut_would_show_a_missing_sync(sharded: Scene) -> None:
    """The check of the check: the same trace as if weight files were synced when copied, and never when edited."""
    trace = sharded.run(trace=True, commit_units=1).trace
    sharded.clear()
    renamed = next(i for i, op in enumerate(trace) if op[0] == "rename")
    synced: set[str] = set()
    unsafe = []
    for op in trace[:renamed]:
        if op[0] == "sync" and op[1].endswith(".safetensors"):
            if op[1] in synced:
                continue
            synced.add(op[1])
        unsafe.append(op)
    Disk(str(sharded.work), unsafe).cut(sharded.work, None)
    with pytest.raises(AssertionError):
        sharded.check_resume()
    sharded.clear()
