"""The split of cores: threads by shape, groups that lose no unit, and cores as the system tells them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pome.planning import split
from pome.planning.split import CORE_BYTES, SIDE, count_cores, find_threads, group_units
from pome.planning.units import TORCH_BYTES, Plan
from support.units import make_unit

CORES = st.integers(1, 200)
SHORT = st.integers(1, 60_000)
BYTES = st.integers(0, 1 << 40)


@given(SHORT, BYTES, CORES)
def test_threads_leave_no_core_over_and_suffice(short: int, workspace: int, cores: int) -> None:
    threads = find_threads(short, workspace, cores)
    assert 1 <= threads <= cores and cores % threads == 0
    assert threads == cores or (threads * SIDE >= short and threads * CORE_BYTES >= workspace)
    smaller = [count for count in range(1, threads) if cores % count == 0]
    assert not any(count * SIDE >= short and count * CORE_BYTES >= workspace for count in smaller)


@given(SHORT, SHORT, BYTES, BYTES, CORES)
def test_a_larger_matrix_never_gets_fewer_threads(a: int, b: int, x: int, y: int, cores: int) -> None:
    least, most = (find_threads(pick(a, b), pick(x, y), cores) for pick in (min, max))
    assert least <= most


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), max_size=30), st.integers(1, 12))
def test_groups_hold_every_unit_once_by_its_threads(sizes: list[tuple[int, int]], cores: int) -> None:
    units = [make_unit((1000 * m, 700 * n), start=i) for i, (m, n) in enumerate(sizes)]
    groups = group_units(units, cores)
    assert Counter(u.start for _, group in groups for u in group) == Counter(u.start for u in units)
    counts = [threads for threads, _ in groups]
    assert counts == sorted(set(counts), reverse=True)
    for threads, group in groups:
        assert all(unit.count_threads(cores) == threads for unit in group)
        works = [unit.work for unit in group]
        assert threads == cores or works == sorted(works, reverse=True)
        equal = [[u.start for u in group if u.work == work] for work in works]
        assert all(starts == sorted(starts) for starts in equal)  # the files' order, for disks and hashes


def test_memory_is_a_workspace_for_each_worker() -> None:
    small, large = make_unit((1000, 500)), make_unit((9000, 4000))
    alone = Plan((small,), (), 9, {}).expect_memory(8)
    assert alone == TORCH_BYTES + small.workspace  # one unit has one worker
    assert Plan((small,) * 99, (), 9, {}).expect_memory(8) == TORCH_BYTES + 8 * small.workspace
    threads = large.count_threads(8)
    both = Plan((small,) * 99 + (large,) * 99, (), 9, {}).expect_memory(8)
    assert both == TORCH_BYTES + max(8 * small.workspace, 8 // threads * large.workspace)


@pytest.mark.parametrize(("said", "cores"), [("3", 3), ("5,2", 5), (" 7 ", 7)])
def test_the_environment_decides(said: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert count_cores() == cores


def put_system(monkeypatch: pytest.MonkeyPatch, folder: Path, siblings: dict[int, str], quota: str) -> None:
    """A machine whose CPUs share cores as `siblings` says, in a container with a quota."""
    for cpu, text in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")
    (folder / "cpu.max").write_text(quota)
    monkeypatch.setattr(split, "_CPUS", folder)
    monkeypatch.setattr(split, "_QUOTA", folder / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(siblings), raising=False)


@pytest.mark.parametrize("said", ["", "0", "many", "-2"])
@pytest.mark.parametrize(
    ("siblings", "quota", "cores"),
    [
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, "max 100000", 2),  # hyperthreads share a core
        ({i: str(i) for i in range(6)}, "250000 100000", 2),
        ({i: str(i) for i in range(6)}, "50000 100000", 1),
        ({i: str(i) for i in range(6)}, "", 6),
    ],
)
def test_cores_are_the_physical_ones_within_the_quota(
    said: str, siblings: dict[int, str], quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    put_system(monkeypatch, tmp_path, siblings, quota)
    assert count_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux binds processes to processors")
def test_a_process_counts_the_processors_that_it_is_bound_to() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from pome.planning.split import count_cores; print(count_cores())"
    bare = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    path = str(Path(split.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare | {"PYTHONPATH": path})
    assert done.stdout.strip() == "1", done.stderr
