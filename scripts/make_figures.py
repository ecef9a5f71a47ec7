#!/usr/bin/env python3
"""Pictures of README and docs, from a real pair.

    scripts/make_figures.py [--folder docs/pictures]

`before-after.png`: singular values of one update of the reaction BERT before and after the default edit, by
`torch.linalg.svd` in float64.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from safetensors import safe_open

import pome
from real_weights import rxnfp_pair

NAME = "bert.encoder.layer.0.intermediate.dense.weight"


def draw_before_after(path: Path) -> None:
    """Singular values of D and of the edit, on a linear axis."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pair = rxnfp_pair()
    weights = []
    for folder in (pair.base, pair.fine_tuned):
        with safe_open(Path(folder, "model.safetensors"), "pt") as file:
            weights.append(file.get_tensor(NAME).double())
    delta = weights[1] - weights[0]
    edit = pome.equalize(delta)
    before = torch.linalg.svdvals(delta)
    after = torch.linalg.svdvals(edit.value)
    figure, axes = pyplot.subplots(figsize=(7, 3.2), dpi=150)
    axes.plot(range(1, len(before) + 1), before, color="#b35900", label="after training")
    axes.plot(range(1, len(after) + 1), after, color="#005fb3", label="after pome edit")
    axes.axvline(edit.k, color="#777777", linewidth=0.8, linestyle=":")
    axes.annotate(f"{edit.k} of {edit.rank} directions kept", (edit.k, float(before[0]) * 0.45), (6, 0),
                  textcoords="offset points", color="#555555")  # fmt: skip
    axes.set_xlabel("directions of the update, strongest first")
    axes.set_ylabel("strength (singular value)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of README and docs.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "pictures")
    draw_before_after(parser.parse_args().folder / "before-after.png")


if __name__ == "__main__":
    main()
