"""Edit of units by workers on other machines: what a worker needs, as paths and options, and what it does with a unit.

A worker reads its ranges of BASE and FT, writes the patch into the staging folder, syncs it, and returns the record.
It journals nothing and publishes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pome.checkpoint.source import Location, find_location
from pome.config.spec import EditSpec
from pome.editing.lora_merge import Data, make_patch, read_unit
from pome.editing.session import Opened
from pome.editing.ties import check_copies
from pome.editing.unit import FindCache, Patch
from pome.engines.ray import Cluster, RayEngine
from pome.errors import ClusterError
from pome.output.staging import Staging
from pome.output.weight_files import WeightFiles
from pome.planning.split import count_cores
from pome.planning.units import Unit


@dataclass(frozen=True)
class EditJob:
    """Inputs and options of all units of one edit. `merges`: FT is an adapter, and the output begins as BASE."""

    base: Location
    ft: Location
    merges: bool
    output: Path
    spec: EditSpec
    cores: int  # over which the run splits its units
    find_cache: FindCache | None

    def open(self, device: str, threads: int) -> EditExecutor:
        """An executor on `device`. Raises ClusterError where torch does not see it."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ClusterError(
                f"device: a node offers a GPU to Ray that its torch {torch.__version__} does not see; install torch "
                "for CUDA there, or use --device cpu",
                options=["device"],
            )
        return EditExecutor(self, "cuda:0" if device == "cuda" else device)


class EditExecutor:
    """Units edited by one worker, with its own open files."""

    def __init__(self, job: EditJob, device: str) -> None:
        self.job = job
        self.device = device
        self.base = job.base.open()
        self.ft = job.ft.open()
        self.weights = self.base if job.merges else self.ft
        self.files = WeightFiles(job.output)
        self.files.pin()

    def read(self, unit: Unit) -> Data:
        return read_unit(unit, self.ft, self.base)

    def work(self, unit: Unit, data: Data) -> Patch:
        # The last bits depend on the number of threads, and must be those of the local engine.
        torch.set_num_threads(unit.count_threads(self.job.cores) if self.device == "cpu" else self.job.cores)
        check_copies(unit, self.weights)
        patch = make_patch(unit, data, self.job.spec, self.device, self.job.find_cache)
        if patch.data is not None:
            for file, start in unit.places:
                self.files.write(file, patch.data, start)
        return dataclasses.replace(patch, data=None)

    def flush(self) -> None:
        self.files.sync()


class RemoteEdit:
    """The workers of one edit; a context manager."""

    def __init__(self, opened: Opened, spec: EditSpec, staging: Staging, find_cache: FindCache | None) -> None:
        base, ft = (find_location(side, spec.dequantize) for side in (opened.base, opened.ft))
        merges = opened.template.weights is opened.base
        cores = staging.cores or count_cores()
        slot = max((unit.count_threads(cores) for unit in opened.plan.units), default=1)
        job = EditJob(base, ft, merges, staging.output, spec, cores, find_cache)
        paths = [*base.paths.values(), *ft.paths.values()]
        self._ray = RayEngine(
            make_cluster(spec, slot, opened.plan.expect_memory(1)), job, paths, staging.folder / "probe"
        )

    def __enter__(self) -> RemoteEdit:
        self._ray.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.__exit__()

    @property
    def devices(self) -> list[str]:
        return [self._ray.placed.describe()]

    @property
    def start_seconds(self) -> float:
        """Until the first worker was ready to work."""
        return self._ray.start_seconds

    @property
    def is_spread(self) -> bool:
        """Whether others than this machine write, so that its memory of a file may be older than the file."""
        return self._ray.placed.hosts > 1

    def describe_losses(self) -> list[str]:
        """Notices at the end of a map: lost workers, and nodes that were not used."""
        lost, given = self._ray.stats.get("lost", 0), self._ray.stats.get("given", 0)
        said = f"{lost} workers of Ray were lost; no unit was given out more than {given} times"
        return [*self._ray.notes, *([said] if lost else [])]

    def map(self, units: Sequence[Unit]) -> Generator[Patch, None, None]:
        """The patches of all units, without their bytes, which are in the staging folder; raises as RayEngine.map."""
        return self._ray.map(units, [unit.work for unit in units], [f"tensor {unit.name}" for unit in units])


def make_cluster(spec: EditSpec, threads: int, memory: int, at_once: int | None = None, ahead: int = 2) -> Cluster:
    """The cluster for a spec's units, with workers of so many cores on CPUs, and of so much memory."""
    return Cluster(spec.ray_address, spec.device, threads, memory, at_once, ahead)
