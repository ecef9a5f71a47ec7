#!/usr/bin/env python3
"""Feed N hostile files and indexes (default 50,000) to the readers of pome and print what came of them.

    scripts/fuzz_headers.py [N] [FIRST_SEED]

The generators are those of tests/checkpoint/test_header.py. A second part feeds headers of 100 MB that are built to
cost far more than their size, each in a process of its own, and prints time and peak memory. Exit status 1 if any
count that must be 0 is not.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from safetensors import SafetensorError, safe_open  # noqa: E402

from pome.checkpoint.files import LocalFile, read_header  # noqa: E402
from pome.checkpoint.header import parse_header, parse_index  # noqa: E402
from pome.errors import HeaderError  # noqa: E402
from support.hostile import (  # noqa: E402
    list_heavy_headers,
    make_hostile_file,
    make_hostile_index,
    make_sane_file,
)

HANG_SECONDS = 2
HEAVY_BYTES = 99_000_000
MUST_BE_ZERO = (
    "tracebacks",
    "hangs",
    "accepted that safe_open refuses",
    "tables that differ",
    "sane files refused",
    "index values that differ",
)


class Hang(Exception):
    """Raised by the alarm."""


def raise_hang(_signal: int, _frame: object) -> None:
    raise Hang


def read_reference(path: Path) -> object:
    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}, file.metadata()


def feed_file(seed: int, path: Path) -> str:
    rng = Random(seed)
    sane = rng.random() < 0.1
    path.write_bytes(make_sane_file(rng) if sane else make_hostile_file(rng))
    file = LocalFile(path)
    try:
        header = read_header(file)
    except HeaderError:
        return "sane files refused" if sane else "files refused"
    finally:
        file.close()
    try:
        expected = read_reference(path)
    except SafetensorError:
        return "accepted that safe_open refuses"
    table = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    return "files accepted" if (table, header.metadata) == expected else "tables that differ"


def feed_index(seed: int) -> str:
    raw = make_hostile_index(Random(seed))
    try:
        found = parse_index(raw, "index")
    except HeaderError:
        return "indexes refused"
    # The standard library's reader, to which repeated keys and path names are no fault.
    same = found == json.loads(raw, parse_int=str)["weight_map"]
    return "indexes accepted" if same else "index values that differ"


def feed_heavy(what: str, raw: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = []
    started = time.perf_counter()
    for parse in (lambda: parse_header(raw, 8 + len(raw), "x"), lambda: parse_index(raw, "x")):
        try:
            parse()
            outcomes.append("accepted")
        except HeaderError:
            outcomes.append("refused")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds = time.perf_counter() - started
    print(
        f"{what:34} {len(raw) / 1e6:6.0f} MB  {'/'.join(outcomes):18} {seconds:7.2f} s  +{grown:6.0f} MiB", flush=True
    )


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    counts = Counter(dict.fromkeys(MUST_BE_ZERO, 0))
    slowest = 0.0
    signal.signal(signal.SIGALRM, raise_hang)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        for seed in range(first, first + count):
            begun = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
            try:
                counts[feed_index(seed) if seed % 5 == 4 else feed_file(seed, path)] += 1
            except Hang:
                counts["hangs"] += 1
                print(f"seed {seed}: over {HANG_SECONDS} s")
            # Whatever else comes out of a reader is what this script is here to count.
            except BaseException as error:  # noqa: B036
                counts["tracebacks"] += 1
                print(f"seed {seed}: {type(error).__name__}: {error!s:.200}")
                if isinstance(error, KeyboardInterrupt):
                    raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{count} inputs from seed {first} in {time.perf_counter() - started:.0f} s, slowest {slowest:.3f} s,", end=" "
    )
    print(f"peak memory of the process {peak:.0f} MiB")
    for what, times in counts.items():
        print(f"{times:8} {what}")
    print("\nheavy headers (as header/as index), time and growth of memory beyond the text itself:")
    context = multiprocessing.get_context("fork")
    for what, raw in list_heavy_headers(HEAVY_BYTES):
        process = context.Process(target=feed_heavy, args=(what, raw))
        process.start()
        process.join()
        if process.exitcode != 0:
            counts["tracebacks"] += 1
            print(f"{what}: left with {process.exitcode}")
    return 1 if any(counts[what] for what in MUST_BE_ZERO) else 0


if __name__ == "__main__":
    sys.exit(main())
