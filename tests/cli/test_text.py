"""Texts on the terminal: wrapped between words, names between their parts, durations."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pome.cli.tables.text import count_noun, show_clock, show_seconds, wrap_message, wrap_name

# Without digits, which stay with their units.
WORDS = st.lists(st.text(st.characters(codec="ascii", categories=["L", "P"]), min_size=1, max_size=30), min_size=1)


@given(WORDS, st.integers(10, 120))
def test_no_word_of_a_message_is_broken(words: list[str], width: int) -> None:
    wrapped = wrap_message(" ".join(words), width)
    assert wrapped.split() == words
    for line in wrapped.split("\n"):
        assert len(line) <= width or len(line.split()) == 1


def test_a_number_stays_with_its_unit() -> None:
    text = "to read 10.2 kB, written in 2.5 s, 50 % of it, on 3 matrices"
    for width in range(8, 60):
        lines = wrap_message(text, width).split("\n")
        for whole in ("10.2 kB", "2.5 s", "50 %"):
            assert any(whole in line for line in lines)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_command_can_be_copied_from_the_screen(width: int) -> None:
    command = ["pome", "edit", "/a/long/path/to/a/base", "my ft", "out", "--layers", "up", "--exclude", "a|b"]
    wrapped = wrap_message(f"  {shlex.join(command)}", width)
    assert shlex.split(wrapped.replace("\\\n", " ")) == command
    assert all(line.endswith(" \\") for line in wrapped.split("\n")[:-1])


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=80), st.integers(1, 60))
def test_a_name_in_lines_is_the_name(name: str, width: int) -> None:
    lines = wrap_name(name, width).split("\n")
    assert "".join(lines) == name and max(map(len, lines)) <= width


def test_a_name_breaks_between_its_parts() -> None:
    name = "bert.embeddings.position_embeddings"
    assert wrap_name(name, 24).split("\n") == ["bert.embeddings.", "position_embeddings"]
    assert wrap_name(name, 35) == name


def test_durations_and_counts() -> None:
    assert [show_seconds(s) for s in (0.04, 99.9, 99.96, 200, 3600, 3900.4)] == [
        "0.0 s", "99.9 s", "1 min 40 s", "3 min 20 s", "1 h 0 min", "1 h 5 min"
    ]  # fmt: skip
    assert [show_clock(s) for s in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
    assert (count_noun(1, "difference"), count_noun(2, "difference")) == ("1 difference", "2 differences")
    assert (count_noun(1, "matrix", "matrices"), count_noun(0, "matrix", "matrices")) == ("1 matrix", "0 matrices")
