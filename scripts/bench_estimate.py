#!/usr/bin/env python3
"""Hold `pome estimate --on this` to the run that follows it, on three pairs.

    scripts/bench_estimate.py FOLDER [--pairs llama,smollm2,experts]

makes in FOLDER, unless they are there, the pair of make_llama_pair.py (2.2 GB each), that of make_smollm2_pair.py, and
a pair of 6,000 small experts in stacks. For each it prints the estimate, the seconds of the whole command, their ratio,
and the estimate of the peak of memory beside the peak; last, the estimate that the rates of that run give.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from bench_edit import SCRIPTS, run

EXPERTS, INNER, HIDDEN, LAYERS = 125, 128, 192, 48
LAYERS_OF = {"llama": "up", "smollm2": "ffn", "experts": "up"}


def make_experts(folder: Path) -> None:
    """Stacks of fused gate and up projections, with the names of Qwen3 MoE, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    config = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "hidden_size": HIDDEN}
    config |= {"moe_intermediate_size": INNER, "architectures": ["Qwen3MoeForCausalLM"]}
    sides: dict[str, dict[str, torch.Tensor]] = {"base": {}, "ft": {}}
    torch.manual_seed(0)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        base = torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.02
        sides["base"][name] = base.bfloat16()
        strong = torch.randn(EXPERTS, 2 * INNER, 8) @ torch.randn(EXPERTS, 8, HIDDEN)
        sides["ft"][name] = (base + 1e-3 * torch.randn_like(base) + 1e-3 * strong).bfloat16()
    for side, tensors in sides.items():
        (folder / side).mkdir(parents=True)
        save_file(tensors, folder / side / "model.safetensors", {"format": "pt"})
        (folder / side / "config.json").write_text(json.dumps(config))


def make_pair(name: str, folder: Path) -> None:
    if folder.is_dir():
        return
    # In a process of its own: what this one has held counts into the peak of those that it starts.
    made = [__file__, "--make-experts"] if name == "experts" else [SCRIPTS / f"make_{name}_pair.py"]
    run(sys.executable, *made, folder)


def estimate(folder: Path, layers: str, *options: str) -> dict[str, object]:
    command = [sys.executable, "-m", "pome", "estimate", folder / "base", folder / "ft", "--layers", layers]
    said = subprocess.run([*command, *options, "--json", "--quiet"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(said.stdout)


def bench_pair(name: str, folder: Path) -> None:
    make_pair(name, folder)
    layers, out = LAYERS_OF[name], folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    before = estimate(folder, layers, "--on", "this")
    edited = run(
        sys.executable,
        "-m",
        "pome",
        "edit",
        folder / "base",
        folder / "ft",
        out,
        "--layers",
        layers,
        "--quiet",
        "--fresh",
    )
    after = estimate(folder, layers)
    parts = [f"{before[f'{part}_seconds']:.1f}" for part in ("start", "copy", "edit", "hash")]
    print(
        f"| {name} `{layers}` | {before['seconds']:.1f} ({' + '.join(parts)}) | {edited.seconds:.1f} | "
        f"{before['seconds'] / edited.seconds:.2f} | {after['seconds'] / edited.seconds:.2f} | "
        f"{before['memory'] / 2**20:.0f} | {edited.peak / 2**20:.0f} |",
        flush=True,
    )
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", default="llama,smollm2,experts")
    parser.add_argument("--make-experts", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make_experts:
        make_experts(given.folder)
        return
    print("| pair | estimated, s (start + copy + edit + hash) | run, s | ratio | by the run's own rates | "
          "memory estimated, MiB | peak, MiB |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in given.pairs.split(","):
        bench_pair(name, given.folder / name)


if __name__ == "__main__":
    main()
