"""Every file in configs/ is a batch that the tool accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pome.jobs import read_batch

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))


def test_there_is_one_for_each_setting_of_the_paper() -> None:
    assert {path.stem for path in CONFIGS} >= {"llama2-7b", "llama3-8b", "gemma2-9b", "rl-tuned"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_a_batch_of_the_papers_edit(path: Path) -> None:
    for job in read_batch(path):
        assert job.spec.layers == ("up",)
        assert job.spec.rank_ratio == 0.5
        assert job.spec.scale == "frobenius"
        assert 1.0 <= job.spec.beta <= 2.5
