#!/usr/bin/env python3
"""Time `pome edit` with its defaults on a pair of 2.2 GB, beside `cp -r` and beside the obvious way.

    scripts/bench_edit.py [FOLDER] [--shards N] [--layers N] [--skip-obvious]

makes the pair of make_llama_pair.py in FOLDER (default: a temporary one) unless it is there, and prints, from one
run: wall time, time in the kernel (from the manifest), time of `cp -r` of the fine-tuned model, peak memory; then
the same for the obvious way: load both models whole, `torch.linalg.svd` of each delta, save. Each runs in a process of
its own. The obvious way takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# No torch here: Linux counts what a process held before it became another program into that one's peak.
SCRIPTS = Path(__file__).resolve().parent


# OpenSSL's, which uses what the processor has; sha256sum is often built without it and takes ten times as long.
HASH = """
import hashlib, sys
for name in sys.argv[1:]:
    digest = hashlib.sha256()
    with open(name, "rb", buffering=0) as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
"""


@dataclass(frozen=True)
class Run:
    """What one child process took: seconds of wall time, of processors, and the most memory it held, in bytes.

    A peak of 0 is unknown: this process has held more, and Linux hands that on.
    """

    seconds: float
    cpu_seconds: float
    peak: int


def run(*command: str | Path) -> Run:
    """Run a command to its end; its output goes to stderr, so that stdout has the table alone."""
    words = [str(word) for word in command]
    print("$", *words, file=sys.stderr, flush=True)
    os.sync()  # what an earlier command left to be written must not slow this one
    started = time.perf_counter()
    pid = os.posix_spawnp(words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        sys.exit(f"{words[0]} left with status {os.waitstatus_to_exitcode(status)}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = usage.ru_maxrss if usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss else 0
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak * unit)


def edit_the_obvious_way(base: Path, fine_tuned: Path, out: Path) -> None:
    """Both models whole in memory, a full SVD of each delta of an up projection, everything saved."""
    import torch
    from safetensors.torch import load_file, save_file

    pretrained, tuned = (
        {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
        for folder in (base, fine_tuned)
    )
    seconds = 0.0
    for name in [name for name in tuned if name.endswith("mlp.up_proj.weight")]:
        delta = tuned[name].float() - pretrained[name].float()
        started = time.perf_counter()
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        seconds += time.perf_counter() - started
        k = len(s) // 2
        alpha = delta.norm() / k**0.5
        tuned[name] = (pretrained[name].float() + alpha * (u[:, :k] @ vh[:k])).to(tuned[name].dtype)
    out.mkdir()
    save_file(tuned, out / "model.safetensors", {"format": "pt"})
    (out / "svd_seconds").write_text(str(seconds))


def print_row(what: str, run: Run, kernel: float | None) -> None:
    inside = f"{kernel:9.1f}" if kernel is not None else " " * 9
    print(f"{what:28} {run.seconds:9.1f} {inside} {run.cpu_seconds:9.1f} {run.peak / 2**20:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time `pome edit` beside `cp -r` and beside the obvious way.")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--skip-obvious", action="store_true")
    parser.add_argument("--obvious", nargs=3, type=Path, metavar=("BASE", "FT", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.obvious:
        edit_the_obvious_way(*given.obvious)
        return
    with tempfile.TemporaryDirectory(prefix="pome-bench-", dir=given.folder and given.folder.parent) as work:
        pair = given.folder or Path(work) / "pair"
        base, fine_tuned = pair / "base", pair / "ft"
        if not fine_tuned.is_dir():
            size = ("--layers", str(given.layers), "--shards", str(given.shards))
            run(sys.executable, SCRIPTS / "make_llama_pair.py", pair, *size)
        copied, out, obvious = (Path(work) / name for name in ("copied", "out", "obvious"))
        # Once unmeasured, so that both the copy and the edit find the files in the page cache.
        run("cp", "-r", base, copied)
        shutil.rmtree(copied)
        print(f"{'seconds, seconds, MiB':28} {'wall':>9} {'kernel':>9} {'CPU':>9} {'peak':>9}")
        copy = run("cp", "-r", fine_tuned, copied)
        print_row("cp -r of the fine-tuned model", copy, None)
        shutil.rmtree(copied)
        edited = run(sys.executable, "-m", "pome", "edit", base, fine_tuned, out)
        timing = json.loads((out / "pome_manifest.json").read_text())["timing"]
        print_row("pome edit", edited, timing["kernel_seconds"])
        files = [path for folder in (base, fine_tuned, out) for path in folder.iterdir() if path.is_file()]
        hashed = run(sys.executable, "-c", HASH, *files)
        print_row("one SHA-256 pass over all", hashed, None)
        shutil.rmtree(out)
        beyond = edited.seconds - timing["kernel_seconds"]
        print(f"beyond the kernel {beyond:.1f} s: {beyond / (copy.seconds + hashed.seconds):.2f} of cp and that pass")
        if not given.skip_obvious:
            plain = run(sys.executable, Path(__file__).resolve(), "--obvious", base, fine_tuned, obvious)
            print_row("the obvious way", plain, float((obvious / "svd_seconds").read_text()))


if __name__ == "__main__":
    main()
