"""Jobs of a batch run whole by workers on a Ray cluster, each as `pome batch` would run it here."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.cli.batch import Job, run_job
from pome.cli.console import complain, describe_error, make_console
from pome.config.spec import EditSpec
from pome.errors import ClusterError, SpecError, printable
from pome.planning.split import count_cores

if TYPE_CHECKING:
    from pome.engines.ray import Lost

Result = dict[str, Any]


@dataclass(frozen=True)
class BatchJob:
    """Common part of all jobs: the folder that their relative paths start from."""

    folder: str
    quiet: bool

    def open(self, device: str, threads: int) -> BatchJob:
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise ClusterError(
                f"a node does not see the working folder {printable(self.folder, 1000)}: {error.strerror}; run the "
                "batch from a folder that all nodes share"
            ) from None
        return self

    def read(self, unit: Job) -> None:
        """Nothing: a job reads for itself."""

    def work(self, unit: Job, data: None) -> tuple[Result, str]:
        """Result of a job, and its messages."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            return run_job(unit, make_console(self.quiet)), said.getvalue()

    def flush(self) -> None:
        """Nothing: a job syncs what it writes."""


def run_on_ray(jobs: Sequence[Job], address: str | None, at_once: int | None, quiet: bool) -> Iterator[Result]:
    """The results of all jobs, as they come, at most `at_once` of them running; what each said goes to stderr."""
    from pome.editing.remote import make_cluster
    from pome.engines.ray import RayEngine

    for job in jobs:
        if job.engine == "ray":
            raise SpecError(
                f"{printable(job.name)}: has the engine ray itself, inside a batch on Ray; give one of the two"
            )
    spec = EditSpec(engine="ray", ray_address=address)
    cluster = make_cluster(spec, count_cores(), 0, at_once, ahead=1)
    cluster = dataclasses.replace(cluster, patient=False, apart=True)
    outs = [Path(os.path.abspath(job.folder)) for job in jobs if job.writes]
    shared = next((folder for out in outs[:1] for folder in out.parents if folder.is_dir()), None)
    probe = shared / f".pome-probe-{os.getpid()}" if shared else None
    with RayEngine(cluster, BatchJob(os.getcwd(), quiet), _list_inputs(jobs), probe) as engine:
        names = [f"job {job.name}" for job in jobs]
        for job, (result, said) in _match(jobs, engine.map(jobs, [1.0] * len(jobs), names)):
            sys.stderr.write(said)
            if "matrices" in result and not (job.folder / MANIFEST_NAME).is_file():
                error = "its OUT is not here: the node wrote to storage of its own; give an OUT that all nodes share"
                result = {**result, "status": "failed", "error": error}
            yield result


def _match(jobs: Sequence[Job], found: Iterator[tuple[Result, str] | Lost]) -> Iterator[tuple[Job, tuple[Result, str]]]:
    """Each job with its result and what it said; one whose workers died has failed."""
    by_name = {job.name: job for job in jobs}
    for item in found:
        if isinstance(item, tuple):
            yield by_name[item[0]["name"]], item
        else:
            job, error = jobs[item.number], describe_error(item.error)
            complain(error)
            yield job, ({**job.begin(), "status": "failed", "error": error}, "")


def _list_inputs(jobs: Sequence[Job]) -> list[Path]:
    """Files of the jobs' inputs on this machine, which every node must see."""
    found: list[Path] = []
    for source in {side for job in jobs for side in (job.base, job.fine_tuned) if side}:
        path = Path(os.path.expanduser(source))
        found += [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return found
