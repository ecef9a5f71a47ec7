"""Pairing of tensor names between two checkpoints: equal names, and changes of prefix. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from pome.errors import PairingError, printable
from pome.roles.names import invert, strip_all_wrappers, words

Shapes = Mapping[str, tuple[int, ...]]

# Words that tell the towers of one model apart, by what they mean. A change of prefix may add or drop wrappers such as
# `bert.` or `model.`, but may not lead from one tower to another: their tensors agree in shape and would pair into
# nonsense.
TOWERS = invert(
    {
        "vision": "vision visual vision_model vision_tower vision_encoder image_encoder",
        "text": "text_model text_encoder",
        "audio": "audio audio_tower audio_model audio_encoder speech",
    }
) | {
    word: word
    for word in words(
        "encoder decoder question_encoder ctx_encoder generator discriminator student teacher encoder_q encoder_k",
        "shared mtp image_tower video_tower",
    )
}

# An ending that so many names of BASE share tells nothing of where FT's belongs, and comparing all with all would take
# the square of their number.
CROWD = 64
# A model has a few towers, each with a prefix of its own; names made to differ one by one would take forever.
CHANGES = 16

PrefixChange = tuple[str, str]  # FT's, BASE's
Vote = tuple[PrefixChange, dict[str, str]]  # and the matrices that meet one of equal shape under it: FT's -> BASE's


def pair_names(base: Shapes, ft: Shapes) -> dict[str, str]:
    """FT name -> BASE name, one to one. Equal names pair; the others through the changes of prefix that fit most.

    Wrappers of training (`_orig_mod`, say) anywhere in a name count for nothing. A prefix is whole dotted words at the
    start of a name. Only matrices of equal shape vote, and only tensors that are still free can vote and pair; the vote
    is repeated, for every tower may have a prefix of its own. Among changes with as many votes the shortest goes first.
    Raises PairingError where such changes contradict each other.
    """
    plain_base, plain_ft = strip_all_wrappers(base), strip_all_wrappers(ft)
    stored_base, stored_ft = ({plain: n for n, plain in side.items()} for side in (plain_base, plain_ft))
    pairs = _pair_plain_names(
        {plain_base[name]: shape for name, shape in base.items()},
        {plain_ft[name]: shape for name, shape in ft.items()},
    )
    return {stored_ft[name]: stored_base[target] for name, target in pairs.items()}


def _pair_plain_names(base: Shapes, ft: Shapes) -> dict[str, str]:
    pairs = {name: name for name in ft if name in base}
    free_ft = [name for name in ft if name not in pairs]
    free_base = {name for name in base if name not in pairs}
    towers = _Towers(base, ft)
    for _ in range(CHANGES):
        winners = _vote(base, ft, free_ft, free_base, towers)
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


def _vote(base: Shapes, ft: Shapes, free_ft: list[str], free_base: set[str], towers: _Towers) -> list[Vote]:
    """The changes of prefix under which most free matrices meet one of equal shape, the shortest first."""
    by_suffix: dict[str, list[str]] = {}
    for name in free_base:
        for suffix in _suffixes(name):
            by_suffix.setdefault(suffix, []).append(name)
    votes: dict[PrefixChange, dict[str, str]] = {}
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
                if towers.agree(*change) and (_is_in_layer(suffix) or not all(change)):
                    votes.setdefault(change, {})[name] = other
    most = max(map(len, votes.values()), default=0)
    winners = [(change, fitting) for change, fitting in votes.items() if len(fitting) == most]
    return sorted(winners, key=lambda w: (w[0][0].count(".") + w[0][1].count("."), w[0]))


def _suffixes(name: str) -> list[str]:
    """`a.b.0.c` -> `a.b.0.c`, `b.0.c`, `0.c`: what is left when a prefix goes; a layer number is never in a prefix."""
    words = name.split(".")
    first_number = next((i for i, word in enumerate(words) if word.isdigit()), len(words) - 1)
    return [".".join(words[i:]) for i in range(first_number + 1)]


class _Towers:
    """The towers that prefixes on either side lead into."""

    def __init__(self, base: Shapes, ft: Shapes) -> None:
        # Where nothing is called a decoder, the only encoder is no tower beside another.
        self.alone = [not any("decoder" in name.split(".") for name in side) for side in (ft, base)]

    def agree(self, ours: str, theirs: str) -> bool:
        """Whether a change of prefix, from FT's to BASE's, stays in one tower."""
        return self._find(ours, self.alone[0]) == self._find(theirs, self.alone[1])

    def _find(self, prefix: str, alone: bool) -> set[str]:
        found = {TOWERS[word] for word in prefix.split(".") if word in TOWERS}
        # The encoder of images or of sound is that tower itself.
        return found - {"encoder"} if alone or found & {"vision", "audio", "text"} else found


def _is_in_layer(suffix: str) -> bool:
    """Whether a suffix holds a layer number. Outside of layers a word for another, as `classifier.dense` for
    `pooler.dense`, is another tensor."""
    return any(word.isdigit() for word in suffix.split("."))
