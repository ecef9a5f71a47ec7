"""Models of a sweep made and scored by workers on a Ray cluster, each in a copy of its own on the shared storage."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pome.checkpoint.source import Checkpoint
from pome.editing.remote import make_cluster
from pome.editing.session import Opened, open_pair
from pome.engines.ray import RayEngine
from pome.output.staging import Staging
from pome.planning.split import count_cores
from pome.sweeping.grid import Candidate, Grid
from pome.sweeping.models import Attempt, Models
from pome.sweeping.scorers.base import FolderScorer, ModelScorer
from pome.sweeping.sweep import make_plans, share_spec

Model = tuple[str, Candidate | None]  # its key, and its candidate; None for the two models that are not edited
WORKERS = "workers"  # the folder of the workers' copies


@dataclass(frozen=True)
class ScoreJob:
    """Inputs and options that all models of a sweep share; `folder` is the sweep's."""

    base: str
    ft: str
    grid: Grid
    scorer: FolderScorer | ModelScorer
    folder: Path

    def open(self, device: str, threads: int) -> ScoreExecutor:
        import torch

        torch.set_num_threads(threads)
        return ScoreExecutor(self, device)


class ScoreExecutor:
    """One worker: the pair, and the copy that it makes its models in."""

    def __init__(self, job: ScoreJob, device: str) -> None:
        self._stack = contextlib.ExitStack()
        opened = self._stack.enter_context(
            open_pair(job.base, job.ft, share_spec(job.grid), whole=True, whole_base=True)
        )
        folder = job.folder / WORKERS / f"{socket.gethostname()}-{os.getpid()}"
        staging = self._stack.enter_context(Staging(folder, {}, fresh=True, suffix=""))
        plans = make_plans(opened, job.grid)
        self.models = Models(opened, plans, job.scorer, staging, device, job.folder / "decompositions")

    def read(self, unit: Model) -> None:
        """Nothing: a model reads its matrices while it is made."""

    def work(self, unit: Model, data: None) -> tuple[str, Attempt]:
        return unit[0], self.models.attempt(*unit)

    def flush(self) -> None:
        """Nothing: a score is all that is kept."""


class RemoteScores:
    """The workers of one sweep; a context manager."""

    def __init__(
        self, opened: Opened, grid: Grid, scorer: FolderScorer | ModelScorer, folder: Path, at_once: int | None
    ) -> None:
        self._folder = folder
        base, ft = (_find_source(side) for side in (opened.base, opened.ft))
        shared = dataclasses.replace(grid.shared, engine="local", ray_address=None)
        job = ScoreJob(base, ft, dataclasses.replace(grid, shared=shared), scorer, folder)
        memory = opened.plan.memory
        if hasattr(scorer, "score_model"):
            memory += sum(weights.file.size for weights in opened.ft.files.values())
        cluster = dataclasses.replace(make_cluster(grid.shared, count_cores(), memory, at_once, ahead=1), patient=False)
        paths = [weights.file.stored for side in (opened.base, opened.ft) for weights in side.files.values()]
        self._ray = RayEngine(cluster, job, [path for path in paths if path], folder / "probe")

    def __enter__(self) -> RemoteScores:
        shutil.rmtree(self._folder / WORKERS, ignore_errors=True)  # of an earlier run
        self._ray.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.__exit__()
        shutil.rmtree(self._folder / WORKERS, ignore_errors=True)

    @property
    def workers(self) -> int:
        return self._ray.placed.workers

    def map(self, models: list[Model]) -> Iterator[tuple[str, Attempt]]:
        """The attempts at all models, in the order in which they finish."""
        return self._ray.map(models, [1.0] * len(models), [f"model {candidate or key}" for key, candidate in models])


def _find_source(side: Checkpoint) -> str:
    """Path of a side for other machines: its snapshot, if it comes from the Hub."""
    return str(side.folder or os.path.abspath(os.path.expanduser(side.source)))
