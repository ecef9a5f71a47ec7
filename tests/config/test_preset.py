"""Presets: what they stand for, and what stands above them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pome.choices import PRESETS
from pome.cli.batch import list_job_keys
from pome.cli.commands.edit import EditJob
from pome.cli.commands.extract import ExtractJob
from pome.config.extraction import ExtractSpec
from pome.config.spec import EditSpec
from pome.config.yaml_text import make_spec
from pome.errors import SpecError

PAPER = EditSpec(layers=("up",), rank_ratio=0.5, scale="frobenius", beta=1.5)


def test_paper_is_its_options() -> None:
    assert EditSpec.from_given({"preset": "paper"}) == PAPER
    assert make_spec(None, {"preset": "paper"}, EditSpec) == PAPER
    assert EditSpec.from_mapping(PAPER.to_mapping()) == PAPER
    assert "preset" not in PAPER.to_mapping()


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "layers": st.just(("down",)),
        "beta": st.floats(0.1, 3.0),
        "scale": st.sampled_from(["unit", "rms"]),
        "power": st.floats(0.0, 1.0),
        "dtype": st.just("float32"),
    },
)
NUMBERS = st.one_of(
    st.just({}),
    st.builds(lambda k: {"rank": k}, st.integers(1, 99)),
    st.builds(lambda e: {"energy": e}, st.floats(0.1, 1.0)),
    st.builds(lambda r: {"rank_ratio": r}, st.floats(0.1, 1.0)),
    st.just({"rank_rule": "noise-floor"}),
)


@given(OPTIONS, NUMBERS)
def test_options_that_are_given_win(options: dict[str, Any], number: dict[str, Any]) -> None:
    """Without the preset, the same options over the preset's own give the same edit."""
    spelled = {key: value for key, value in PRESETS["paper"].options.items() if not (number and key == "rank_ratio")}
    chosen = {**options, **number}
    assert EditSpec.from_given({"preset": "paper", **chosen}) == EditSpec.from_mapping({**spelled, **chosen})


def test_a_preset_in_a_file_lies_below_the_file_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("preset: paper\nscale: unit\n")
    spec = make_spec(tmp_path / "a.yaml", {"rank": 7}, EditSpec)
    assert spec == EditSpec(layers=("up",), rank=7, scale="unit", beta=1.5)
    (tmp_path / "b.yaml").write_text("scale: unit\nbeta: 3.0\n")
    assert make_spec(tmp_path / "b.yaml", {"preset": "paper"}, EditSpec) == EditSpec(scale="unit", beta=3.0)


def test_a_job_of_a_batch_takes_a_preset() -> None:
    assert "preset" in list_job_keys("edit") and "preset" not in list_job_keys("sweep")
    values = {"base": "a", "fine_tuned": "b", "out": "c", "preset": "paper", "beta": 2.0}
    assert EditJob.read(values, values).spec == EditSpec(beta=2.0)


def test_an_unknown_preset_is_refused_with_the_line_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="preset: 'papr' is not one of paper; did you mean 'paper'"):
        EditSpec.from_given({"preset": "papr"})
    (tmp_path / "a.yaml").write_text("beta: 1.0\npreset: papr\n")
    with pytest.raises(SpecError, match="a.yaml:2: preset: 'papr' is not one of paper"):
        make_spec(tmp_path / "a.yaml", {}, EditSpec)


def test_a_preset_is_refused_with_the_other_method() -> None:
    with pytest.raises(SpecError, match="preset: has no effect with method 'equivalence'"):
        EditSpec.from_given({"preset": "paper", "method": "equivalence"})


def test_a_file_of_an_extraction_has_the_options_of_an_extraction(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"rank": 4, "save_modules": True}))
    assert make_spec(tmp_path / "a.yaml", {}, ExtractSpec) == ExtractSpec(rank=4, save_modules=True)
    (tmp_path / "a.yaml").write_text("rank: 4\npreset: paper\n")
    with pytest.raises(SpecError, match="a.yaml:2: unknown .*preset"):
        make_spec(tmp_path / "a.yaml", {}, ExtractSpec)
    (tmp_path / "a.yaml").write_text("rank: 4\nsave_modules: 3\n")
    with pytest.raises(SpecError, match="a.yaml:2: save_modules: 3"):
        make_spec(tmp_path / "a.yaml", {}, ExtractSpec, ExtractJob.check)
    (tmp_path / "a.yaml").write_text("rank: 4\nsave_modulez: true\n")
    with pytest.raises(SpecError, match="a.yaml:2: unknown .*did you mean 'save_modules'"):
        make_spec(tmp_path / "a.yaml", {}, ExtractSpec)
