"""`pome sweep`: score a grid of edits, write the best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pome.cli.batch import Job, read_name, read_sides
from pome.cli.console import make_console, print_lines, show_progress, write_document
from pome.cli.options import Argument, AsJson, Base, Config, FineTuned, Given, Quiet
from pome.cli.outputs import accept_finished, check_upload, push, report_edit
from pome.config.conflicts import merge_options
from pome.config.options import OUTPUT, RUN, Option, find_options, pick_options
from pome.config.outputs import Publication, Replacing, Reports
from pome.config.spec import EditSpec, check_alone
from pome.config.yaml_text import read_config
from pome.errors import SpecError, printable
from pome.sweeping.grid import LISTED, Grid, make_grid
from pome.sweeping.scorers.base import FolderScorer, ModelScorer
from pome.sweeping.scorers.options import make_scorer

if TYPE_CHECKING:
    from rich.console import Console

    from pome.manifest import Manifest
    from pome.sweeping.trials import Outcome

EXAMPLES = (
    "pome sweep ./base ./ft ./out --rank-ratio 0.25,0.5,1 --loss held-out.jsonl",
    "pome sweep ./base ./ft ./out --beta 1,1.5 --score-cmd 'python eval.py {model}'",
    "pome sweep ./base ./ft ./out --layers up,gate+down --lm-eval gsm8k",
)


def run(
    base: Base,
    ft: FineTuned,
    out: Annotated[str, Argument("OUT", "Folder to make, of the best.")],
    given: Given,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score many edits of one pair, and write the best to OUT if it beats FT beyond noise.

    Exit status: 0 done, whether OUT was written or not (`written` in --json); 1 an error; 2 usage; 130 interrupted, and
    the same command goes on.
    """
    file = read_config(config, SweepJob.check) if config else {}
    sides = {"base": base, "fine_tuned": ft, "out": out}
    job = SweepJob.read({**merge_options(file, given), **sides}, given)
    console = make_console(quiet)
    outcome = make_sweep(job, Path(out), console)
    if as_json:
        done = f"{printable(out)} is complete, but " if outcome.manifest else ""
        write_document([json.dumps(outcome.to_json(), indent=1, allow_nan=False), "\n"], done)
    if outcome.manifest is not None:
        push(Path(out), job.publication, console)


@dataclass(frozen=True)
class SweepJob(Job):
    """A sweep as asked for: its grid, its scorer, when its best is written, and what is written beside it."""

    grid: Grid
    scorer: FolderScorer | ModelScorer
    publication: Publication
    replacing: Replacing
    reports: Reports
    write_best: Annotated[bool, Option("Write the best even if it is no better than FT.", group=OUTPUT)] = False
    retry_failed: Annotated[
        bool, Option("Score again what had no score in an earlier run.", group=RUN, everyday=False)
    ] = False
    at_once: Annotated[
        int | None,
        Option("Score at most N models at once, with engine ray.", metavar="N", group=RUN, everyday=False),
    ] = None
    writes: ClassVar[bool] = True

    @staticmethod
    def check(key: str, value: Any) -> None:
        if key in LISTED and isinstance(value, (list, str)):
            make_grid({key: value, **({"rank": 1} if key == "rank_rule" else {})})
        else:
            check_alone(key, value)

    @classmethod
    def read(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> SweepJob:
        """A sweep from its options by name: lists of edit's, and its own. Raises SpecError."""
        base, fine_tuned, out = read_sides(values)
        scorer = {key: value for key, value in pick_options(values, make_scorer).items() if value is not None}
        own = {key: find_options(cls)[key].check(value) for key, value in pick_options(values, cls).items()}
        grid = make_grid(pick_options(values, EditSpec), values.get("search", "grid"))
        if own.get("at_once") is not None and grid.shared.engine != "ray":
            said = "at_once: has no effect without engine 'ray'; give both or neither"
            raise SpecError(said, options=["at_once", "engine"])
        publication = Publication(**pick_options(values, Publication))
        replacing = Replacing(**pick_options(values, Replacing))
        return cls(
            read_name(values, f"sweep {out}"), "sweep", base, fine_tuned, out,
            grid, make_scorer(**scorer),
            publication, replacing, Reports(**pick_options(values, Reports)), **own,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Identity of a sweep of one pair, as in a manifest: its scorer and grid."""
        return {"scorer": self.scorer.describe(), "grid": self.grid.to_mapping()}

    @property
    def engine(self) -> str:
        return self.grid.shared.engine

    def run(self, console: Console) -> dict[str, Any]:
        if not self.replacing.overwrite:
            from pome.verification.finished import find_swept

            def find() -> Manifest | None:
                sides = str(self.base), str(self.fine_tuned)
                return find_swept(self.folder, *sides, self.describe(), self.publication.has_card)

            if finished := accept_finished(find, self.folder, self.publication, self.reports, console):
                return finished
        outcome = make_sweep(self, self.folder, console)
        if outcome.manifest is None:
            return {"status": "done", "out": "nothing beats FT beyond noise", "sweep": outcome.to_json()}
        push(self.folder, self.publication, console)
        return {"status": "done", "matrices": len(outcome.manifest.tensors), "sweep": outcome.to_json()}


def make_sweep(job: SweepJob, out: Path, console: Console) -> Outcome:
    """Score, tell people, write the reports."""
    from pome.cli.sweep_progress import SweepBar, SweepLines
    from pome.cli.tables.sweep import make_sweep_tables
    from pome.cli.tables.text import show_bytes
    from pome.reports.files import check_targets
    from pome.reports.sweep import write_sweep_reports
    from pome.reports.sweep_words import describe_outcome
    from pome.sweeping.sweep import sweep

    base, ft = str(job.base), str(job.fine_tuned)
    check_targets(job.reports, (base, ft, out))
    check_upload(job.publication)
    shown = SweepBar(console) if console.is_terminal and not console.quiet else SweepLines(console)
    with show_progress(console) as progress, shown as listener:
        outcome = sweep(
            base, ft, out, job.grid, job.scorer, listener=listener, progress=progress,
            overwrite=job.replacing.overwrite, fresh=job.replacing.fresh, write_best=job.write_best,
            retry_failed=job.retry_failed, card=job.publication.has_card, at_once=job.at_once,
        )  # fmt: skip
    for table in make_sweep_tables(outcome):
        console.print(table)
    lines = [*describe_outcome(outcome), f"peak memory {show_bytes(outcome.peak_bytes)}"]
    print_lines(
        console,
        [
            *lines,
            *(f"wrote {path}" for path in write_sweep_reports(outcome, job.scorer, job.reports, base, ft, str(out))),
        ],
    )
    if outcome.manifest is not None:
        report_edit(outcome.manifest, out, console)
    return outcome


TAKES = (EditSpec, make_scorer, make_grid, SweepJob, Publication, Replacing, Reports)
JOB = SweepJob
