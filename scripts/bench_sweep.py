#!/usr/bin/env python3
"""Time a sweep of K and beta with `--loss` on SmolLM2-135M beside its evaluations alone.

    scripts/bench_sweep.py [--records N] [--pair FOLDER]

The grid has 4 values of K and 6 of beta: 24 candidates, the fine-tuned model and the base. The pair is the one of
make_smollm2_pair.py (made in --pair unless it is there). In one run it prints the time of the whole command, that of 26
evaluations alone (the same records through the same model, loaded once, timed 3 times before and 3 times after the
sweep), their ratio, and the sweep's peak memory beside that of one evaluation.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_edit import SCRIPTS, run

EVALUATE = """
import json, resource, sys, time
from pathlib import Path
from pome.sweeping.scorers.language import load_model, measure_loss
model, tokenizer = load_model(Path(sys.argv[1]), "cpu")
seconds = []
for _ in range(3):
    begun = time.perf_counter()
    scored = measure_loss(model, tokenizer, Path(sys.argv[2]), 8)
    seconds.append(time.perf_counter() - begun)
print(json.dumps([seconds, scored.value, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def write_records(file: Path, count: int) -> None:
    """Sums in words, of 20 to 60 tokens: what they say does not matter, only that all evaluations read the same."""
    dice = random.Random(0)
    with file.open("w") as out:
        for _ in range(count):
            terms = [dice.randint(1, 99) for _ in range(dice.randint(2, 9))]
            asked = f"Add {', '.join(map(str, terms))}. Show each step."
            steps = [f" {sum(terms[:i])} + {terms[i]} = {sum(terms[: i + 1])}." for i in range(1, len(terms))]
            out.write(json.dumps({"prompt": asked, "completion": "".join(steps)}) + "\n")


def evaluate(model: Path, file: Path) -> tuple[list[float], float, int]:
    said = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(model), str(file)], check=True, capture_output=True, text=True
    )
    seconds, score, peak = json.loads(said.stdout)
    return seconds, score, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=48)
    parser.add_argument("--pair", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pome-bench-") as work:
        pair, data = given.pair or Path(work) / "pair", Path(work) / "data.jsonl"
        if not (pair / "ft").is_dir():
            run(sys.executable, SCRIPTS / "make_smollm2_pair.py", pair)
        write_records(data, given.records)
        before, fine_tuned, alone = evaluate(pair / "ft", data)
        lists = ("--rank-ratio", "0.25,0.5,0.75,1", "--beta", "0.7,1,1.3,1.6,2,2.5")
        table = Path(work) / "table.csv"
        words = ("sweep", pair / "base", pair / "ft", Path(work) / "out", *lists, "--loss", data, "--csv", table)
        made = run(sys.executable, "-m", "pome", *words)
        after, _, _ = evaluate(pair / "ft", data)
        rows = csv.DictReader(table.open(newline=""))
        scores = [float(row["score"]) for row in rows if row["model"] not in ("fine-tuned", "base")]
        assert len(scores) == 24
        one = statistics.median(before + after)
        print(f"one evaluation {one:.2f} s ({given.records} records); 26 of them {26 * one:.1f} s")
        print(f"the sweep {made.seconds:.1f} s, {made.seconds / (26 * one):.2f} times as long")
        print(f"fine-tuned {fine_tuned:.5f}, candidates {min(scores):.5f} to {max(scores):.5f}")
        print(f"peak memory: sweep {made.peak / 2**20:.0f} MiB, one evaluation {alone / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
