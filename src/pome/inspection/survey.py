"""Survey of a pair for `pome inspect`: spectra, norms and noise of every selected matrix. Nothing is written."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pome.choices import ROLES
from pome.config.spec import EditSpec
from pome.editing.session import Source, open_pair
from pome.inspection.records import Matrix, Survey
from pome.manifest import KeptRecord
from pome.output.progress import Progress
from pome.planning.split import count_cores
from pome.planning.units import Unit

if TYPE_CHECKING:
    from pome.editing.lora_merge import Data

EVERYTHING = EditSpec(layers=ROLES)


def survey(
    base: Source, ft: Source, spec: EditSpec = EVERYTHING, progress: Progress | None = None, weights: bool = False
) -> Survey:
    """Spectra, norms and noise floors of the selected matrices of a pair, a record for each.

    Memory holds one matrix at a time, besides the singular values of all.

    Args:
        base, ft: as in `edit`.
        spec: its layers, exclusions, device, and options that choose k count; the rest is ignored. By default every
            matrix whose role is known is measured.
        progress: is told what happens; its task is `survey`.
        weights: measure the weights too, each fan_out x fan_in: of BASE, of FT, and of two edits before they are
            rounded to a dtype, the equalized one by `spec` (its rule for k, scale, beta and power) and W_E of the
            method `equivalence`. `Matrix.weights` then has their spectral drift, norm(s(W) - s(W_base)) /
            norm(W_base), a number of at least 0, and their hyperspherical energy (arXiv 1805.09298), the mean over
            pairs of rows of 1 / the distance of their directions, a number of at least 1/2; both dimensionless.

    Raises:
        CheckpointError, PairingError, SelectionError: as `edit` does.
        NumericalError: NaN or infinity in a selected matrix of either side; a matrix that no solver could be
            certified for.
    """
    from pome.editing.lora_merge import read_unit
    from pome.editing.unit import list_devices
    from pome.editing.workers import map_on_devices
    from pome.inspection.measure import measure_unit

    progress = progress or Progress()
    spec = dataclasses.replace(spec, allow_missing=True)  # looking leaves nothing undone
    with open_pair(base, ft, spec) as opened:
        devices = list_devices(spec.device)
        units = [unit for unit in opened.plan.units if unit.parts]
        progress.begin(opened.plan, opened.ft, devices, 0)
        progress.start("survey", len(units), sum(unit.work for unit in units))

        def read(unit: Unit) -> Data:
            return read_unit(unit, opened.ft, opened.base)

        def work(unit: Unit, data: Data, device: str) -> tuple[Unit, list[Matrix | KeptRecord]]:
            return unit, measure_unit(unit, data, spec, device, weights)

        found: dict[str, list[Matrix | KeptRecord]] = {}
        for unit, records in map_on_devices(units, devices, count_cores(), read, work):
            found[unit.key] = records
            progress.advance("survey", 1, unit.nbytes + unit.base_nbytes, unit.name, unit.work)
        progress.finish("survey")
        for side in (opened.base, opened.ft):
            side.check_unchanged()
        records = [record for unit in units for record in found[unit.key]]
        kept = [KeptRecord(item.name, item.part, item.reason) for item in opened.plan.kept]
        return Survey(
            opened.base.source,
            opened.ft.source,
            tuple(record for record in records if isinstance(record, Matrix)),
            (*kept, *(record for record in records if isinstance(record, KeptRecord))),
        )
