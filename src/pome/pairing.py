"""Which tensor of BASE is the one that a tensor of FT was trained from: by name, and by one change of prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

# Words that tell the towers of one model apart. A change of prefix may add or drop wrappers such as `bert.` or
# `model.`, but may not lead from one tower to another: their tensors agree in shape and would pair into nonsense.
TOWERS = frozenset(
    (
        "encoder", "decoder", "vision", "visual", "vision_model", "vision_tower", "vision_encoder", "image_encoder",
        "text_model", "text_encoder", "audio", "audio_tower", "audio_model", "speech", "question_encoder",
        "ctx_encoder", "generator", "discriminator", "student", "teacher", "encoder_q", "encoder_k", "shared", "mtp",
    )
)  # fmt: skip


# An ending that so many names of BASE share tells nothing of where FT's belongs, and comparing all with all would take
# the square of their number.
CROWD = 64


def pair_names(base: Shapes, ft: Shapes) -> dict[str, str]:
    """FT name -> BASE name, one to one. Equal names pair; the others through the one change of prefix that fits most.

    A prefix is whole dotted words at the start of a name. Only matrices of equal shape vote, only tensors that no
    equal name has taken can pair, and among changes with as many votes the shortest wins.
    """
    pairs = {name: name for name in ft if name in base}
    free_ft = [name for name in ft if name not in pairs]
    free_base = {name for name in base if name not in pairs}
    change = _vote(base, ft, free_ft, free_base)
    if change is not None:
        old, new = change
        for name in free_ft:
            if name.startswith(old) and new + name[len(old) :] in free_base:
                pairs[name] = new + name[len(old) :]
    return pairs


def _vote(base: Shapes, ft: Shapes, free_ft: list[str], free_base: set[str]) -> tuple[str, str] | None:
    """The change of prefix (FT's, BASE's) under which most free matrices meet one of equal shape."""
    by_suffix: dict[str, list[str]] = {}
    for name in free_base:
        for suffix in _suffixes(name):
            by_suffix.setdefault(suffix, []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name in free_ft:
        if len(ft[name]) < 2:
            continue
        seen = set()
        for suffix in _suffixes(name):
            others = by_suffix.get(suffix, [])
            if len(others) > CROWD:
                continue
            for other in others:
                change = name[: len(name) - len(suffix)], other[: len(other) - len(suffix)]
                # The longest common suffix alone says what changed; shorter ones repeat it with more words.
                if other in seen or base[other] != ft[name]:
                    continue
                seen.add(other)
                if _only_wrappers(*change):
                    votes[change] += 1
    if not votes:
        return None
    return min(votes, key=lambda c: (-votes[c], c[0].count(".") + c[1].count("."), c))


def _suffixes(name: str) -> list[str]:
    """`a.b.0.c` -> `a.b.0.c`, `b.0.c`, `0.c`: what is left when a prefix goes; a layer number is never in a prefix."""
    words = name.split(".")
    first_number = next((i for i, word in enumerate(words) if word.isdigit()), len(words) - 1)
    return [".".join(words[i:]) for i in range(first_number + 1)]


def _only_wrappers(old: str, new: str) -> bool:
    towers = [{word for word in prefix.split(".") if word in TOWERS} for prefix in (old, new)]
    return towers[0] == towers[1]
