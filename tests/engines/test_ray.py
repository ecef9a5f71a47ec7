"""The Ray engine on this machine and on clusters of processes, with jobs that need no checkpoint."""

import contextlib
import os
import signal
import tempfile
import threading
import time
from random import Random

import pytest

from pome.engines.ray import Cluster, RayEngine, _make_environment
from pome.engines.ray_queue import RETRIES
from pome.errors import ClusterError
from support.ray_jobs import ROOT, CountingJob, Nodes, count_begun, killing, list_processes

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]))


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left():
    """All that Ray makes here lies in one folder with a short path, of which nothing is left at the end."""
    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        yield
    assert not list_processes(f"{folder}/")
    os.rmdir(folder)


@pytest.fixture(scope="module")
def nodes():
    with Nodes(3) as started:
        yield started


@contextlib.contextmanager
def joined(nodes, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, nodes.environment[name])
    yield


def run(cluster, job, count, folder, paths=(), costs=None):
    with RayEngine(cluster, job, paths, folder) as engine:
        found = list(engine.map(range(count), costs or [1.0] * count, [f"unit {n}" for n in range(count)]))
    return found, engine


TWO = Cluster(threads=1, at_once=2)


def test_every_result_comes_once_from_workers_on_this_machine(tmp_path):
    found, engine = run(TWO, CountingJob(tmp_path / "notes"), 300, tmp_path / "probe")
    assert sorted(found) == [n * n for n in range(300)]
    assert set(count_begun(tmp_path / "notes").values()) == {1}
    assert engine.stats == {"given": 1, "lost": 0} and engine.placed.device == "cpu"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]


def test_workers_are_killed_and_every_unit_is_done(tmp_path):
    with killing(Random(0), (0.3, 0.8), 3, f"{tempfile.gettempdir()}/") as killed:
        found, engine = run(TWO, CountingJob(tmp_path / "notes", 0.1), 60, tmp_path / "probe")
    assert sorted(found) == [n * n for n in range(60)]
    assert len(killed) == 3 and engine.stats["lost"] >= 1
    assert max(count_begun(tmp_path / "notes").values()) <= RETRIES + 1


def test_a_unit_that_kills_its_workers_is_named(tmp_path):
    job = CountingJob(tmp_path / "notes", deadly=(7,))
    with pytest.raises(ClusterError, match=r"unit 7: 4 workers were lost"):
        run(TWO, job, 30, tmp_path / "probe")
    assert count_begun(tmp_path / "notes")[7] == RETRIES + 1


def test_an_error_of_a_unit_is_raised_after_what_was_done(tmp_path):
    job = CountingJob(tmp_path / "notes", wrong=5)
    with (
        pytest.raises(ValueError, match="unit 5 is wrong"),
        RayEngine(TWO, job, (), tmp_path / "probe") as engine,
    ):
        found = []
        for result in engine.map(range(20), [20.0 - n for n in range(20)], ["x"] * 20):
            found.append(result)
    assert 0 in found and 25 not in found


def test_ctrl_c_yields_what_the_workers_are_at(tmp_path):
    found = []
    with (
        RayEngine(TWO, CountingJob(tmp_path / "notes", 0.3), (), tmp_path / "probe") as engine,
        pytest.raises(KeyboardInterrupt),
    ):
        for result in engine.map(range(1000), [1.0] * 1000, ["x"] * 1000):
            if not found:
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            found.append(result)
    begun = count_begun(tmp_path / "notes")
    assert sorted(found) == sorted(n * n for n in begun) and 2 <= len(begun) < 100


def test_slots_have_the_threads_that_are_set(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found, engine = run(Cluster(threads=2), CountingJob(tmp_path / "notes", threads=True), 2, tmp_path / "probe")
    assert found == [(2, "2")] * 2 and engine.placed.workers == max(1, len(os.sched_getaffinity(0)) // 2)


def test_slots_that_no_node_can_hold(tmp_path, nodes, monkeypatch):
    with joined(nodes, monkeypatch):
        for cluster, said in (
            (Cluster(nodes.address, threads=64), "64 cores"),
            (Cluster(nodes.address, memory=1 << 60), "1152921.5 TB of memory"),
        ):
            with pytest.raises(ClusterError, match=rf"no node of the cluster offers .*{said}"):
                run(cluster, CountingJob(tmp_path / "notes"), 1, tmp_path / "probe")


def test_a_unit_that_kills_the_workers_of_gpus_is_done_on_a_cpu(tmp_path, monkeypatch):
    """The GPU is one by name alone: Ray gives out what a node says it has."""
    job = CountingJob(tmp_path / "notes", deadly=(3,), deadly_on="cuda")
    with Nodes(1, gpus=1) as nodes, joined(nodes, monkeypatch):
        found, engine = run(Cluster(nodes.address, "cuda"), job, 6, tmp_path / "probe")
    assert sorted(found) == [n * n for n in range(6)] and engine.placed.device == "cuda"
    assert count_begun(tmp_path / "notes")[3] == RETRIES + 2 == engine.stats["given"]


def test_the_head_is_lost(tmp_path, monkeypatch):
    with Nodes(2) as nodes, joined(nodes, monkeypatch):
        cluster = Cluster(nodes.address, threads=1)
        with (
            pytest.raises(ClusterError, match="head of the cluster is lost"),
            RayEngine(cluster, CountingJob(tmp_path / "notes", 0.2), (), tmp_path / "probe") as engine,
        ):
            for number, _ in enumerate(engine.map(range(1000), [1.0] * 1000, ["x"] * 1000)):
                if number == 5:
                    nodes.kill(0)


def test_the_process_that_speaks_to_ray_has_the_settings_that_its_pitfalls_ask_for(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    own, joined = _make_environment(None), _make_environment("head:6379")
    for environment in (own, joined):
        assert environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"  # uploads the working folder under `uv run`
        assert environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"  # else a FutureWarning
    assert own["RAY_AUTH_MODE"] == "token" and len(own["RAY_AUTH_TOKEN"]) == 64 and "RAY_ADDRESS" not in own
    assert own["RAY_AUTH_TOKEN"] != _make_environment(None)["RAY_AUTH_TOKEN"]


def test_three_nodes_of_which_one_is_lost(tmp_path, nodes, monkeypatch):
    with joined(nodes, monkeypatch):
        cluster = Cluster(nodes.address, threads=1)
        with RayEngine(cluster, CountingJob(tmp_path / "notes", 0.1), (), tmp_path / "probe") as engine:
            assert (engine.placed.workers, engine.placed.nodes, engine.placed.hosts) == (3, 3, 1)
            found = []
            for result in engine.map(range(150), [1.0] * 150, ["x"] * 150):
                found.append(result)
                if len(found) == 20:
                    nodes.kill(2)
        assert sorted(found) == [n * n for n in range(150)] and engine.stats["lost"] >= 1
        assert max(count_begun(tmp_path / "notes").values()) <= RETRIES + 1
        nodes.add()  # for the tests that follow


@pytest.mark.parametrize("other", ["Python", "torch", "pome"])
def test_a_node_with_another_version_is_named(tmp_path, monkeypatch, other):
    """A node whose Python finds another `torch` or `pome` first, or says another version."""
    fake = tmp_path / "fake"
    fake.mkdir()
    if other == "torch":
        (fake / "torch-9.9.dist-info").mkdir()
        (fake / "torch-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    elif other == "pome":
        (fake / "pome").mkdir()
        (fake / "pome" / "__init__.py").write_text("")
    else:
        (fake / "sitecustomize.py").write_text("import platform\nplatform.python_version = lambda: '3.1.4'\n")
    path = os.pathsep.join([str(fake), str(ROOT / "src"), str(ROOT / "tests")])
    with Nodes(1) as nodes, joined(nodes, monkeypatch):
        nodes.add(PYTHONPATH=path)
        begun = time.monotonic()
        with pytest.raises(ClusterError, match=rf"^node .* has another {other} \(.*; install the same {other} there"):
            run(Cluster(nodes.address, threads=1), CountingJob(tmp_path / "notes"), 4, tmp_path / "probe")
        assert time.monotonic() - begun < 60 and not (tmp_path / "notes").exists()
