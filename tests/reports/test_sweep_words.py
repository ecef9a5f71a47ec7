"""The verdict of a sweep in words: what it found, where the grid should go on, what has no score."""

from __future__ import annotations

import re

import pytest

from pome.reports.sweep import make_page
from pome.reports.sweep_words import describe_outcome
from pome.sweeping.grid import FINE_TUNED, make_grid, walk
from pome.sweeping.ranking import rank_trials
from pome.sweeping.scorers.base import Score, Scored
from pome.sweeping.scorers.command import CommandScorer
from pome.sweeping.trials import Outcome, Trial
from support.browser import open_page, read_attribute

EXAMPLES = 400


def rate(right: int) -> Score:
    """The accuracy of a model that answers the first `right` of the examples."""
    return Score(Scored(right / EXAMPLES, tuple(float(i < right) for i in range(EXAMPLES))))


def make_outcome(options: dict, rights: list[int | None], reference: int = 200, minimize: bool = False) -> Outcome:
    """A sweep over `options` whose candidates, in the grid's order, answer so many examples; None failed."""
    grid = make_grid(options)
    trials = [Trial(FINE_TUNED, "fine-tuned", None, rate(reference), None, 1.0)]
    for candidate, right in zip(next(walk(grid)), rights, strict=True):
        score, failed = (None, "exit status 3") if right is None else (rate(right), None)
        trials.append(Trial(candidate.key, candidate.label, candidate, score, failed, 1.0))
    ranked, beats = rank_trials(trials, rate(reference), minimize)
    return Outcome(ranked, ranked[0], beats, minimize, {}, grid.to_mapping(), None, 0)


BETAS = {"beta": [0.5, 1.0, 1.5]}


@pytest.mark.parametrize(
    ("rights", "verdict"),
    [
        ([200, 260, 210], "is better than the fine-tuned model beyond noise"),
        ([199, 201, 200], "Nothing beats the fine-tuned model beyond noise"),
        ([150, 199, 120], "Every candidate scores worse than the fine-tuned model"),
        ([150, 200, 120], "Nothing beats the fine-tuned model beyond noise"),
    ],
)
def test_the_verdict_comes_first(rights, verdict):
    assert verdict in describe_outcome(make_outcome(BETAS, rights))[0]


def test_the_verdict_knows_that_less_is_better():
    assert describe_outcome(make_outcome(BETAS, [250, 220, 240], minimize=True))[0].startswith("Every candidate scores")


@pytest.mark.parametrize(
    ("options", "rights", "advice"),
    [
        (BETAS, [200, 220, 240], "try --beta above 1.5."),
        (BETAS, [240, 220, 200], "try --beta below 0.5."),
        (BETAS, [220, 240, 200], None),
        ({"rank_ratio": [0.5, 1.0]}, [210, 240], None),  # there is no share above 1
        (
            {"rank_ratio": [0.5, 1.0], **BETAS},
            [200, 200, 240, 200, 200, 200],
            "try --rank-ratio below 0.5 and --beta above 1.5.",
        ),
        ({"rank": [8, 16]}, [210, 240], "try --rank above 16."),
        ({"power": [0.0, 1.0]}, [240, 210], None),  # nor a power below 0
        (BETAS, [200, 200, 200], None),  # no value is better than another
        (BETAS, [None, 240, 220], None),
    ],
)
def test_a_best_at_the_edge_of_the_grid_says_which_way_to_go_on(options, rights, advice):
    said = [line for line in describe_outcome(make_outcome(options, rights)) if "edge of the grid" in line]
    assert (advice in said[0]) if advice else not said


def test_failures_come_last_and_say_what_failed():
    lines = describe_outcome(make_outcome(BETAS, [None, 240, None]))
    assert [line for line in lines if line.endswith("no score: exit status 3")] == lines[-2:]


# Across the page: its own width, what is cut, and whether the line at zero stays beside the words on a phone.
MEASURE = """
  const root = document.documentElement;
  const cut = (node) => node.scrollWidth > node.clientWidth + 1;
  root.dataset.wide = document.body.scrollWidth;
  root.dataset.cut = [...document.querySelectorAll("h1, p, li, dd, pre, button")].filter(cut).length;
  root.dataset.rows = document.querySelectorAll(".models tbody tr").length;
  root.dataset.ink = getComputedStyle(document.body).color + getComputedStyle(document.body).backgroundColor;
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_of_a_sweep_in_a_browser(tmp_path, width, dark):
    outcome = make_outcome({"rank_ratio": [0.25, 0.5, 1.0], **BETAS}, [180, 200, 240, 190, 210, 230, None, 170, 205])
    page = tmp_path / "sweep.html"
    made = make_page(outcome, CommandScorer("score {model}", False, None), "base", "ft", "out")
    # It has no script and forbids itself any, and so this one.
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", made))
    dom = open_page(page, width, dark=dark, script=MEASURE)
    assert int(read_attribute(dom, "data-wide")) <= width
    assert read_attribute(dom, "data-cut") == "0"
    assert read_attribute(dom, "data-rows") == "11"  # the head, nine candidates and the fine-tuned model
    ink, paper = (int(value) for value in re.findall(r"rgb\((\d+)", read_attribute(dom, "data-ink")))
    assert (ink > paper) == dark
    heading = re.sub(r"<[^>]*>", "", re.search(r"<h1.*?</h1>", dom, re.S)[0])
    assert "is better than the fine-tuned model beyond noise" in heading
    assert dom.count('class="zero"') == 8 and "no score: exit status 3" in re.sub(r"<[^>]*>", "", dom)
