#!/usr/bin/env python3
"""Count what deaths do to edits on Ray; tests/editing/test_ray.py holds the short form.

    scripts/prove_ray.py workers [--kills N]    # 20 SIGKILLs of random workers, on three nodes
    scripts/prove_ray.py nodes [--kills N]      # 3 times a node is killed with all its processes
    scripts/prove_ray.py driver [--kills N]     # 5 times the command itself is killed, and run again
    scripts/prove_ray.py all

The pair is that of make_smollm2_pair.py, its 90 FFN matrices, at one thread a worker. Every output is compared with the
local engine's, byte by byte. Exit status 1 where one differs, or where a unit was given out more often than its retries
allow.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "scripts")]

from pome.engines.ray_queue import RETRIES  # noqa: E402
from support.checkpoints import environment, hash_tree, read_manifest  # noqa: E402
from support.ray_jobs import Nodes, killing  # noqa: E402

KILLS = {"workers": 20, "nodes": 3, "driver": 5}


class Proof:
    """Runs on three nodes, and what must be true of each."""

    def __init__(self, nodes: Nodes, pair: Path, work: Path) -> None:
        self.nodes = nodes
        self.work = work
        self.out = work / "out"
        self.command = [sys.executable, "-m", "pome", "edit", pair / "base", pair / "ft", self.out, "--layers", "ffn"]
        self.failures: list[str] = []
        self.environment = {**environment(), "OMP_NUM_THREADS": "1"}
        begun = time.monotonic()
        subprocess.run(self.command, check=True, env=self.environment, stderr=subprocess.DEVNULL)
        self.seconds = time.monotonic() - begun
        self.out.rename(work / "local")
        self.expected = self.describe(work / "local")
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
        self.environment |= {name: nodes.environment[name] for name in names}
        self.command += ["--engine", "ray", "--ray-address", nodes.address]

    def describe(self, out: Path) -> object:
        """All bytes of an output, but for what says how it was made."""
        files, manifest = hash_tree(out), read_manifest(out)
        del files["pome_manifest.json"], manifest["spec"]["engine"]
        return files, {key: value for key, value in manifest.items() if key != "checksum"}

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(list(map(str, self.command)), env=self.environment, stderr=subprocess.PIPE, text=True)

    def settle(self, process: subprocess.Popen[str]) -> tuple[int, int]:
        """Wait for a run that must complete, and compare; (workers lost, times a unit was given out at most)."""
        _, said = process.communicate()
        if process.returncode:
            self.failures.append(f"status {process.returncode}: {said.splitlines()[-1:]}")
            shutil.rmtree(self.work / "out.pome-staging", ignore_errors=True)
            return 0, 0
        if self.describe(self.out) != self.expected:
            self.failures.append("the output differs from the local engine's")
        shutil.rmtree(self.out)
        found = re.search(r"(\d+) workers of Ray were lost; no unit was given out more than (\d+) times", said)
        lost, given = (int(found[1]), int(found[2])) if found else (0, 1)
        if given > RETRIES + 1:
            self.failures.append(f"a unit was given out {given} times")
        return lost, given

    def count_done(self) -> int:
        journal = self.work / "out.pome-staging" / "journal"
        return journal.read_bytes().count(b'"unit"') if journal.is_file() else 0

    def wait_until(self, process: subprocess.Popen[str], done: int) -> bool:
        """Until the journal holds more than `done` units; False where the run is over before."""
        while process.poll() is None:
            if self.count_done() > done:
                return True
            time.sleep(0.05)
        return False

    def kill_workers(self, kills: int) -> str:
        rng, killed, runs, most = Random(0), 0, 0, 1
        while killed < kills:
            with killing(rng, (2.0, 6.0), kills - killed, str(self.nodes.folder)) as now:
                _, given = self.settle(self.start())
            killed, runs, most = killed + len(now), runs + 1, max(most, given)
        return f"{killed} workers killed in {runs} runs, no unit given out more than {most} times"

    def kill_nodes(self, kills: int) -> str:
        most, lost = 1, 0
        for _ in range(kills):
            process = self.start()
            if not self.wait_until(process, 0):
                self.failures.append("the run was over before a node could be killed")
            self.nodes.kill(len(self.nodes.processes) - 1)
            gone, given = self.settle(process)
            most, lost = max(most, given), lost + gone
            self.nodes.add()
        return f"{kills} nodes killed in {kills} runs, {lost} workers lost, no unit given out more than {most} times"

    def kill_driver(self, kills: int) -> str:
        resumed = []
        for _ in range(kills):
            before = self.count_done()
            process = self.start()
            if not self.wait_until(process, before):
                self.failures.append("the run was over before it could be killed")
                break
            process.kill()
            process.communicate()
            resumed.append(self.count_done())
        self.settle(self.start())
        return f"the command killed {len(resumed)} times, with {resumed} of 90 units journalled, and run again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*KILLS, "all"))
    parser.add_argument("--kills", type=int)
    parser.add_argument("--pair", type=Path, help="a folder that make_smollm2_pair.py made")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no node is left
    with tempfile.TemporaryDirectory(prefix="pome-proof-") as folder, Nodes(3) as nodes:
        pair = given.pair or Path(folder) / "pair"
        if given.pair is None:
            maker = ROOT / "scripts" / "make_smollm2_pair.py"
            subprocess.run(
                [sys.executable, maker, pair, "--steps", "2"], check=True, env={**os.environ, **environment()}
            )
        proof = Proof(nodes, pair, Path(folder))
        print(f"a run of the local engine takes {proof.seconds:.1f} s", flush=True)
        tasks = {"workers": proof.kill_workers, "nodes": proof.kill_nodes, "driver": proof.kill_driver}
        for what in KILLS if given.what == "all" else [given.what]:
            print(tasks[what](given.kills or KILLS[what]), flush=True)
        for failure in proof.failures:
            print("   ", failure)
        print(f"every output as the local engine's: {not proof.failures}")
    sys.exit(1 if proof.failures else 0)


if __name__ == "__main__":
    main()
