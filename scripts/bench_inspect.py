#!/usr/bin/env python3
"""Time `pome inspect` beside `pome edit`, both of the `up` matrices of a pair of 2.2 GB.

    scripts/bench_inspect.py [FOLDER] [--layers N]

makes the pair of make_llama_pair.py in FOLDER (default: a temporary one) unless it is there, and prints wall time,
processor time and peak memory of both, in turn and each in a process of its own, and the ratio of the wall times.
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
        edits, looks = [], []
        for _ in range(given.rounds):
            edits.append(run(sys.executable, "-m", "pome", "edit", pair / "base", pair / "ft", out))
            print_row("pome edit", edits[-1], None)
            shutil.rmtree(out)
            words = ("inspect", pair / "base", pair / "ft", "--layers", "up", "--html", Path(work) / "report.html")
            looks.append(run(sys.executable, "-m", "pome", *words))
            print_row("pome inspect --layers up", looks[-1], None)
        ratio = min(r.seconds for r in looks) / min(r.seconds for r in edits)
        print(f"inspect takes {ratio:.2f} of the edit's time")


if __name__ == "__main__":
    main()
