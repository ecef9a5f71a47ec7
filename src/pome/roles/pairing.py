"""Which tensor of BASE is the one that a tensor of FT was trained from: by name, and by changes of prefix."""

from __future__ import annotations

from collections.abc import Mapping

from pome.errors import PairingError, printable

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
# A model has a few towers, each with a prefix of its own; names made to differ one by one would take forever.
CHANGES = 16

Change = tuple[str, str]  # of prefix: FT's, BASE's
Vote = tuple[Change, dict[str, str]]  # and the matrices that meet one of equal shape under it: FT's -> BASE's


def pair_names(base: Shapes, ft: Shapes) -> dict[str, str]:
    """FT name -> BASE name, one to one. Equal names pair; the others through the changes of prefix that fit most.

    A prefix is whole dotted words at the start of a name. Only matrices of equal shape vote, and only tensors that are
    still free can vote and pair; the vote is repeated, for every tower may have a prefix of its own. Among changes
    with as many votes the shortest goes first. Raises PairingError where such changes contradict each other.
    """
    pairs = {name: name for name in ft if name in base}
    free_ft = [name for name in ft if name not in pairs]
    free_base = {name for name in base if name not in pairs}
    for _ in range(CHANGES):
        winners = _vote(base, ft, free_ft, free_base)
        if not winners:
            break
        for rival in winners[1:]:
            _refuse_contradiction(winners[0], rival)
        old, new = winners[0][0]
        moved = {name: new + name[len(old) :] for name in free_ft if name.startswith(old)}
        pairs |= {name: target for name, target in moved.items() if target in free_base}
        free_ft = [name for name in free_ft if name not in pairs]
        free_base -= set(moved.values())
    return pairs


def _refuse_contradiction(winner: Vote, rival: Vote) -> None:
    """Raise PairingError if a change of as many votes pairs a tensor of the winner's with another, on either side.

    Unless the winner's pair has more of its name in common: `model.a.0` is `a.0`, not `b.0`.
    """
    (change, pairs), (other, others) = winner, rival
    back = {target: name for name, target in pairs.items()}
    for name, target in others.items():
        if pairs.get(name, target) != target and len(change[0]) >= len(other[0]):
            raise PairingError(
                f"{printable(name)}: BASE's {printable(pairs[name])} and {printable(target)} fit it equally well by "
                "name and shape; give as BASE a checkpoint that holds only the one it was trained from"
            )
        if back.get(target, name) != name and len(change[1]) >= len(other[1]):
            raise PairingError(
                f"{printable(back[target])} and {printable(name)}: both fit BASE's {printable(target)} equally well by "
                "name and shape; give as FT a checkpoint that holds only one of them"
            )


def _vote(base: Shapes, ft: Shapes, free_ft: list[str], free_base: set[str]) -> list[Vote]:
    """The changes of prefix under which most free matrices meet one of equal shape, the shortest first."""
    by_suffix: dict[str, list[str]] = {}
    for name in free_base:
        for suffix in _suffixes(name):
            by_suffix.setdefault(suffix, []).append(name)
    votes: dict[Change, dict[str, str]] = {}
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
                if _only_wrappers(*change) and (_is_in_layer(suffix) or not all(change)):
                    votes.setdefault(change, {})[name] = other
    most = max(map(len, votes.values()), default=0)
    winners = [(change, fitting) for change, fitting in votes.items() if len(fitting) == most]
    return sorted(winners, key=lambda w: (w[0][0].count(".") + w[0][1].count("."), w[0]))


def _suffixes(name: str) -> list[str]:
    """`a.b.0.c` -> `a.b.0.c`, `b.0.c`, `0.c`: what is left when a prefix goes; a layer number is never in a prefix."""
    words = name.split(".")
    first_number = next((i for i, word in enumerate(words) if word.isdigit()), len(words) - 1)
    return [".".join(words[i:]) for i in range(first_number + 1)]


def _only_wrappers(old: str, new: str) -> bool:
    towers = [{word for word in prefix.split(".") if word in TOWERS} for prefix in (old, new)]
    return towers[0] == towers[1]


def _is_in_layer(suffix: str) -> bool:
    """Whether a suffix holds a layer number. Outside of layers a word for another, as `classifier.dense` for
    `pooler.dense`, is another tensor."""
    return any(word.isdigit() for word in suffix.split("."))
