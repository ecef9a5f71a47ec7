"""Quantities that reports show of each matrix: key in CSV, label, heading in tables, explanation."""

from __future__ import annotations

from dataclasses import dataclass

from pome.choices import RANK_RULES, SCALES


@dataclass(frozen=True)
class Quantity:
    """One number of a matrix.

    key: its name in CSV. label: what it is called. help: what it tells. log: shown on a logarithmic scale.
    column: its heading in tables, on the terminal and in the page; None where tables leave it out.
    """

    key: str
    label: str
    help: str
    log: bool = False
    column: str | None = None


# A survey has no k of its own to fix.
SURVEYED_RULES = [rule for rule in RANK_RULES.values() if rule.name != "fixed"]

SURVEYED = (
    Quantity("relative_norm", "‖Δ‖ / ‖W‖", "How far training moved the matrix, beside its own size.", True, "‖Δ‖/‖W‖"),
    Quantity("delta_norm", "‖Δ‖", "Norm of what training changed.", True),
    Quantity("stable_rank", "stable rank", "‖Δ‖² / s₁²: 1 when one direction is all.", True, "stable rank"),
    Quantity("effective_share", "effective rank / size", "exp(entropy of the spectrum): 1 is flat, noise-like."),
    Quantity("energy_25", "energy at K = 0.25", "Share of ‖Δ‖² in the leading quarter of the directions."),
    Quantity(
        "energy_50", "energy at K = 0.5", "Share of ‖Δ‖² in the leading half of the directions.", False, "energy .5"
    ),
    Quantity("energy_75", "energy at K = 0.75", "Share of ‖Δ‖² in the leading three quarters of the directions."),
    Quantity("rank", "rank", "Singular values that are not zero to the precision of the method.", True),
    Quantity(
        "above_noise", "directions above noise", "Directions that storage rounding does not explain.", True,
        "above noise",
    ),
    Quantity(
        "noise_share", "noise share", "Energy that storage rounding alone would have, beside ‖Δ‖².", True, "noise"
    ),
    Quantity("changed", "entries changed", "Share of the entries that differ between the two checkpoints."),
    *(
        Quantity(
            f"k_{rule.name}", f"k: {rule.name}", f"What --rank-rule {rule.name} would keep.", True,
            f"k {rule.heading or rule.name}",
        )
        for rule in SURVEYED_RULES
    ),
    *(
        Quantity(
            f"alpha_{scale.name}", f"α: {scale.name}",
            f"alpha_0 of --scale {scale.name} ({scale.means}), at the k of ratio.", True,
        )
        for scale in SCALES.values()
    ),
    *(
        Quantity(
            f"edit_{scale.name}", f"norm ratio: {scale.name}",
            f"‖edit‖ / ‖Δ‖ of --scale {scale.name} with --beta 1.", True,
        )
        for scale in SCALES.values()
        if scale.name != "frobenius"  # its ratio is 1 by its definition
    ),
    Quantity(
        "departure", "departure", "‖edit - Δ‖ / ‖Δ‖ of an edit with defaults: how far it leaves the fine-tuned weight.",
        False, "departure",
    ),
    Quantity(
        "rounding", "lost to rounding", "ESTIMATE: share of the edit that FT's dtype would destroy.", True, "lost"
    ),
    Quantity(
        "align_left", "alignment, outputs", "Share of ‖Δ‖² in the base's leading output directions.", False,
        "align out",
    ),
    Quantity(
        "align_right", "alignment, inputs", "Share of ‖Δ‖² in the base's leading input directions.", False,
        "align in",
    ),
    Quantity("drift", "leading drift", "Relative change of the base's leading singular values.", True, "drift"),
)  # fmt: skip

# The weights whose spectral drift and hyperspherical energy are measured, and how they are called.
WEIGHTS = {"base": "BASE", "fine_tuned": "FT", "equalized": "equalized", "equivalence": "equivalence"}

WEIGHED = (
    *(
        Quantity(
            f"spectral_drift_{key}", f"spectral drift, {name}", f"Change of the singular values from BASE to {name}, "
            "beside the norm of BASE.", True,
        )
        for key, name in WEIGHTS.items()
        if key != "base"
    ),
    *(
        Quantity(
            f"hyperspherical_energy_{key}", f"hyperspherical energy, {name}",
            "Mean over pairs of rows of 1 / the distance of their directions: near 0.707 for random ones in many "
            "dimensions, more for rows that cluster.",
        )
        for key, name in WEIGHTS.items()
    ),
    Quantity("rows", "rows in the energy", "Rows looked at for the energy; fewer than all are a seeded sample."),
    Quantity("zero_rows", "zero rows", "Rows of zeros, left out of the energy."),
    Quantity("identical_pairs", "identical pairs", "Pairs of rows of one direction, left out of the energy."),
)  # fmt: skip

MATCHED = (
    Quantity(
        "spectral_drift", "spectral drift", "Relative change of the base's singular values, which the edit takes back.",
        True, "spectral drift",
    ),
    Quantity("distance", "distance", "Norm of the way from the fine-tuned weight to W_E, before beta.", True),
)  # fmt: skip

EDITED = (
    Quantity("delta_norm", "‖Δ‖", "Norm of what training changed.", True),
    Quantity("rank", "rank", "Singular values that are not zero to the precision of the method.", True, "rank"),
    Quantity("k", "k kept", "Directions that the edit kept.", True, "k"),
    Quantity("energy_kept", "energy kept", "Share of ‖Δ‖² in the directions kept.", False, "energy kept"),
    Quantity("alpha", "α", "What every kept singular value became.", True, "alpha"),
    Quantity(
        "edit_ratio", "‖edit‖ / ‖Δ‖", "Norm of the edit beside that of what training changed.", True,
        "||edit||/||delta||",
    ),
    Quantity(
        "departure", "departure", "‖edit - Δ‖ / ‖Δ‖: how far the edit takes the weight from the fine-tuned one.", False,
        "departure",
    ),
    Quantity(
        "rounding", "lost to rounding", "Share of the edit that the output dtype destroyed, measured.", True,
        "lost to rounding",
    ),
    Quantity(
        "cut_gap", "gap at the cut", "(s_k - s_k+1) / s_k: how clearly the data say where to cut.", True,
        "gap at the cut",
    ),
    Quantity("sigma_max", "s₁ before", "Largest singular value of the delta.", True),
    Quantity("noise_floor", "noise floor", "Largest singular value that storage rounding leaves in a delta.", True),
)  # fmt: skip
