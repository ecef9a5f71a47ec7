"""Edits on Ray: the bytes of the local engine, whatever is killed, and nothing published after an error."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from pome.errors import OutputError
from pome.output.weight_files import WeightFiles
from support.checkpoints import ROOT, environment, hash_tree, llama_pair, read_manifest, write_checkpoint
from support.ray_jobs import Nodes, killing, list_processes

pytestmark = pytest.mark.slow

PATCHED = ROOT / "tests" / "support" / "patched"
HIDDEN, INNER, LAYERS = 512, 1536, 24


def run(*arguments, nodes=None, check=True, **variables):
    """One `pome edit --layers ffn ARGUMENTS` in a process, at one thread."""
    command = [sys.executable, "-m", "pome", "edit", *map(str, arguments), "--layers", "ffn"]
    if nodes is not None:
        command += ["--engine", "ray", "--ray-address", nodes.address]
        variables = {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")} | variables
    variables = {**environment(), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert not check or done.returncode == 0, done.stderr
    return done


def assert_same(out, expected):
    """Every byte as the local engine wrote it; the manifest too, but for the engine's name."""
    mine, others = hash_tree(out), hash_tree(expected)
    assert mine.pop("pome_manifest.json") != others.pop("pome_manifest.json") and mine == others
    manifest = read_manifest(out)
    assert manifest["spec"].pop("engine") == "ray"
    plain = read_manifest(expected)
    plain["spec"].pop("engine")
    assert {key: value for key, value in manifest.items() if key != "checksum"} == {
        key: value for key, value in plain.items() if key != "checksum"
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A pair whose edit takes no time, and what the local engine makes of it."""
    folder = tmp_path_factory.mktemp("small")
    base, ft = llama_pair(folder, shards=2)
    run(base, ft, folder / "local")
    return base, ft, folder / "local"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pair of 72 matrices, whose edit takes seconds, and what the local engine makes of it."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    sides = {"base": {}, "ft": {}}
    for layer in range(LAYERS):
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            weight = torch.randn(shape, generator=generator) * 0.02
            key = f"model.layers.{layer}.mlp.{name}_proj.weight"
            sides["base"][key] = weight.bfloat16()
            sides["ft"][key] = (weight + 0.002 * torch.randn(shape, generator=generator)).bfloat16()
    config = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER}
    for name, tensors in sides.items():
        write_checkpoint(folder / name, tensors, shards=3, config=config)
    run(folder / "base", folder / "ft", folder / "local")
    return folder / "base", folder / "ft", folder / "local"


@pytest.fixture(scope="module")
def nodes():
    with Nodes(3) as started:
        yield started


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left():
    """All that Ray makes here lies in one folder with a short path, of which nothing is left at the end."""
    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield
    assert not list_processes(f"{folder}/")
    shutil.rmtree(folder)


def test_on_this_machine_the_bytes_are_those_of_the_local_engine(small, tmp_path):
    base, ft, local = small
    done = run(base, ft, tmp_path / "out", "--engine", "ray")
    assert_same(tmp_path / "out", local)
    assert re.search(r"device \d+ workers? of 1 core on 1 node of Ray", done.stderr)
    assert "raylet" not in done.stderr + done.stdout and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_on_three_nodes_while_workers_are_killed(large, nodes, tmp_path):
    base, ft, local = large
    with killing(random.Random(0), (0.3, 1.0), 4, str(nodes.folder)) as killed:
        run(base, ft, tmp_path / "out", nodes=nodes)
    assert killed
    assert_same(tmp_path / "out", local)


def find_journal(out):
    return out.with_name(f"{out.name}.pome-staging") / "journal"


def begin_edit(base, ft, out, nodes, **options):
    """The process of an edit on a cluster, of which at least one unit is journalled."""
    command = [sys.executable, "-m", "pome", "edit", base, ft, out, "--layers", "ffn", "--engine", "ray"]
    variables = {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    variables = {**environment(), "OMP_NUM_THREADS": "1", **variables}
    process = subprocess.Popen([*command, "--ray-address", nodes.address], env=variables, **options)
    journal = find_journal(out)
    while process.poll() is None and not (journal.is_file() and b'"unit"' in journal.read_bytes()):
        time.sleep(0.05)
    return process


def test_a_killed_driver_is_resumed_by_the_same_command(large, nodes, tmp_path):
    base, ft, local = large
    out = tmp_path / "out"
    with begin_edit(base, ft, out, nodes) as process:
        assert process.poll() is None, "it was done before it could be killed"
        process.kill()
    assert not out.exists()
    done = run(base, ft, out, nodes=nodes)
    assert re.search(r"going on: \d+ of 72 units were finished by an earlier run", done.stderr)
    assert_same(out, local)


@pytest.mark.parametrize("sees", ["another file", "no file"])
def test_a_node_that_sees_other_files_is_named(small, nodes, tmp_path, sees):
    base, ft, _ = small
    file = ft / "model-00001-of-00002.safetensors"
    other = tmp_path / "other.safetensors"
    if sees == "another file":
        shutil.copy2(base / file.name, other)
        os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    path = os.pathsep.join([str(PATCHED), str(ROOT / "src")])
    number = nodes.add(PYTHONPATH=path, POME_TEST_SEES=f"{file}={other}")
    try:
        wait_for_nodes(nodes, 4)
        failed = fail(base, ft, tmp_path / "out", nodes=nodes)
    finally:
        nodes.kill(number)
        wait_for_nodes(nodes, 3)
    expected = f"sees another file as {file} (its content differs)" if sees == "another file" else f"cannot read {file}"
    assert expected in failed and "BASE, FT and OUT must lie on storage that all nodes share" in failed


def test_a_full_disk_under_the_workers(small, tmp_path):
    base, ft, local = small
    path = os.pathsep.join([str(PATCHED), str(ROOT / "src")])
    with Nodes(1, PYTHONPATH=path, POME_TEST_FULL="1") as full:
        failed = fail(base, ft, tmp_path / "out", nodes=full, keeps=True)
    assert "No space left on device; make room there, then run the same command again to go on" in failed
    run(base, ft, tmp_path / "out", "--engine", "ray")
    assert_same(tmp_path / "out", local)


def test_an_address_where_nobody_answers(small, tmp_path):
    base, ft, _ = small
    failed = fail(base, ft, tmp_path / "out", "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert "--ray-address: 127.0.0.1:1: no Ray head answers there; start one, or see whether" in failed


def test_a_cluster_that_asks_for_another_token(small, nodes, tmp_path):
    base, ft, _ = small
    failed = fail(base, ft, tmp_path / "out", nodes=nodes, RAY_AUTH_TOKEN="f" * 64)
    assert "Authentication token is missing or incorrect" in failed and "same Ray, Python and token" in failed


def test_a_cluster_without_the_gpu_that_is_asked_for(small, nodes, tmp_path):
    base, ft, _ = small
    failed = fail(base, ft, tmp_path / "out", "--device", "cuda", nodes=nodes)
    assert "no node of the cluster offers a GPU" in failed and "--device cpu" in failed


def test_a_gpu_that_torch_does_not_see(small, tmp_path):
    base, ft, _ = small
    with Nodes(1, gpus=1) as nodes:
        failed = fail(base, ft, tmp_path / "out", "--device", "cuda", nodes=nodes, keeps=True)
    assert "does not see" in failed and "--device cpu" in failed


def test_ctrl_c_keeps_what_is_done(large, nodes, tmp_path):
    base, ft, local = large
    out = tmp_path / "out"
    journal = find_journal(out)
    with begin_edit(base, ft, out, nodes, stderr=subprocess.PIPE, text=True) as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130 and "run the same command again to go on" in stderr
    assert int(re.search(r"interrupted; (\d+) of 72 units are safe", stderr)[1]) == journal.read_bytes().count(
        b'"unit"'
    )
    run(base, ft, out, nodes=nodes)
    assert_same(out, local)


def test_a_worker_that_was_given_up_writes_nothing_into_a_later_run(tmp_path):
    """Its run ended and another one, of the same OUT, has made the staging folder anew."""
    output = tmp_path / "output"
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"old")
    files = WeightFiles(output)
    files.pin()
    shutil.rmtree(output)
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"new")
    with pytest.raises(OutputError):
        files.write("model.safetensors", bytearray(b"bad"), 0)
    assert (output / "model.safetensors").read_bytes() == b"new"


def fail(*arguments, keeps=False, **options):
    """The message of a run that fails: status 1, within a minute, without a traceback, nothing published or left."""
    begun = time.monotonic()
    done = run(*arguments, check=False, **options)
    assert done.returncode == 1 and time.monotonic() - begun < 60, done.stderr
    assert "Traceback" not in done.stderr
    out = Path(arguments[2])
    assert not out.exists() and out.with_name("out.pome-staging").exists() == keeps
    assert not list_processes(os.environ["TMPDIR"] + "/pome-ray-")
    return done.stderr


def wait_for_nodes(nodes, count):
    """Until the cluster knows that it has so many."""
    command = [Path(sys.executable).with_name("ray"), "status", "--address", nodes.address]
    until = time.monotonic() + 60
    while time.monotonic() < until:
        done = subprocess.run(command, capture_output=True, text=True, env=nodes.environment)
        if f"/{count}.0 CPU" in done.stdout:
            return
        time.sleep(0.5)
    raise AssertionError(done.stdout + done.stderr)
