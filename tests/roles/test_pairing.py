"""Which tensor belongs to which: equal names, changes of prefix, never another tower or another shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pome.errors import PairingError
from pome.roles.pairing import CHANGES, pair_names


def bert(prefix: str = "", layers: int = 3) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embeddings.word_embeddings.weight": (30, 8)}
    for i in range(layers):
        layer = f"{prefix}encoder.layer.{i}."
        shapes |= {layer + "intermediate.dense.weight": (32, 8), layer + "intermediate.dense.bias": (32,)}
        shapes |= {layer + "output.dense.weight": (8, 32), layer + "output.LayerNorm.weight": (8,)}
    return shapes


names = st.lists(st.sampled_from(["", "bert.", "model.", "base_model.model.", "transformer."]), min_size=2, max_size=2)


@given(names, st.integers(1, 4))
def test_any_change_of_wrapper_is_found(prefixes: list[str], layers: int) -> None:
    ours, theirs = (bert(prefix, layers) for prefix in prefixes)
    assert pair_names(theirs, ours) == dict(zip(ours, theirs, strict=True))


def test_equal_names_pair_whatever_their_shape() -> None:
    assert pair_names({"head.weight": (5, 8)}, {"head.weight": (7, 8)}) == {"head.weight": "head.weight"}


def test_extra_heads_on_either_side_pair_with_nothing() -> None:
    base = bert("bert.") | {"cls.predictions.decoder.weight": (30, 8)}
    ft = bert() | {"classifier.weight": (5, 8)}
    pairs = pair_names(base, ft)
    assert pairs == {name: f"bert.{name}" for name in bert()}


def test_a_layer_never_pairs_with_another_layer() -> None:
    base = {f"h.{i}.mlp.weight": (8, 4) for i in range(4)}
    ft = {f"model.h.{i}.mlp.weight": (8, 4) for i in range(1, 5)}
    assert pair_names(base, ft) == {f"model.h.{i}.mlp.weight": f"h.{i}.mlp.weight" for i in range(1, 4)}


def test_a_tower_never_pairs_with_another_tower() -> None:
    base = {f"encoder.layers.{i}.fc1.weight": (8, 4) for i in range(3)}
    ft = {f"decoder.layers.{i}.fc1.weight": (8, 4) for i in range(3)}
    assert pair_names(base, ft) == {}
    vision = {f"vision_tower.{name}": shape for name, shape in base.items()}
    assert pair_names(base, vision) == {}


def test_the_change_with_most_votes_wins_and_pairs_are_one_to_one() -> None:
    base = bert("bert.") | {"aside.embeddings.word_embeddings.weight": (30, 8)}
    pairs = pair_names(base, bert())
    assert pairs["embeddings.word_embeddings.weight"] == "bert.embeddings.word_embeddings.weight"
    assert len(set(pairs.values())) == len(pairs)


def test_matrices_of_other_shapes_do_not_pair() -> None:
    wider = {name: tuple(2 * n for n in shape) for name, shape in bert("bert.").items()}
    assert pair_names(wider, bert()) == {}


@given(st.permutations(list(bert("a."))), st.permutations(list(bert())))
def test_the_order_of_names_changes_nothing(theirs: list[str], ours: list[str]) -> None:
    base = {name: bert("a.")[name] for name in theirs}
    assert pair_names(base, {name: bert()[name] for name in ours}) == {name: f"a.{name}" for name in bert()}


def layers(prefix: str, count: int = 3, *sizes: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}layers.{i}.mlp.up_proj.weight": sizes or (8, 4) for i in range(count)}


def test_every_tower_may_have_a_prefix_of_its_own() -> None:
    base = layers("language_model.model.") | layers("vision_tower.", 5, 6, 6) | {"language_model.head.w": (9, 4)}
    ft = layers("model.language_model.") | layers("model.vision_tower.", 5, 6, 6) | {"head.w": (9, 4)}
    wanted = {name.replace("language_model.model", "model.language_model"): name for name in base}
    wanted = {name if "language" in name else f"model.{name}": target for name, target in wanted.items()}
    del wanted["language_model.head.w"]
    assert pair_names(base, ft) == wanted | {"head.w": "language_model.head.w"}


def test_outside_of_layers_a_replaced_prefix_pairs_nothing() -> None:
    base = layers("bert.") | {"bert.pooler.dense.weight": (8, 8)}
    ft = layers("roberta.") | {"classifier.dense.weight": (8, 8)}
    assert pair_names(base, ft) == dict(zip(layers("roberta."), layers("bert."), strict=True))


@pytest.mark.parametrize(
    ("base", "ft", "said"),
    [
        (
            layers("query_model.") | layers("doc_model."),
            layers("bert."),
            "bert.layers.0.mlp.up_proj.weight: BASE's doc_model.layers.0.mlp.up_proj.weight and "
            "query_model.layers.0.mlp.up_proj.weight fit it equally well .*; give as BASE",
        ),
        (
            layers("model."),
            layers("ema.model.") | layers("net.model."),
            "ema.model.layers.0.mlp.up_proj.weight and net.model.layers.0.mlp.up_proj.weight: both fit BASE's "
            "model.layers.0.mlp.up_proj.weight equally well .*; give as FT",
        ),
    ],
)
def test_two_equally_good_partners_are_refused(base: dict, ft: dict, said: str) -> None:
    with pytest.raises(PairingError, match=said):
        pair_names(base, ft)


def test_the_partner_with_more_of_the_name_in_common_wins() -> None:
    assert pair_names(layers("a.") | layers("b."), layers("model.a.")) == {f"model.{n}": n for n in layers("a.")}
    assert pair_names(layers("b."), layers("model.a.") | layers("model.b.")) == {f"model.{n}": n for n in layers("b.")}


def test_the_number_of_prefix_changes_is_bounded() -> None:
    base, ft = ({f"{side}{i}.x{i}.0.w": (4, 4) for i in range(3 * CHANGES)} for side in "pq")
    assert len(pair_names(base, ft)) == CHANGES  # each vote reads all that is free: one for each name takes too long
