#!/usr/bin/env python3
"""Time and memory of a plan, a journal and a manifest of 61,440 experts.

    scripts/bench_plan.py [--layers N] [--experts N] [--kinds gate,up,down] [--profile]

makes the headers of a mixture with that many layers and experts (their up matrices, unless --kinds names more, the data
a hole in the file) in a temporary folder, and runs in processes of their own: `pome edit --dry-run` of the up matrices;
the journal of all of them, committed in groups and read again; the manifest, written and read again. With --profile the
functions in which the plan spends its time follow.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path

from bench_edit import run

# What this process holds counts into the peak of those that it starts, so it makes nothing itself.

INNER, HIDDEN = 64, 32

RECORDS = """
import dataclasses, datetime, sys, time
from pathlib import Path
import pome
from pome.editing.session import open_pair
from pome.manifest import FileRecord, Manifest, SideRecord, TensorRecord, read_manifest
from pome.output.staging import Staging
from pome.planning.units import fan_out_in
base, ft, work = sys.argv[1:]
with open_pair(base, ft, pome.EditSpec()) as opened:
    units = opened.plan.units
def record(unit, part):
    numbers = {name: 0.123456789012345 for name in (
        "alpha beta sigma_max sigma_k sigma_next noise_floor delta_norm edit_norm energy_kept departure rounding "
        "objective orthogonality power_residual").split()}
    return TensorRecord(unit.name, unit.label(part), unit.file, part.role, fan_out_in(unit, part), unit.out_dtype,
        method="equalize", spectral_drift=None, distance=None, rank=2048, k=1024, **numbers,
        solver="deflated-float32", warnings=(),
        spectrum=tuple((i + 1, 0.123456789012345 / (i + 1)) for i in range(24)))
records = [record(unit, part) for unit in units for part in unit.parts]
begun = time.perf_counter()
def tell(what):
    global begun
    print(f"{what}: {time.perf_counter() - begun:.1f} s")
    begun = time.perf_counter()
entries = [{"unit": u.key, "file": u.file, "copies": [], "tensors": [r.to_mapping()], "kept": []}
    for u, r in zip(units, records)]
target = Path(work) / "out"
with Staging(target, {}, fresh=True) as staging:
    staging.put_file(units[0].file, b"")
    for i in range(0, len(entries), 512):
        staging.commit(entries[i : i + 512])
tell(f"journal of {len(entries)} units written")
with Staging(target, {}, fresh=False) as staging:
    assert len(staging.finished) == len(entries)
    read = staging.finished
tell("journal read")
side = SideRecord("a", None, {"model.safetensors": FileRecord(1, "0" * 64)})
tensors = tuple(TensorRecord.from_mapping(item) for unit in units for item in read[unit.key]["tensors"])
spec = pome.EditSpec().to_mapping()
manifest = Manifest(1, pome.__version__, "2026", side, side, spec, tensors, (), (), {}, {}, {}, None)
path = Path(work) / "manifest.json"
path.write_text(manifest.sealed().to_json())
tell(f"manifest of {path.stat().st_size / 1e6:.0f} MB written")
assert len(read_manifest(path).tensors) == len(records)
tell("manifest read")
"""


def write_side(folder: Path, layers: int, experts: int, kinds: list[str]) -> None:
    """A checkpoint with its header alone: the data are a hole."""
    from pome.checkpoint.header import build_header

    shapes = {"up": (INNER, HIDDEN), "gate": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    entries = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight", "BF16", shapes[kind])
        for layer in range(layers)
        for expert in range(experts)
        for kind in kinds
    ]
    folder.mkdir()
    header = build_header(entries, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + len(entries) * 2 * INNER * HIDDEN)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": experts}
    config |= {"hidden_size": HIDDEN, "moe_intermediate_size": INNER}
    (folder / "config.json").write_text(json.dumps(config))


def profile_plan(base: Path, ft: Path) -> None:
    from pome.config.spec import EditSpec
    from pome.editing.session import open_pair

    with cProfile.Profile() as profile, open_pair(base, ft, EditSpec()):
        pass
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=1024)
    parser.add_argument("--kinds", default="up")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        write_side(given.make, given.layers, given.experts, given.kinds.split(","))
        return
    with tempfile.TemporaryDirectory(prefix="pome-plan-") as folder:
        base, ft = (Path(folder) / side for side in ("base", "ft"))
        for side in (base, ft):
            run(
                sys.executable, __file__, "--layers", str(given.layers), "--experts", str(given.experts), "--make", side
            )
        planned = run(sys.executable, "-m", "pome", "edit", base, ft, Path(folder) / "out", "--dry-run", "--quiet")
        print(
            f"plan of {given.layers * given.experts} units: {planned.seconds:.1f} s, {planned.cpu_seconds:.1f} s of a "
            f"processor, {planned.peak / 2**20:.0f} MiB"
        )
        begun = time.perf_counter()
        records = run(sys.executable, "-c", RECORDS, base, ft, folder)
        print(f"journal and manifest: {time.perf_counter() - begun:.1f} s with a plan, {records.peak / 2**20:.0f} MiB")
        if given.profile:
            profile_plan(base, ft)


if __name__ == "__main__":
    main()
