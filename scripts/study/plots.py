"""Plots of the study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from study.edits import Edit, pome
from study.evidence import CellResult

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLORS = {
    "adamw": "#1f4e79", "adamw-full": "#c00000", "adamw-long": "#ad1457",
    "adamw-short": "#7f9fbf", "bf16": "#e08a00", "muon": "#2e7d32",
    "lora": "#7b3fa0", "poet": "#00838f", "published": "#000000",
}  # fmt: skip
OTHER = "#999999"


def start(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), dpi=130, **options)
    return figure, axes


def finish(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def set_share_axis(axis: Any) -> None:
    """Shares of the gain in percent: linear near nothing, logarithmic beyond 1 %."""
    axis.set_xscale("symlog", linthresh=1.0)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_xticks([-10, -1, 0, 1, 10, 100], ["-10", "-1", "0", "1", "10", "100"])


def draw_effects(cells: Sequence[CellResult], edits: Sequence[str], path: Path) -> None:
    """A dot for each cell and edit: the share of the gain that the edit loses."""
    figure, axes = start(9, 7.5)
    seen = {cell.setting.tuning for cell in cells}
    lanes = [tuning for tuning in COLORS if tuning in seen] + ["others"]
    for place, edit in enumerate(edits):
        for cell in cells:
            if edit in cell.lines:
                tuning = cell.setting.tuning if cell.setting.tuning in COLORS else "others"
                lift = ((lanes.index(tuning) + 0.5) / len(lanes) - 0.5) * 0.8  # within the row of the edit
                color = COLORS.get(tuning, OTHER)
                marker = "s" if cell.setting.base == "rxnfp" else "^" if cell.setting.base.startswith("smol") else "o"
                axes.plot(100 * cell.share(edit), -place - lift, marker, color=color, markersize=4, alpha=0.75)
    for tuning in lanes:
        axes.plot([], [], "o", color=COLORS.get(tuning, OTHER), label=tuning)
    for marker, base in (("o", "small Llama, MoE"), ("^", "SmolLM2"), ("s", "reactions")):
        axes.plot([], [], marker, color="#444444", markerfacecolor="none", label=base)
    axes.set_yticks([-place for place in range(len(edits))], edits)
    set_share_axis(axes)
    axes.set_xlabel("share of fine-tuning's gain that the edit loses, % of the loss (left of 0 is better)")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="fine-tuning", frameon=False)
    finish(figure, path)


KINDS = {
    "pome": "#c00000",
    "truncate": "#1f4e79",
    "delta times": "#2e7d32",
    "step": "#e08a00",
    "equivalence": "#7b3fa0",
}


def draw_departure(cells: Sequence[CellResult], path: Path) -> None:
    """Share of the gain against departure, one dot for each cell and edit of the FFN."""
    figure, axes = start(8, 4.4)
    for kind, color in KINDS.items():
        points = [
            (cell.lines[edit]["departure"], 100 * cell.share(edit))
            for cell in cells
            for edit in cell.lines
            if edit.startswith("ffn:") and kind in edit and "+" not in edit and cell.lines[edit].get("departure")
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=color, markersize=3.5, alpha=0.6, label=f"ffn: {kind}")
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1.0, 2.0], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    axes.set_yscale("symlog", linthresh=1.0)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_yticks([-10, -1, 0, 1, 10, 100], ["-10", "-1", "0", "1", "10", "100"])
    axes.set_xlabel("departure norm(W_E - W_ft) / norm(D), median over the matrices")
    axes.set_ylabel("share of the gain lost, %")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.2)
    finish(figure, path)


def draw_curves(cells: Sequence[CellResult], path: Path) -> None:
    """Share of the gain by K, by beta and by the factor of plain scaling; a line for each cell of the whole grid."""
    wide = [cell for cell in cells if pome("up", 0.25).name in cell.lines]
    figure, axes = start(10, 3.6, 3, sharey=True)
    K, betas, factors = (0.25, 0.5, 0.75, 1.0), (0.5, 0.7, 1.0, 1.3, 1.5, 2.0), (0.8, 0.9, 1.1, 1.2, 1.3)
    panels = (
        ("K, FFN, beta 1", K, [pome("ffn", each).name for each in K]),
        ("beta, FFN, K 0.5", betas, [pome("ffn", beta=each).name for each in betas]),
        ("control: the FFN's delta times", factors, [Edit("scale", "ffn", beta=each).name for each in factors]),
    )
    for axis, (title, places, edits) in zip(axes, panels, strict=True):
        lines = []
        for cell in wide:
            if all(edit in cell.lines for edit in edits):
                lines.append([100 * cell.share(edit) for edit in edits])
                axis.plot(places, lines[-1], color=COLORS.get(cell.setting.tuning, OTHER), alpha=0.6, linewidth=1)
        if lines:
            axis.plot(
                places, [statistics.median(each) for each in zip(*lines, strict=True)], color="black", linewidth=2
            )
        axis.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_yscale("symlog", linthresh=1.0)
        axis.set_xlabel(title)
        axis.grid(alpha=0.2)
    axes[0].set_yticks([-10, -1, 0, 1, 10, 100], ["-10", "-1", "0", "1", "10", "100"])
    axes[0].set_ylabel("share of the gain lost, %")
    finish(figure, path)
