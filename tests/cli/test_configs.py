"""Every file in configs/ is a batch that the tool accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pome.cli.batch import read_batch

FILES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
CONFIGS = [path for path in FILES if not path.stem.startswith("sweep-")]
SWEEPS = [path for path in FILES if path.stem.startswith("sweep-")]


def test_there_is_one_for_each_setting_of_the_paper() -> None:
    assert {path.stem for path in CONFIGS} >= {"llama2-7b", "llama3-8b", "gemma2-9b", "rl-tuned"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_a_batch_of_the_papers_edit(path: Path) -> None:
    for job in read_batch(path):
        assert job.spec.layers == ("up",)
        assert job.spec.rank_ratio == 0.5
        assert job.spec.scale == "frobenius"
        assert 1.0 <= job.spec.beta <= 2.5


def test_there_is_one_for_each_of_the_papers_first_experiments(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    given = {"base": "b", "fine_tuned": "f", "data": str(data)}
    jobs = {}
    for path in SWEEPS:
        more = {"train": str(data)} if path.stem == "sweep-beta" else {}
        (jobs[path.stem],) = read_batch(path, variables={**given, **more})
    assert jobs.keys() == {"sweep-rank", "sweep-roles", "sweep-beta"}
    grids = {name: job.grid for name, job in jobs.items()}
    ranks = grids["sweep-rank"].axes["cuts"]
    assert [choice["rank_ratio"] for choice in ranks] == [0.25, 0.5, 0.75, 1.0]
    assert grids["sweep-rank"].axes["beta"] == (1.0,)
    assert grids["sweep-roles"].layers[-1] == ("ffn",) and grids["sweep-roles"].size == 8
    assert grids["sweep-beta"].size == len(grids["sweep-beta"].axes["beta"]) == 8
    assert jobs["sweep-beta"].scorer.describe()["train_data"] is not None
