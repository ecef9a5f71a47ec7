"""The study: its edits against torch's SVD, its statistics against other libraries, its quick form run twice."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from study import evidence, reward, scoring
from study.cells import RESULTS, Cell, list_cells
from study.edits import FIXED, Edit, Pair, list_wide, pome
from study.evidence import CellResult, Setting, correct_holm, correlate_ranks, judge, pool, read_results
from study.experts import COUNT, find_routes, join_experts, make_mixture, share_moved, split_experts
from study.page import make_page
from study.tuning import make_llama, take
from support.checkpoints import ROOT
from train_poet import run_step

RUN = ROOT / "scripts/study/run"
UP = "model.layers.0.mlp.up_proj.weight"
NAMES = [UP, "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(0)
    shapes = [(24, 16), (16, 24), (16, 16), (16,)]
    base = {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)}
    return Pair(base, {name: weight + 0.1 * torch.randn_like(weight) for name, weight in base.items()})


def value(pair: Pair, edit: Edit) -> torch.Tensor:
    """What takes the place of D, in float64."""
    return (pair.apply(edit)[0][UP] - pair.base[UP]).double()


def test_edits_are_those_of_an_svd_in_float64(pair: Pair) -> None:
    U, S, Vh = torch.linalg.svd(pair.delta(UP).double(), full_matrices=False)
    half = U[:, :8] @ Vh[:8] * S.norm() / math.sqrt(8)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(value(pair, pome("up")), half, **close)
    torch.testing.assert_close(value(pair, pome("up", beta=1.5)), 1.5 * half, **close)
    root = (U * S.sqrt()) @ Vh
    torch.testing.assert_close(value(pair, pome("up", 1.0, power=0.5)), root * S.norm() / root.norm(), **close)
    torch.testing.assert_close(value(pair, Edit("truncate", "up", 0.25)), (U[:, :4] * S[:4]) @ Vh[:4], **close)


def test_equivalence_keeps_the_singular_values_of_the_base_and_the_vectors_of_the_fine_tune(pair: Pair) -> None:
    edited = pair.apply(Edit("equivalence", "up"))[0][UP].double()
    torch.testing.assert_close(
        torch.linalg.svdvals(edited), torch.linalg.svdvals(pair.base[UP].double()), rtol=1e-5, atol=0
    )
    # The nearest of all such matrices: W_ft W_E^T is symmetric and has no negative eigenvalue (von Neumann).
    product = pair.tuned[UP].double().T @ edited
    torch.testing.assert_close(product, product.T, rtol=0, atol=1e-4)
    assert torch.linalg.eigvalsh(product).min() > -1e-4


@pytest.mark.parametrize("bound", [0.05, 0.2])
def test_a_step_departs_as_far_as_its_bound(pair: Pair, bound: float) -> None:
    weights, departure = pair.apply(Edit("step", "ffn", bound=bound))
    assert departure == pytest.approx(bound, rel=1e-3)
    for name in NAMES[:2]:
        assert float((weights[name] - pair.tuned[name]).norm() / pair.delta(name).norm()) == pytest.approx(
            bound, rel=1e-3
        )


def test_controls_have_the_size_of_what_they_control(pair: Pair) -> None:
    D, default = pair.delta(UP), value(pair, pome("up")).float()
    noise = value(pair, Edit("noise", "up")).float() - D
    assert float(noise.norm()) == pytest.approx(float((default - D).norm()), rel=1e-3)
    turned = value(pair, Edit("rotate", "up"))
    singular = torch.linalg.svdvals(turned)
    torch.testing.assert_close(singular[:8], torch.full((8,), float(singular[0])).double(), rtol=1e-4, atol=0)
    assert singular[8] < 1e-5 and float(turned.norm()) == pytest.approx(float(default.norm()), rel=1e-4)
    weights, departure = pair.apply(Edit("scale", "model", beta=1.2))
    assert departure == pytest.approx(0.2)
    assert weights.keys() == pair.tuned.keys()
    torch.testing.assert_close(weights[NAMES[3]], pair.tuned[NAMES[3]] + 0.2 * pair.delta(NAMES[3]))


def test_roles_and_names(pair: Pair) -> None:
    assert pair.select("ffn") == NAMES[:2]
    assert pair.select("without-up") == NAMES[1:3]
    assert not pair.apply(pome("embed"))[0]
    edits = list_wide({"up", "gate", "down"})
    assert len({edit.name for edit in edits}) == len(edits) > 90
    assert set(FIXED) < set(edits) and len(FIXED) == 12


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=30))
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy import stats

    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = correlate_ranks(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def test_holm_correction_agrees_with_hand_computation() -> None:
    # Holm (1979): the smallest times 4, the next times 3, ..., never falling.
    assert correct_holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )


def make_cell(task: str, seed: int, change: float, noise: float, groups: int = 50) -> CellResult:
    dice = torch.Generator().manual_seed(seed)
    tuned = torch.rand(groups, generator=dice)
    edited = tuned + change + noise * torch.randn(groups, generator=dice)
    line = {"train_loss": 0.5, "matrices": []}
    lines = {
        name: {**line, "loss": values.tolist(), "score": float(values.mean())}
        for name, values in {"base": tuned + 1.0, "fine-tuned": tuned, "edit": edited}.items()
    }
    return CellResult(Setting("m", task, "adamw"), seed, lines)


def test_the_interval_of_one_cell_is_that_of_a_paired_mean() -> None:
    cell = make_cell("sums", 3, 0.1, 0.2)
    differences = torch.tensor(cell.lines["edit"]["loss"]) - torch.tensor(cell.tuned["loss"])
    error = float(differences.std() / math.sqrt(50))
    told = judge(cell, ["edit"])["edit"]
    assert told.change == pytest.approx(float(differences.mean()), abs=1e-6)
    assert told.interval[1] - told.interval[0] == pytest.approx(2 * 2.01 * error, rel=0.1)
    assert told.word == "worse"
    pooled = pool([cell], "edit")
    assert pooled is not None and pooled.mean == pytest.approx(told.change, abs=1e-6)
    assert pooled.interval[1] - pooled.interval[0] == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.mark.parametrize(("base", "gained"), [(0.51, False), (0.507, False), (0.53, True), (0.4, False)])
def test_a_gain_counts_from_a_fiftieth_of_the_base_on(base: float, gained: bool) -> None:
    lines = {"base": {"score": base}, "fine-tuned": {"score": 0.5}}
    assert CellResult(Setting("m", "t", "adamw"), 0, lines).has_gained is gained


def test_settings_that_disagree_widen_the_interval() -> None:
    agree = pool([make_cell(str(i), i, 0.0, 0.05) for i in range(6)], "edit")
    apart = pool([make_cell(str(i), i, 0.3 * (-1) ** i, 0.05) for i in range(6)], "edit")
    assert agree and apart
    assert apart.interval[1] - apart.interval[0] > 5 * (agree.interval[1] - agree.interval[0])
    assert apart.fell == 3 and apart.p > 0.3


def with_features(cell: CellResult, **features: float) -> CellResult:
    matrix = {"role": "up"} | dict.fromkeys(evidence.PREDICTORS, 1.0) | features
    return CellResult(cell.setting, cell.seed, {**cell.lines, "fine-tuned": {**cell.tuned, "matrices": [matrix]}})


def test_a_rule_without_data_finds_the_feature_that_tells_good_from_harm() -> None:
    cells = [
        with_features(make_cell("sums", i, -0.2 if i < 3 else 0.2, 0.01), stable_rank=float(i), departure=i % 2)
        for i in range(8)
    ]
    rule = evidence.choose_rule(cells, ["edit"])
    assert rule.feature == "stable_rank" and rule.low == -math.inf and 1.0 <= rule.high < 3.0
    assert [bool(rule.effect(cell)) for cell in cells] == [i <= rule.high for i in range(8)]
    assert "stable rank is at most" in rule.words
    # The half that judges has no say, and where all edits harm nothing is edited.
    judging = [CellResult(Setting("m", "sentiment", "adamw"), cell.seed, cell.lines) for cell in cells[3:]]
    assert evidence.choose_rule([*cells, *judging], ["edit"]) == rule
    assert evidence.choose_rule(cells[3:], ["edit"]).words == "leave every model alone"


def test_calibration_and_compression() -> None:
    sure = torch.tensor([0.95, 0.95, 0.55, 0.55])
    assert scoring.measure_calibration(sure, torch.tensor([1.0, 1.0, 1.0, 0.0])) == pytest.approx((0.1 + 0.1) / 4)
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    rounded = scoring.round_to_bits(weight, 4)
    assert max(len(row.unique()) for row in rounded) <= 15
    step = weight.abs().amax(1, keepdim=True) / 7
    assert ((rounded - weight).abs() <= step / 2 + 1e-6).all()
    pruned = scoring.prune_half(weight)
    assert (pruned != 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert pruned[pruned != 0].abs().min() >= weight[pruned == 0].abs().max()


ROWS = [([5, 6, 7, 8], [-100, -100, 7, 8]), ([9, 8, 7], [-100, 8, 7])]


def test_experts_as_single_matrices_are_those_of_the_model() -> None:
    model = make_mixture(0, 32, 2, 64).eval()
    stacked = take(model)
    single = split_experts(stacked)
    assert set(Pair(single, {name: 1.1 * tensor for name, tensor in single.items()}).roles.values()) == {
        "gate", "up", "down", "q", "k", "v", "o", "embed"
    }  # fmt: skip
    joined = join_experts(single)
    assert joined.keys() == stacked.keys() and all(torch.equal(joined[name], stacked[name]) for name in stacked)
    assert join_experts(stacked).keys() == stacked.keys()
    # An expert's output is linear in its up matrix, and not in its gate.
    x = torch.randn(1, 3, 32)
    once = model.model.layers[0].mlp(x)
    for role, linear in (("up", True), ("gate", False)):
        twice = {name: 2.0 * t if name.endswith(f"{role}_proj.weight") else t for name, t in single.items()}
        scoring.set_weights(model, twice)
        assert torch.allclose(model.model.layers[0].mlp(x), 2.0 * once, rtol=1e-3, atol=0) is linear


def test_routes_are_those_of_the_router() -> None:
    model = make_mixture(0, 32, 2, 64).eval()
    routes = find_routes(model, ROWS)
    assert routes is not None and routes.shape == (2 * 7, COUNT) and (routes.sum(1) == 2).all()
    scoring.set_weights(
        model, take(model), {"model.layers.0.mlp.gate.weight": -take(model)["model.layers.0.mlp.gate.weight"]}
    )
    turned = find_routes(model, ROWS)
    assert turned is not None and not (routes & turned)[:7].any()  # the first layer's choices are the opposite ones
    assert share_moved(routes, routes) == 0.0 and share_moved(turned, routes) >= 0.5
    assert find_routes(make_llama(0, 32, 1), ROWS) is None


def test_reward_makes_the_rewarded_answer_likelier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "STEPS", 30)
    monkeypatch.setattr(reward, "PROMPTS", 2)
    model = make_llama(0, 32, 1)
    rows = [([5, 6, 7], [-100, -100, 7]), ([9, 8, 7], [-100, -100, 7])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    while scoring.score_rows(model, rows).loss.max() > 2.0:  # else no sample is ever right
        optimizer.zero_grad()
        run_step(model, rows, 2, 0, "cpu", True)
        optimizer.step()
    before = scoring.score_rows(model, rows).loss
    reward.train_by_reward(model, rows, 2e-3, 0)
    assert (scoring.score_rows(model.eval(), rows).loss < before - 0.5).all()


def test_samples_follow_the_model() -> None:
    assert reward.split_row(ROWS[0]) == ([5, 6], [7, 8])
    model = make_llama(0, 32, 1).eval()
    drawn = [answer[0] for answer in reward.sample(model, [[5, 6, 7]] * 4000, [1] * 4000)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].float(), 0)
    likely = wanted.topk(20).indices
    seen = torch.bincount(torch.tensor(drawn), minlength=2048)[likely].sum() / 4000
    assert float(seen) == pytest.approx(float(wanted[likely].sum()), abs=0.05)
    assert [len(answer) for answer in reward.sample(model, [[5], [6, 7]], [2, 3])] == [2, 3]


@pytest.mark.parametrize("large", [False, True])
def test_results_hold_the_mean_of_their_losses(large: bool) -> None:
    cells = read_results(RESULTS, large)
    assert cells
    for cell in cells:
        assert {"base", "fine-tuned"} < cell.lines.keys()
        for line in cell.lines.values():
            assert sum(line["loss"]) / len(line["loss"]) == pytest.approx(line["score"], abs=2e-5)


def test_the_study_supports_the_sentence_of_inspect() -> None:
    """`pome inspect` says that the default edit raised the loss more often than it lowered it."""
    pooled = pool(read_results(RESULTS), pome("up").name)
    assert pooled and 2 * pooled.fell < pooled.cells


def test_the_page_is_made_from_the_results() -> None:
    assert make_page(read_results(RESULTS)) == (ROOT / "docs/study.md").read_text()


def test_a_finished_cell_is_not_listed_as_missing() -> None:
    titles = [cell.title for cell in list_cells()]
    assert len(set(titles)) == len(titles)
    assert {file.stem for file in RESULTS.glob("*.jsonl")} <= set(titles)


def test_a_line_without_a_score_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"base": "m", "task": "t", "tuning": "x", "seed": 0, "edit": "e"}))
    with pytest.raises(ValueError, match="lacks score"):
        evidence.read_results(tmp_path)


@pytest.mark.slow
def test_the_quick_cell_gives_the_same_twice() -> None:
    """Nothing is shared by the two runs: each pretrains, fine-tunes and scores."""
    said = []
    for _ in range(2):
        run = subprocess.run([sys.executable, RUN, "--quick"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        said.append([line for line in run.stdout.splitlines() if not line.startswith("pretraining")])
    assert said[0] == said[1]
    assert [line.split(": loss")[0] for line in said[0]] == ["base", "fine-tuned", FIXED[0].name, FIXED[-1].name]


def test_cells_have_titles_that_are_file_names() -> None:
    assert Cell("llama-4m", "sums", "adamw", 0).path.name == "llama-4m.sums.adamw.0.fixed.jsonl"
