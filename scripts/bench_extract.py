#!/usr/bin/env python3
"""Time `pome extract` beside `mergekit-extract-lora` on one pair, and measure the energy that each adapter keeps.

    scripts/bench_extract.py FOLDER --mergekit VENV/bin/mergekit-extract-lora [--ranks 16,64,256] [--repeat N]

FOLDER holds `base` and `ft`, as scripts/make_smollm2_pair.py and scripts/make_llama_pair.py make them. mergekit wants
an environment of its own: python -m venv VENV; VENV/bin/pip install torch==2.13.0, the version that pome is timed with;
then VENV/bin/pip install mergekit. Both take the linear layers of attention and feed-forward blocks and no other. They
run in turn, each in a process of its own: wall time and processor time (the least of --repeat) and peak memory.

Energy kept is 1 - norm(D - B A)^2 / norm(D)^2 over all matrices of the pair together, from the files and in float64.
`short` is what it lacks of the best approximations' (s_1^2 + ... + s_k^2) / norm(D)^2, by float64 singular values, and
`worst` the most that one matrix lacks of its own. Both adapters are stored in FT's dtype, whose rounding is included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_edit import Run, run

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Weights:
    """Tensors of a checkpoint or adapter folder by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self.files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Any:
        return self.files[name].get_tensor(name).double()


def read_factors(folder: Path, weights: Weights, module: str) -> tuple[Any, Any]:
    """B and A of an adapter's LoRA, B times the scaling that PEFT takes from the config."""
    config = json.loads((folder / "adapter_config.json").read_text())

    def find(key: str, otherwise: str) -> float:
        named = [value for name, value in config[key].items() if module == name or module.endswith(f".{name}")]
        return float(named[0] if named else config[otherwise])

    scaling = find("alpha_pattern", "lora_alpha") / find("rank_pattern", "r")
    stem = f"base_model.model.{module}"
    return scaling * weights.read(f"{stem}.lora_B.weight"), weights.read(f"{stem}.lora_A.weight")


def measure_energy(pair: Path, adapters: dict[tuple[str, int], Path]) -> dict[tuple[str, int], tuple[float, ...]]:
    """(energy kept, what it lacks of the best, the worst matrix's lack) of each adapter, by tool and rank."""
    import torch

    base, tuned = Weights(pair / "base"), Weights(pair / "ft")
    opened = {key: Weights(folder) for key, folder in adapters.items()}
    total, sums = 0.0, {key: [0.0, 0.0, 0.0] for key in adapters}
    for name in sorted(name for name in tuned.files if name.removesuffix(".weight").endswith(LAYERS)):
        D = tuned.read(name) - base.read(name)
        short = D if D.shape[0] <= D.shape[1] else D.T
        squares = torch.linalg.eigvalsh(short @ short.T).flip(0).clamp(min=0.0)
        norm = float(squares.sum())
        total += norm
        for key, found in sums.items():
            B, A = read_factors(adapters[key], opened[key], name.removesuffix(".weight"))
            missed = float((D - B @ A).square().sum())
            lack = missed - float(squares[key[1] :].sum())
            found[0] += missed
            found[1] += lack
            found[2] = max(found[2], lack / norm)
    return {key: (1.0 - missed / total, lack / total, worst) for key, (missed, lack, worst) in sums.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--mergekit", type=Path, required=True)
    options.add_argument("--ranks", default="16,64,256")
    options.add_argument("--repeat", type=int, default=2)
    given = options.parse_args()
    base, ft = given.folder / "base", given.folder / "ft"
    ranks = [int(rank) for rank in given.ranks.split(",")]
    runs: dict[tuple[str, int], list[Run]] = {}
    with tempfile.TemporaryDirectory(prefix="pome-bench-", dir=given.folder.resolve().parent) as work:
        adapters = {(tool, rank): Path(work) / f"{tool}-{rank}" for rank in ranks for tool in ("pome", "mergekit")}
        for key, out in [item for item in adapters.items() for _ in range(given.repeat)]:
            shutil.rmtree(out, ignore_errors=True)
            if key[0] == "pome":
                command = [sys.executable, "-m", "pome", "extract", base, ft, out, "--rank", str(key[1])]
            else:
                command = [given.mergekit, "--model", ft, "--base-model", base, "--out-path", out]
                command += ["--max-rank", str(key[1]), "--skip-undecomposable"]
                command += ["--include-regex", rf"\.({'|'.join(LAYERS)})$"]
            runs.setdefault(key, []).append(run(*command))
        energy = measure_energy(given.folder, adapters)
    times = f"{'s':>8}{'mergekit / pome':>17}{'CPU, s':>9}{'mergekit / pome':>17}"
    print(f"{'rank':>5} {'tool':<9}{times}{'peak, MiB':>11}{'energy':>10}{'short':>10}{'worst':>10}")
    for (tool, rank), of_tool in runs.items():
        columns = []
        for measure in (lambda one: one.seconds, lambda one: one.cpu_seconds):
            least, theirs = (min(map(measure, found)) for found in (of_tool, runs["mergekit", rank]))
            columns.append(f"{least:9.1f}{theirs / least:17.2f}")
        peak = max(one.peak for one in of_tool) / 2**20
        kept, short, worst = energy[tool, rank]
        print(f"{rank:5} {tool:<8}{''.join(columns)}{peak:11.0f}{kept:10.6f}{short:10.1e}{worst:10.1e}")


if __name__ == "__main__":
    main()
