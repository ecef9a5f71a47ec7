"""What a sweep tries, the order of the search, and what a command's output is worth."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.errors import ScoreError, SpecError
from pome.sweeping.grid import make_grid, walk
from pome.sweeping.scorers.base import Score, Scored
from pome.sweeping.scorers.command import CommandScorer, read_score
from pome.sweeping.scorers.language import HarnessScorer, LossScorer
from pome.sweeping.scorers.options import make_scorer


def drain(grid, score_of):
    """The candidates in the order asked for, each answered by `score_of`."""
    asked = []
    search = walk(grid)
    try:
        stage = next(search)
        while True:
            asked += stage
            stage = search.send([score_of(candidate) for candidate in stage])
    except StopIteration:
        return asked


def test_the_defaults_are_one_candidate_as_edit_has_it():
    (candidate,) = drain(make_grid({}), lambda _: 0.0)
    assert candidate.params == {
        "layers": ["up"], "method": "equalize", "rank_ratio": 0.5, "scale": "frobenius", "beta": 1.0, "power": 0.0
    }  # fmt: skip
    assert (candidate.spec.layers, candidate.spec.rank_rule, candidate.spec.beta) == (("up",), "ratio", 1.0)
    assert candidate.label == "up K=0.5 frobenius beta=1"


def test_powers_are_an_axis_and_a_power_of_zero_is_not_said():
    grid = make_grid({"power": "0,0.5,1", "scale": "unit", "rank_ratio": 0.25})
    asked = drain(grid, lambda _: 0.0)
    assert [candidate.spec.power for candidate in asked] == [0.0, 0.5, 1.0]
    said = "up K=0.25 unit beta=1"
    assert [candidate.label for candidate in asked] == [said, f"{said} power=0.5", f"{said} power=1"]


def test_every_combination_is_tried_once_beta_fastest():
    grid = make_grid({"layers": "up,gate+down", "rank_ratio": "0.25,0.5", "scale": "frobenius,mean", "beta": "1,2,3"})
    asked = drain(grid, lambda _: 0.0)
    assert len(asked) == grid.size == 24
    assert len({candidate.key for candidate in asked}) == 24
    assert [candidate.params["beta"] for candidate in asked[:4]] == [1.0, 2.0, 3.0, 1.0]
    assert asked[-1].spec.layers == ("gate", "down")


def test_ratios_ranks_energies_and_rules_join_into_one_axis():
    grid = make_grid({"rank_ratio": [0.25], "rank": [8, "16"], "energy": 0.8, "rank_rule": "effective,ratio"})
    choices = [candidate.rank_choice for candidate in drain(grid, lambda _: 0.0)]
    assert choices == ["K=0.25", "k=8", "k=16", "energy=0.8", "effective"]
    specs = [candidate.spec for candidate in drain(grid, lambda _: 0.0)]
    assert [(spec.rank_rule, spec.rank) for spec in specs] == [
        ("ratio", None), ("fixed", 8), ("fixed", 16), ("energy", None), ("effective", None)
    ]  # fmt: skip


def test_a_pattern_may_hold_commas():
    grid = make_grid({"layers": ["re:mlp.{1,3}up", "up"]})
    assert grid.layers == (("re:mlp.{1,3}up",), ("up",))


def test_joined_roles_are_those_of_the_spec_however_they_are_written():
    grid = make_grid({"layers": ["gate + up", ["down,q", "down"]], "rank": None})
    assert grid.layers == (("gate", "up"), ("down", "q"))
    assert [candidate.spec.layers for candidate in drain(grid, lambda _: 0.0)] == list(grid.layers)


def test_options_of_edit_are_shared_by_all():
    grid = make_grid({"beta": [1, 2], "exclude": ["layers.0"], "device": "cpu"})
    assert all(c.spec.exclude == ("layers.0",) and c.spec.device == "cpu" for c in drain(grid, lambda _: 0.0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": "1,x"}, "beta: 'x' is not a number"),
        ({"beta": "1,-2"}, "beta: -2.0 is not a number from 1e-06"),
        ({"beta": "1,1.0"}, "beta: a value stands twice"),
        ({"beta": ""}, "beta: an empty list"),
        ({"power": "0,9"}, "power: 9.0 is not a number from 0 to 8"),
        ({"rank": "8,1.5"}, "rank: '1.5' is not a whole number"),
        ({"rank_ratio": "0.5,2"}, "rank_ratio: 2.0 is not a number above 0 and at most 1"),
        ({"rank_ratio": "0.5,0.50"}, "stands twice"),
        ({"scale": "frobenius,meen"}, "did you mean 'mean'"),
        ({"rank_rule": "noise-flor"}, "did you mean 'noise-floor'"),
        ({"rank_rule": "fixed"}, "'fixed' needs rank"),
        ({"layers": "upp"}, "layers: 'upp' is neither a role"),
        ({"layers": [3]}, "layers: 3 is neither a role nor a list"),
        ({"beta": [10**400]}, "beta: inf is not a number from"),
        ({"beta": {"a": 1}}, "beta: {'a': 1} is not a number"),
        ({"beta": None}, "beta: None is not a number"),
        ({"rank": [16**9000]}, "rank: a number of thousands of digits"),
        ({"rank": "9" * 6000}, "is not a whole number"),
        ({"scale": [["a"]]}, r"scale: \['a'\] is not a text"),
        ({"scale": {"a": "b"}}, "scale: {'a': 'b'} is not a text"),
        ({"rank_rule": [["a"]]}, r"rank_rule: \['a'\] is not a text"),
        ({"layers": [[["up"]]]}, r"layers: \[\['up'\]\] is neither"),
        ({"layers": {"up": 1}}, "layers: {'up': 1} is neither"),
        ({"layers": "up+"}, r"layers: 'up\+': nothing beside"),
        ({"layers": "+up"}, "nothing beside a '[+]'"),
        ({"layers": "up++gate"}, "nothing beside a '[+]'"),
        ({"layers": "gate+up,up+gate"}, "layers: a value stands twice"),
        ({"bta": [1]}, "unknown option 'bta'; did you mean 'beta'"),
        ({"dtype": "float32"}, "dtype: a sweep scores candidates in the fine-tuned model's own layout"),
    ],
)
def test_a_wrong_list_is_refused_before_anything_is_scored(options, said):
    with pytest.raises(SpecError, match=said):
        make_grid(options)


def test_an_unknown_search_is_refused():
    with pytest.raises(SpecError, match="did you mean 'coordinate'"):
        make_grid({}, "cordinate")


AXES = {"layers": ["up", "gate", "ffn"], "rank_ratio": [0.25, 0.5, 1.0], "beta": [1.0, 1.5, 2.0]}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1), min_size=9, max_size=9))
def test_coordinate_search_finds_the_best_of_a_sum(worths):
    """Where the axes do not interact, one pass along each is enough; and beta comes first, then K, then the roles."""
    worth = dict(zip(itertools.chain(*(AXES[name] for name in ("layers", "rank_ratio", "beta"))), worths, strict=True))
    # 1.0 is both a K and a beta: told apart here
    worth |= {("K", K): w for K, w in zip(AXES["rank_ratio"], worths[3:6], strict=True)}

    def score(candidate):
        params = candidate.params
        return worth[params["layers"][0]] + worth[("K", params["rank_ratio"])] + worth[params["beta"]]

    grid = make_grid(AXES, "coordinate")
    asked = drain(grid, score)
    assert [c.params["beta"] for c in asked[:3]] == AXES["beta"]
    assert [c.params["rank_ratio"] for c in asked[3:6]] == AXES["rank_ratio"]
    assert [c.params["layers"][0] for c in asked[6:9]] == AXES["layers"]
    assert len({c.key for c in asked}) <= grid.size == 7
    best = max(score(c) for c in drain(make_grid(AXES), score))
    assert max(map(score, asked)) == pytest.approx(best)


def test_coordinate_search_goes_on_after_a_candidate_without_a_score():
    asked = drain(make_grid(AXES, "coordinate"), lambda c: None if c.params["beta"] == 1.0 else 0.0)
    assert {c.params["beta"] for c in asked[3:]} == {1.5}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("0.5\n", 0.5),
        ("accuracy: 83.25 %\n", 83.25),
        ("step 3 of 10\nloss = 1.5e-3\n", 1.5e-3),
        ("a -7", -7.0),
        ("score=.25,", 0.25),
        ("sha256 of v2: model3b\n12", 12.0),
        ('{"score": 3}', 3.0),
        ('noise 7\n{"score": -2.5, "metrics": {"f1": 0.5}}\n', -2.5),
        ('{\n "score": 4.0\n}\n', 4.0),
        ("1e-3x 2.5. v1.2.3", 2.5),
        ("loss-5", 5.0),
        ("of 3 0x1f 1_000 7e", 3.0),
        ("1" * 300_000 + "x 5", 5.0),
        ("5 " + "1e-" * 300_000, 5.0),
    ],
)
def test_the_last_number_counts_or_the_score_in_json(text, score):
    assert read_score(text).scored.value == score


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "printed no number"),
        ("done\n", "printed no number"),
        ("0.5\nnan\n", "not a finite number"),
        ("inf", "not a finite number"),
        ('{"score": NaN}', "not a finite number"),
        ('{"score": "0.5"}', "not a finite number"),
        ('{"score": true}', "not a finite number"),
        ('{"accuracy": 0.5}', "without 'score'"),
        ('{"score": 1' + "0" * 400 + "}", "not a finite number"),
        ('{"score": 1, "examples": [1, null]}', "examples is None, not a finite number"),
        ('{"score": 1, "examples": 3}', "'examples' that are no list"),
        ('{"score": 1, "metrics": [3]}', "'metrics' that are no object"),
    ],
)
def test_output_without_a_finite_score_is_an_error_that_says_why(text, said):
    with pytest.raises(ScoreError, match=said):
        read_score(text)


def test_examples_count_where_the_score_is_their_mean():
    said = {"score": 0.75, "examples": [1, 0.5], "metrics": {"f1": 0.25}}
    assert read_score(json.dumps(said)) == Score(Scored(0.75, (1.0, 0.5)), metrics={"f1": 0.25})
    weighted = {"score": 0.9, "examples": [1, 0.5], "weights": [4, 1]}
    assert read_score(json.dumps(weighted)).scored == Scored(0.9, (1.0, 0.5), (4.0, 1.0))
    # In per cent, or of another kind: the score stands, the examples say nothing of it.
    assert read_score(json.dumps({"score": 75, "examples": [1, 0.5]})).scored == Scored(75.0)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_output_gives_a_score_or_a_score_error(text):
    try:
        assert isinstance(read_score(text).scored.value, float)
    except ScoreError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing to score with"),
        ({"score_cmd": "x {model}", "loss": "y"}, "score_cmd and loss exclude each other"),
        ({"score_cmd": "evaluate"}, "has no {model}"),
        ({"loss": "missing.jsonl"}, "missing.jsonl: cannot be read"),
        ({"lm_eval": "arc", "minimize": True}, "minimize: goes with score_cmd"),
        ({"score_cmd": "x {model}", "train_data": "t"}, "train_data: goes with loss"),
        ({"score_cmd": "x {model}", "score_timeout": -1}, "score_timeout"),
        ({"lm_eval": "arc", "batch_size": 0}, "batch_size: 0 is not a whole number"),
        ({"score_cmd": "x {model}", "minimize": "no"}, "minimize: 'no' is not true or false"),
        ({"score_cmd": "x {model}", "score_timeout": True}, "score_timeout: True is not a number of seconds"),
        ({"score_cmd": "x {model}", "score_timeout": float("inf")}, "score_timeout: inf is not"),
        ({"score_cmd": "x {model}", "score_timeout": 10**400}, "score_timeout: 1000"),
        ({"score_cmd": "x {model}", "batch_size": 4}, "batch_size: goes with loss and lm_eval, not with score_cmd"),
        ({"score_cmd": 3}, "score_cmd: 3 is not a text"),
        ({"score_cmd": ""}, "score_cmd: empty; is a variable unset?"),
        ({"loss": ["a"]}, r"loss: \['a'\] is not a text"),
        ({"loss": True}, "loss: True is not a text"),
        ({"loss": "y", "train_data": ["a"]}, r"train_data: \['a'\] is not a text"),
        ({"lm_eval": [1]}, "lm_eval: 1 is not a text"),
        ({"lm_eval": True}, "lm_eval: True is not a text or a list"),
        ({"lm_eval": ","}, "lm_eval: names no task"),
        ({"lm_eval": "arc", "limit": True}, "limit: True is not a whole number"),
    ],
)
def test_scorer_options_at_odds_are_refused(options, said):
    with pytest.raises(SpecError, match=said):
        make_scorer(**options)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2: not JSON"),
        ("[1]", ":2: neither"),
        ('{"prompt": "a"}', ":2: neither"),
        ('{"text": 3}', ":2: neither"),
    ],
)
def test_a_broken_record_is_named_by_its_line(tmp_path, line, said):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a b"}\n' + line + "\n")
    with pytest.raises(SpecError, match=said):
        make_scorer(loss=str(file))
    file.write_text("\n")
    with pytest.raises(SpecError, match="holds no record"):
        make_scorer(loss=str(file))


def test_each_option_makes_its_scorer(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"text": "c"}\n')
    assert make_scorer(score_cmd="x {model}", minimize=True) == CommandScorer("x {model}", True, None)
    assert make_scorer(loss=str(file)) == make_scorer(loss=file) == LossScorer(file)
    assert make_scorer(lm_eval="a, b") == HarnessScorer(("a", "b"))
    before = make_scorer(loss=str(file)).describe()
    file.write_text('{"text": "other"}\n')
    assert make_scorer(loss=str(file)).describe() != before
