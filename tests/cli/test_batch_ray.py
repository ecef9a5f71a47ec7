"""A batch on Ray: whole jobs on its workers, with the bytes and the summary of a batch here."""

import json
import subprocess
import sys

import pytest

from support.checkpoints import environment, hash_tree, llama_pair

pytestmark = pytest.mark.slow

FILE = """
defaults: {base: base, fine_tuned: ft}
jobs:
  - {name: up, out: OUT/up}
  - {name: down, out: OUT/down, layers: down, beta: 1.5}
  - {name: wrong, out: OUT/wrong, fine_tuned: nothing}
  - {name: swept, out: OUT/swept, command: sweep, beta: [1, 2], score_cmd: "echo 1; : {model}", write_best: true}
"""


def run(folder, text, *options):
    (folder / "jobs.yaml").write_text(text)
    command = [sys.executable, "-m", "pome", "batch", "jobs.yaml", "--json", *options]
    variables = {**environment(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)


def test_jobs_are_those_of_a_batch_here(tmp_path):
    llama_pair(tmp_path)
    found = {}
    for engine in ("local", "ray"):
        options = ["--engine", "ray", "--at-once", "2"] if engine == "ray" else []
        done = run(tmp_path, FILE.replace("OUT", engine), *options)
        assert done.returncode == 1 and "wrong: nothing: " in done.stderr, done.stderr
        found[engine] = json.loads(done.stdout)["jobs"]
    for here, there in zip(found["local"], found["ray"], strict=True):
        assert (there["name"], there["status"], there.get("matrices")) == (
            here["name"],
            here["status"],
            here.get("matrices"),
        )
    trees = [hash_tree(tmp_path / engine) for engine in ("local", "ray")]
    for tree in trees:
        for name in [name for name in tree if name.endswith("pome_manifest.json")]:
            del tree[name]
    assert trees[0] == trees[1] and "up/model.safetensors" in trees[0]
    assert not list(tmp_path.glob(".pome-probe-*"))


def test_a_job_that_kills_its_workers_has_failed_and_the_others_go_on(tmp_path):
    llama_pair(tmp_path)
    jobs = FILE.replace("echo 1; : {model}", "kill -9 $PPID; : {model}").replace("OUT", "ray")
    done = run(tmp_path, jobs, "--engine", "ray", "--at-once", "1")
    found = {job["name"]: job for job in json.loads(done.stdout)["jobs"]}
    statuses = {name: job["status"] for name, job in found.items()}
    assert done.returncode == 1
    assert statuses == {"up": "done", "down": "done", "wrong": "failed", "swept": "failed"}
    assert found["swept"]["error"].startswith("job swept: 4 workers were lost while they were at it")
    assert found["swept"]["error"] in done.stderr.replace("\n", " ")


def test_a_job_with_the_engine_ray_inside_a_batch_on_ray_is_refused(tmp_path):
    llama_pair(tmp_path)
    done = run(tmp_path, FILE.replace("out: OUT/up", "out: x, engine: ray"), "--engine", "ray")
    assert done.returncode == 2 and "up: has the engine ray itself, inside a batch on Ray" in done.stderr


def test_at_once_without_the_engine_ray_is_refused(tmp_path):
    llama_pair(tmp_path)
    done = run(tmp_path, FILE, "--at-once", "2")
    assert done.returncode == 2 and "--at-once: has no effect without --engine 'ray'" in done.stderr
