"""A sweep on Ray scores what a sweep here scores, and writes the same bytes."""

import json
import subprocess
import sys

import pytest

from support.checkpoints import environment, hash_tree, llama_pair, read_manifest

pytestmark = pytest.mark.slow

SCORE = "cat {model}/*.safetensors | cksum | cut -c1-7"  # of its bytes: equal scores mean equal models


@pytest.mark.parametrize("search", ["grid", "coordinate"])
def test_the_scores_and_the_best_are_those_of_the_local_engine(tmp_path, search):
    base, ft = llama_pair(tmp_path, shards=2)
    found = {}
    for engine in ("local", "ray"):
        out = tmp_path / engine
        command = [sys.executable, "-m", "pome", "sweep", base, ft, out, "--beta", "1,1.5", "--rank-ratio", "0.25,0.5"]
        command += ["--score-cmd", SCORE, "--search", search, "--write-best", "--json", "--engine", engine]
        command += ["--at-once", "2"] if engine == "ray" else []
        done = subprocess.run(
            command, capture_output=True, text=True, env={**environment(), "OMP_NUM_THREADS": "1"}, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        found[engine] = json.loads(done.stdout)
        assert not out.with_name(f"{engine}.pome-sweep").exists()
    for key in ("candidates", "best", "beats_fine_tuned"):
        assert found["ray"][key] == found["local"][key]
    trees = [hash_tree(tmp_path / engine) for engine in ("local", "ray")]
    for tree in trees:
        del tree["pome_manifest.json"]
    assert trees[0] == trees[1]
    assert read_manifest(tmp_path / "ray")["tensors"] == read_manifest(tmp_path / "local")["tensors"]
