#!/usr/bin/env python3
"""Count what faults do to runs of pome, and what safety costs; tests/editing/test_faults.py holds the short form.

    scripts/prove_safety.py calls                  # every read, write and sync of a small run fails; power cuts
    scripts/prove_safety.py kills [--kills N]      # 200 SIGKILLs at random instants of runs on a real pair
    scripts/prove_safety.py cost [--megabytes N]   # a run with syncs and hashes against one without, in turns
    scripts/prove_safety.py cost --pair FOLDER     # the same on FOLDER/base and FOLDER/ft

Exit status 1 if any count that must be 0 is not, or if safety takes 15 % or more.
"""

from __future__ import annotations

import argparse
import errno
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "scripts")]

from real_weights import rxnfp_pair  # noqa: E402
from support.checkpoints import environment, llama_pair  # noqa: E402
from support.faults import FOLDERS, READS, SYNCS, WRITES, Disk, Fault, Launcher, Outcome, Scene, check_message  # noqa: E402

FULL_DISKS = 20
MOST = 0.15
ALTERNATIONS = 4
EMBEDDINGS, LAYER = 262, 88  # megabytes of what scripts/make_llama_pair.py makes


class Tally:
    """Counts of what was tried, and of what must never be."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def settle(self, scene: Scene, ended: Outcome, is_error: bool = False) -> None:
        """Check what one fault left, and that the same command completes it."""
        self.counts["runs"] += 1
        self.counts["killed" if ended.status < 0 else "ended with an error" if ended.status else "done"] += 1
        try:
            if is_error and ended.status:
                check_message(ended)
            scene.check_resume()
            self.counts["byte-identical in the end"] += 1
        except AssertionError as error:
            self.failures.append(f"{error}"[:300])
            scene.clear()

    def show(self) -> bool:
        told = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        print(f"{self.title}: {told}, {len(self.failures)} failures", flush=True)
        for failure in self.failures[:5]:
            print("   ", failure)
        return not self.failures


def prove_kills(launcher: Launcher, work: Path, kills: int) -> bool:
    scene = Scene(launcher, *rxnfp_pair(), work / "real")
    rng = Random(0)
    tally = Tally(f"SIGKILL at random instants of a run on a real pair ({scene.seconds:.1f} s undisturbed)")
    while tally.counts["killed"] < kills:  # some runs are done before their end comes
        # Every other run journals unit by unit, else in the groups that a user's run has.
        settings = {"commit_units": 1} if tally.counts["runs"] % 2 else {}
        tally.settle(scene, scene.run(kill_after=rng.uniform(0, scene.seconds), **settings))
    return tally.show()


def prove_calls(launcher: Launcher, work: Path) -> bool:
    """Every call of a small run killed, torn, and failed."""
    folder = work / "small"
    folder.mkdir()
    scene = Scene(launcher, *llama_pair(folder, shards=2), folder / "work")
    changes = (*WRITES, *FOLDERS)
    good = True
    for title, kind, calls, code in (
        ("SIGKILL before every change of the disk", "kill", changes, 0),
        ("SIGKILL in the middle of every write", "tear", WRITES[:3], 0),
        ("EIO at every read and open", "error", (*READS, "open"), errno.EIO),
        ("EIO at every write and sync", "error", (*changes, *SYNCS, "fchmod"), errno.EIO),
        ("EIO at every sync, and what it was for is lost", "forget", SYNCS, errno.EIO),
        ("read-only from each change on", "broken", (*changes, *SYNCS), errno.EROFS),
    ):
        tally = Tally(title)
        for at in range(scene.count(*calls, commit_units=1)):
            tally.settle(scene, scene.run(Fault(kind, calls, at, code), commit_units=1), kind in ("error", "broken"))
        good = tally.show() and good
    tally = Tally("disk full from one of 20 points on")
    total = scene.count(*WRITES, commit_units=1)
    for i in range(FULL_DISKS):
        fault = Fault("broken", WRITES, i * total // FULL_DISKS, errno.ENOSPC)
        tally.settle(scene, scene.run(fault, commit_units=1), True)
    good = tally.show() and good
    trace = scene.run(trace=True, commit_units=1).trace
    rng = Random(1)
    for torn in (False, True):
        rest = "some of what was not synced is left, some torn" if torn else "nothing is left that was not synced"
        tally = Tally(f"power cut at every step, {rest}")
        for cut in range(len(trace) + 1):
            scene.clear()
            Disk(str(scene.work), trace[:cut]).cut(scene.work, rng if torn else None)
            tally.settle(scene, Outcome(0, "", 0.0))
        good = tally.show() and good
    return good


def time_edit(pair: Path, out: Path, unsafe: bool) -> float:
    """Seconds of one run in a process of its own, loading apart; `unsafe` leaves out syncs and hashes."""
    code = (
        "import os, sys, time, torch, pome.editing.hashes, pome.editing.unit\n"
        "base, ft, out, unsafe = sys.argv[1:]\n"
        "if int(unsafe):\n"
        "    os.fsync = os.fdatasync = lambda fd: None\n"
        "    pome.editing.hashes.hash_file = lambda path, advance, wait=None: (os.stat(path).st_size, '0' * 64)\n"
        "begun = time.perf_counter()\n"
        "pome.edit(base, ft, out)\n"
        "print(time.perf_counter() - begun)"
    )
    arguments = [str(pair / "base"), str(pair / "ft"), str(out), str(int(unsafe))]
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment()
    )
    subprocess.run(["rm", "-rf", str(out)], check=True)
    subprocess.run(["sync"], check=True)  # what one run left to be written must not slow the next
    return float(ended.stdout)


def measure_cost(pair: Path, work: Path) -> bool:
    """Median seconds with and without syncs and hashes, in turns, so that a slow minute of the machine meets both."""
    time_edit(pair, work / "out", False)  # fills the page cache
    turns = [[time_edit(pair, work / "out", unsafe) for unsafe in (False, True)] for _ in range(ALTERNATIONS)]
    safe, bare = map(statistics.median, zip(*turns, strict=True))
    share = (safe - bare) / safe
    size = sum(path.stat().st_size for path in (pair / "ft").iterdir()) / 1e6
    print(f"pair of 2 x {size:.0f} MB, {ALTERNATIONS} runs each in turns: {safe:.2f} s with syncs and hashes, ", end="")
    print(f"{bare:.2f} s without; safety takes {share:.1%} of the run (ratio {safe / bare:.3f})")
    return share < MOST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("calls", "kills", "cost"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=440)
    parser.add_argument("--pair", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pome-safety-") as folder, Launcher() as launcher:
        work = Path(folder)
        if given.what == "calls":
            good = prove_calls(launcher, work)
        elif given.what == "kills":
            good = prove_kills(launcher, work, given.kills)
        else:
            pair = given.pair or work / "pair"
            if given.pair is None:
                layers = str(max(1, (given.megabytes - EMBEDDINGS) // LAYER))
                maker = ROOT / "scripts" / "make_llama_pair.py"
                subprocess.run([sys.executable, maker, pair, "--layers", layers], check=True, env=environment())
            good = measure_cost(pair, work)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
