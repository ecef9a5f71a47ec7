#!/usr/bin/env python3
"""Time `pome edit --engine ray` beside the local engine, both with one worker of one thread, in turns.

    scripts/bench_ray.py [smollm2] [llama] [experts] [--rounds N] [--smollm2 PAIR] [--llama PAIR]

smollm2 is the 90 FFN matrices of make_smollm2_pair.py, llama the 2.2 GB pair of make_llama_pair.py, experts 6,000
matrices of 128 x 96. A cluster of one node with one core is started first. Printed are the seconds of the local engine,
those of Ray without the start of its workers, that start, and the ratio of the first two, with the most that it may be.
The order changes from round to round, and means are taken: what else the machine does meets both. Exit status 1 where a
ratio is above that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "scripts")]

from support.checkpoints import environment, hash_tree  # noqa: E402
from support.ray_jobs import Nodes  # noqa: E402

MOST = {"smollm2": 1.10, "llama": 1.10, "experts": 1.25}
LAYERS, EXPERTS, INNER, HIDDEN = 10, 200, 128, 96


def make_experts(folder: Path) -> Path:
    """A pair whose experts are tensors of their own, three matrices each."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    base, ft = {}, {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                weight = 0.02 * torch.randn(shape, generator=generator)
                key = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                base[key] = weight.bfloat16()
                ft[key] = (weight + 0.002 * torch.randn(shape, generator=generator)).bfloat16()
    config = {"model_type": "qwen3_moe", "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
    for name, tensors in (("base", base), ("ft", ft)):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def make_pair(what: str, folder: Path) -> Path:
    if what == "experts":
        return make_experts(folder)
    maker = {"smollm2": ["make_smollm2_pair.py", "--steps", "2"], "llama": ["make_llama_pair.py"]}[what]
    command = [sys.executable, ROOT / "scripts" / maker[0], folder, *maker[1:]]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return folder


def time_edit(pair: Path, out: Path, what: str, nodes: Nodes | None) -> tuple[float, float]:
    """Seconds of one run without the start of its workers, and those of that start; the output is left."""
    command = [sys.executable, "-m", "pome", "edit", pair / "base", pair / "ft", out, "--quiet"]
    command += ["--layers", "up" if what == "llama" else "ffn"]
    variables = {**os.environ, **environment(), "OMP_NUM_THREADS": "1"}
    if nodes is not None:
        command += ["--engine", "ray", "--ray-address", nodes.address]
        variables |= {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    os.sync()  # what an earlier run left to be written must not slow this one
    subprocess.run(list(map(str, command)), check=True, env=variables)
    timing = json.loads((out / "pome_manifest.json").read_text())["timing"]
    start = timing.get("engine_start_seconds", 0.0)
    return timing["total_seconds"] - start, start


def compare(what: str, pair: Path, work: Path, nodes: Nodes, rounds: int) -> bool:
    times: dict[str, list[tuple[float, float]]] = {"local": [], "ray": []}
    for turn in range(rounds):
        for engine in ("local", "ray") if turn % 2 == 0 else ("ray", "local"):
            times[engine].append(time_edit(pair, work / engine, what, nodes if engine == "ray" else None))
        trees = [hash_tree(work / engine) for engine in ("local", "ray")]
        for tree in trees:
            del tree["pome_manifest.json"]
        assert trees[0] == trees[1], "the two engines wrote different bytes"
        for engine in times:
            shutil.rmtree(work / engine)
    local, ray = (sum(seconds for seconds, _ in times[engine]) / rounds for engine in ("local", "ray"))
    start = sum(start for _, start in times["ray"]) / rounds
    ratio = ray / local
    print(f"{what:10} {local:9.2f} {ray:9.2f} {start:9.2f} {ratio:9.3f} {MOST[what]:9.2f}", flush=True)
    return ratio <= MOST[what]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*MOST, []], default=list(MOST))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--llama", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no node is left
    with tempfile.TemporaryDirectory(prefix="pome-bench-") as folder, Nodes(1) as nodes:
        print(f"{'seconds':10} {'local':>9} {'ray':>9} {'start':>9} {'ratio':>9} {'at most':>9}")
        good = True
        for what in given.what:
            pair = getattr(given, what, None) or make_pair(what, Path(folder) / what)
            good = compare(what, pair, Path(folder), nodes, given.rounds) and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
