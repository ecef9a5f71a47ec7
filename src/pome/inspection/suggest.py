"""Suggested command and warnings from measured spectra, each warning with the option that answers it.

These are rules of thumb over numbers in the survey. They know the weights and no task.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pome.editing.base_check import FAR
from pome.inspection.records import Matrix

# Roles in the order in which an edit of them is worth trying: the paper's default first, attention last.
PREFERRED = ("up", "gate", "down", "v", "o", "k", "q")
SMALL_RANK = 1 / 8  # of the short side: below it, a delta or what stands out of its noise is low-rank
NOISY = 0.5  # share of the energy that rounding explains
LOSSY = 0.3  # share of the edit that rounding destroys
SPARSE = 0.5  # share of entries that changed at all
OTHER = 1.0  # norm of the delta over the base's, at which the two are no nearer than unrelated weights
EXCLUDE = "--exclude"  # with a pattern for the matrices at hand
LONGEST_PATTERN = 400


@dataclass(frozen=True)
class Notice:
    """A warning about some matrices.

    text: what is odd, in a sentence. option: what answers it on the command line of `pome edit`, "" for none.
    matrices: titles of the matrices that it is about, as in `Matrix.title`.
    """

    text: str
    option: str
    matrices: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.matrices)


@dataclass(frozen=True)
class Suggestion:
    """Suggestion for a pair: how the update looks, the command that suits it ("" for none), and why."""

    title: str
    command: str
    why: str


CAUTION = "This is a rule of thumb from the spectra alone; it has not seen your task: evaluate before you trust it."


def list_warnings(matrices: Sequence[Matrix]) -> list[Notice]:
    """Warnings about these deltas."""
    checks: list[tuple[Callable[[Matrix], bool], str, str]] = [
        (
            lambda m: m.above_noise == 0,
            "No direction stands above storage rounding: an edit would equalize rounding noise.",
            EXCLUDE,
        ),
        (
            lambda m: m.above_noise > 0 and m.noise_share > NOISY,
            "More than half of the update's energy is what storage rounding alone would put there, so half of the rank "
            "is mostly noise.",
            "--rank-rule noise-floor --scale mean",
        ),
        (
            lambda m: m.rank <= SMALL_RANK * min(m.shape),
            "The update is low-rank, as an adapter's is: half of its directions would be cut though all carry signal.",
            "--rank-ratio 1",
        ),
        (
            lambda m: m.rounding > LOSSY,
            f"Storing the edit would lose over {LOSSY:.0%} of it to rounding (an estimate from the stored exponents).",
            "--dtype float32",
        ),
        (
            lambda m: m.changed is not None and m.changed < SPARSE,
            "Most entries did not change at all, as after reinforcement learning with small steps or in rows that no "
            "example touched.",
            "--rank-rule noise-floor",
        ),
        (
            lambda m: m.relative_norm is None or m.relative_norm > FAR,
            f"The update is over {FAR:.0%} of the weight: a layer trained anew, or another base than this one.",
            EXCLUDE,
        ),
    ]
    notices = []
    for test, text, option in checks:
        found = [matrix for matrix in matrices if test(matrix)]
        if found:
            answer = make_exclusion(found, matrices) if option == EXCLUDE else option
            notices.append(Notice(text, answer, tuple(matrix.title for matrix in found)))
    return notices


def make_exclusion(found: Sequence[Matrix], matrices: Sequence[Matrix]) -> str:
    """`--exclude PATTERN` that leaves out the tensors of `found` and no other of `matrices`; "" if it would be long."""
    excluded = {matrix.name for matrix in found}
    others = {matrix.name for matrix in matrices} - excluded
    by_form: dict[str, list[str]] = {}
    for name in sorted(excluded):
        by_form.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    other_forms = {re.sub(r"\d+", "#", name) for name in others}
    patterns: list[str] = []
    for form, names in by_form.items():
        # One pattern for all layers and experts where none of them stays, else the names one by one.
        whole = [r"\d+".join(map(re.escape, form.split("#")))] if form not in other_forms else map(re.escape, names)
        patterns += whole
    pattern = f"^({'|'.join(patterns)})$" if len(patterns) > 1 else f"^{patterns[0]}$"
    return f"--exclude {shlex.quote(pattern)}" if len(pattern) <= LONGEST_PATTERN else ""


def suggest(base: str, fine_tuned: str, matrices: Sequence[Matrix]) -> Suggestion:
    """One command for the pair, and why. `matrices` are those of the survey, of any roles."""
    far = statistics.median(m.relative_norm or 0.0 for m in matrices) if matrices else 0.0
    if far > OTHER and all(m.changed is not None for m in matrices):  # an adapter is the change itself
        return Suggestion(
            "BASE looks wrong",
            "",
            f"The update is {far:.0%} of the weights of {base} (the median), as between two models that were trained "
            f"apart: {base} is taken as pretrained, {fine_tuned} as trained from it. Give the model that it was "
            f"trained from. {CAUTION}",
        )
    by_role = {role: [m for m in matrices if m.role == role] for role in PREFERRED}
    role = next((role for role in PREFERRED if any(m.above_noise for m in by_role[role])), None)
    if role is None:
        return Suggestion(
            "Nothing to edit",
            "",
            "In no feed-forward or attention matrix does a direction of the update stand above storage rounding; an "
            "edit would amplify noise. Use a copy of the fine-tuned model in a wider dtype, if there is one. "
            f"{CAUTION}",
        )
    chosen = by_role[role]

    def median(value: Callable[[Matrix], float]) -> float:
        return statistics.median(map(value, chosen))

    short = median(lambda m: min(m.shape))
    rank, above = median(lambda m: m.rank), median(lambda m: m.above_noise)
    noise = median(lambda m: m.noise_share)
    changed = median(lambda m: 1.0 if m.changed is None else m.changed)
    options: list[str] = []
    if rank <= SMALL_RANK * short:
        title = "A low-rank update, such as an adapter"
        options = ["--rank-ratio", "1"]
        why = f"It has rank {rank:.0f} of {short:.0f}: all its directions are signal, and half of them would be lost."
    elif above <= SMALL_RANK * short:
        title = "A low-rank update under storage rounding, such as a merged LoRA"
        options = ["--rank-rule", "noise-floor"]
        why = (
            f"Of {short:.0f} directions {above:.0f} stand above what rounding to the stored dtype explains; half of "
            "the rank would be mostly noise."
        )
        if noise > 0.1:
            options += ["--scale", "mean"]
            why += f" Noise holds about {min(noise, 1.0):.0%} of the energy, which the scale `mean` leaves out."
    elif changed < SPARSE:
        title = "A sparse update, as after reinforcement learning"
        options = ["--rank-rule", "noise-floor"]
        why = (
            f"{changed:.0%} of the entries changed: steps so small that storage swallowed most; what stands above "
            f"rounding are {above:.0f} of {short:.0f} directions."
        )
    elif noise > NOISY:
        title = "An update that is mostly storage rounding"
        options = ["--rank-rule", "noise-floor", "--scale", "mean"]
        why = (
            f"Rounding explains about {min(noise, 1.0):.0%} of its energy; {above:.0f} of {short:.0f} directions stand "
            "above that, and these alone are kept and scaled by."
        )
    else:
        title = "An ordinary full fine-tune"
        why = (
            f"{above:.0f} of {short:.0f} directions stand above storage rounding, and half of the rank holds "
            f"{median(lambda m: m.energy['0.5']):.0%} of the energy: the paper's case, for which the defaults (K = "
            "0.5, beta = 1) are made. In docs/study.md they raised the loss more often than they lowered it."
        )
    if median(lambda m: m.rounding) > LOSSY:
        options += ["--dtype", "float32"]
        why += " Stored in its dtype the edit would lose a good part to rounding, so float32."
    out = f"{fine_tuned.rstrip('/').rpartition('/')[2].partition('@')[0].removesuffix('.safetensors') or 'model'}-pome"
    command = shlex.join(["pome", "edit", base, fine_tuned, out, "--layers", role, *options])
    return Suggestion(title, command, f"{why} {CAUTION}")
