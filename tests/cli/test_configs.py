"""Every file in configs/ is a batch that the tool accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pome.cli.batch import read_batch

FILES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
CONFIGS = [path for path in FILES if not path.stem.startswith("sweep-")]
ABLATION = ("sweep-ablation-equalized", "sweep-ablation-truncated")
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
        for job in read_batch(path, variables={**given, **more}):
            jobs[f"{path.stem}-{job.name}" if path.stem == "sweep-ablation" else path.stem] = job
    assert jobs.keys() == {"sweep-rank", "sweep-roles", "sweep-beta", "sweep-truncation", *ABLATION}
    grids = {name: job.grid for name, job in jobs.items()}
    truncated = grids["sweep-truncation"].axes
    assert [choice["rank_ratio"] for choice in truncated["cuts"]] == [0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
    assert (truncated["power"], truncated["scale"]) == ((1.0,), ("unit",))
    equalized, alone = (grids[name].axes for name in ABLATION)
    assert [choice["rank_ratio"] for choice in equalized["cuts"]] == [0.5, 1.0] and equalized["power"] == (0.0,)
    assert (alone["cuts"], alone["power"], alone["scale"]) == (({"rank_ratio": 0.5},), (1.0,), ("unit",))
    ranks = grids["sweep-rank"].axes["cuts"]
    assert [choice["rank_ratio"] for choice in ranks] == [0.25, 0.5, 0.75, 1.0]
    assert grids["sweep-rank"].axes["beta"] == (1.0,)
    assert grids["sweep-roles"].layers[-1] == ("ffn",) and grids["sweep-roles"].size == 8
    assert grids["sweep-beta"].size == len(grids["sweep-beta"].axes["beta"]) == 8
    assert jobs["sweep-beta"].scorer.describe()["train_data"] is not None
