#!/usr/bin/env python3
"""Time `pome inspect`, also with `--weights`, beside `pome edit`, all of the `up` matrices of a pair of 2.2 GB.

    scripts/bench_inspect.py [FOLDER] [--layers N]

makes the pair of make_llama_pair.py in FOLDER (default: a temporary one) unless a pair is there, and prints wall time,
processor time and peak memory of each, in turn and in a process of its own, and the ratios of the wall times.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from bench_edit import SCRIPTS, print_row, run

ROUNDS = 2  # the faster of two: what else the machine did counts for neither


def main() -> None:
    parser = argparse.ArgumentParser(description="Time `pome inspect` beside `pome edit`.")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pome-bench-", dir=given.folder and given.folder.parent) as work:
        pair, out = given.folder or Path(work) / "pair", Path(work) / "out"
        if not (pair / "ft").is_dir():
            run(sys.executable, SCRIPTS / "make_llama_pair.py", pair, "--layers", str(given.layers))
        print(f"{'seconds, seconds, MiB':28} {'wall':>9} {'kernel':>9} {'CPU':>9} {'peak':>9}")
        edits, looks, weights = [], [], []
        for _ in range(given.rounds):
            edits.append(run(sys.executable, "-m", "pome", "edit", pair / "base", pair / "ft", out))
            print_row("pome edit", edits[-1], None)
            shutil.rmtree(out)
            words = ("inspect", pair / "base", pair / "ft", "--layers", "up", "--html", Path(work) / "report.html")
            looks.append(run(sys.executable, "-m", "pome", *words))
            print_row("pome inspect --layers up", looks[-1], None)
            weights.append(run(sys.executable, "-m", "pome", *words, "--weights"))
            print_row("  with --weights", weights[-1], None)
        edit, look, weight = (min(r.seconds for r in runs) for runs in (edits, looks, weights))
        print(f"inspect takes {look / edit:.2f} of the edit's time, with --weights {weight / look:.2f} times as long")


if __name__ == "__main__":
    main()
