"""What the commands do, and what they tell on the way: between the options of the command line and the library."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pome.cli.batch import Job, Sweep
from pome.config.outputs import Publication, Reports
from pome.config.spec import EditSpec
from pome.errors import OutputError, PomeError, SpecError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from pome.editing.session import Progress
    from pome.inspection.records import Survey
    from pome.manifest import Manifest
    from pome.sweeping.trials import Outcome
    from pome.verification.verify import Verdict

LOG_WIDTH = 140


def show_inspection(
    base: str, ft: str | None, spec: EditSpec, reports: Reports, console: Console
) -> tuple[int, Iterable[str]]:
    """Look, tell people, write the reports; returns the number of matrices and the JSON document in pieces."""
    from pome.checkpoint.sidefiles import MANIFEST_NAME
    from pome.cli.tables.edit import describe_kept
    from pome.cli.tables.inspect import describe_notices, describe_survey, make_survey_tables
    from pome.editing.session import open_pair
    from pome.inspection.suggest import list_warnings, suggest
    from pome.inspection.survey import survey
    from pome.manifest import read_manifest
    from pome.reports.files import check_targets
    from pome.reports.inspection import write_reports
    from pome.reports.sheet import make_edit_sheet, make_sheet

    check_targets(reports, (base, ft))
    found: Survey | Manifest
    document: Iterable[str]
    if ft is None:
        path = Path(os.path.expanduser(base)) / MANIFEST_NAME
        if not os.path.lexists(path):
            said = f"give BASE and FT, or one output of pome (a folder with {MANIFEST_NAME})"
            raise SpecError(f"{printable(base)}: {said}")
        found = read_manifest(path)
        sheet, document = make_edit_sheet(found), [found.to_json()]
    else:
        # What can be refused without torch is refused before torch takes its seconds to load.
        with open_pair(base, ft, spec) as opened:
            console.print(describe_survey(opened), highlight=False, markup=False, soft_wrap=True)
        with show_progress(console) as progress:
            found = survey(base, ft, spec, progress)
        sheet = make_sheet(found, list_warnings(found.matrices), suggest(base, ft, found.matrices))
        document = found.to_json()
    for table in make_survey_tables(sheet):
        console.print(table)
    lines = [*describe_kept(found.kept), *describe_notices(sheet)]
    if sheet.suggestion:
        lines += [f"suggested: {sheet.suggestion.title}. {sheet.suggestion.why}", f"  {sheet.suggestion.command}"]
    lines += [f"wrote {path}" for path in write_reports(sheet, reports)]
    for line in lines:
        console.print(printable(line, 2000), highlight=False, markup=False, soft_wrap=True)
    return len(sheet.rows), document


def make_sweep_of(
    base: str,
    ft: str,
    out: Path,
    job: Sweep,
    console: Console,
    reports: Reports,
    overwrite: bool,
    fresh: bool,
    card: bool,
) -> Outcome:
    """Score, tell people, write the reports."""
    from pome.cli.progress import SweepLines
    from pome.cli.tables.sweep import make_sweep_tables
    from pome.cli.tables.text import show_bytes
    from pome.reports.files import check_targets
    from pome.reports.sweep import write_sweep_reports
    from pome.reports.sweep_words import describe_outcome
    from pome.sweeping.sweep import sweep

    check_targets(reports, (base, ft, out))
    with show_progress(console) as progress:
        outcome = sweep(
            base, ft, out, job.grid, job.scorer, listener=SweepLines(console), progress=progress, overwrite=overwrite,
            fresh=fresh, write_best=job.write_best, retry_failed=job.retry_failed, card=card,
        )  # fmt: skip
    for table in make_sweep_tables(outcome):
        console.print(table)
    lines = [*describe_outcome(outcome), f"peak memory {show_bytes(outcome.peak_bytes)}"]
    lines += [f"wrote {path}" for path in write_sweep_reports(outcome, job.scorer, reports, base, ft, str(out))]
    for line in lines:
        console.print(printable(line, 2000), highlight=False, markup=False, soft_wrap=True)
    if outcome.manifest is not None:
        report_edit(outcome.manifest, out, console)
    return outcome


def run_job(job: Job, console: Console) -> dict[str, Any]:
    begun = time.monotonic()
    result: dict[str, Any] = {"name": job.name, "command": job.command, "out": job.out}
    console.print(printable(job.name), style="bold", highlight=False, markup=False)
    try:
        result |= RUNNERS[job.command](job, console)
    except (PomeError, OSError, MemoryError) as error:
        complain(f"{job.name}: {describe_error(error)}")
        result |= {"status": "failed", "error": describe_error(error)}
    result["seconds"] = round(time.monotonic() - begun, 3)
    return result


def _run_edit(job: Job, console: Console) -> dict[str, Any]:
    assert job.base is not None and job.fine_tuned is not None  # the spec saw to it
    publication, out = job.publication, _find_out(job)
    if (finished := _find_finished(job, console)) is not None:
        return finished
    manifest = make_edit(job.base, job.fine_tuned, out, job.spec, console, job.overwrite, job.fresh, publication)
    report_edit(manifest, out, console)
    push(out, publication, console)
    return {"status": "done", "matrices": len(manifest.tensors)}


def _find_out(job: Job) -> Path:
    return Path(os.path.expanduser(job.out))


def _find_finished(job: Job, console: Console) -> dict[str, Any] | None:
    """The result of a job whose output an earlier run made, whole and as it is asked for now."""
    from pome.verification.finished import find_finished, find_swept

    if job.overwrite or job.base is None or job.fine_tuned is None:
        return None
    out, card = _find_out(job), job.publication.has_card
    if job.sweep is None:
        manifest = find_finished(out, job.base, job.fine_tuned, job.spec, card)
    else:
        manifest = find_swept(out, job.base, job.fine_tuned, job.sweep.describe(), card)
    if manifest is None:
        return None
    missing = [path for path in job.reports.paths if not os.path.exists(os.path.expanduser(path))]
    if missing:  # they need every score again, which are gone with OUT written
        said = f"made by an earlier run, but {printable(missing[0])} is not there; 'overwrite: true' runs it all again"
        raise OutputError(f"{printable(job.out)}: {said}")
    console.print("done by an earlier run", highlight=False)
    push(out, job.publication, console)
    return {"status": "done", "matrices": len(manifest.tensors)}


def _run_verify(job: Job, console: Console) -> dict[str, Any]:
    from pome.verification.verify import verify

    verdict = verify(job.out, job.base, job.fine_tuned, full=job.full)
    report_verdict(verdict, job.out, console)
    if verdict.ok:
        return {"status": "done", "matrices": verdict.edits}
    count = len(verdict.differences)
    return {"status": "failed", "error": f"{count} differences", "differences": list_differences(verdict)}


def _run_inspect(job: Job, console: Console) -> dict[str, Any]:
    matrices, _ = show_inspection(job.base or job.out, job.fine_tuned, job.spec, job.reports, console)
    written = ", ".join(job.reports.paths)
    return {"status": "done", "matrices": matrices, "out": written or job.out}


def _run_sweep(job: Job, console: Console) -> dict[str, Any]:
    assert job.base is not None and job.fine_tuned is not None and job.sweep is not None  # the spec saw to it
    out = _find_out(job)
    if (finished := _find_finished(job, console)) is not None:
        return finished
    outcome = make_sweep_of(
        job.base, job.fine_tuned, out, job.sweep, console, job.reports, job.overwrite, job.fresh,
        job.publication.has_card,
    )  # fmt: skip
    if outcome.manifest is None:
        return {"status": "done", "out": "nothing beats FT beyond noise", "sweep": outcome.to_json()}
    push(out, job.publication, console)
    return {"status": "done", "matrices": len(outcome.manifest.tensors), "sweep": outcome.to_json()}


RUNNERS = {"edit": _run_edit, "inspect": _run_inspect, "sweep": _run_sweep, "verify": _run_verify}


def report_verdict(verdict: Verdict, out: str, console: Console) -> None:
    from pome.cli.tables.text import show_bytes

    for item in verdict.differences:
        where = f"{printable(item.file)}: {printable(item.tensor)}" if item.tensor else printable(item.file)
        complain(f"{where}: {item.what}")
    checked = f"{verdict.files} files hashed, {show_bytes(verdict.bytes_compared)} compared with FT, "
    checked += f"{verdict.edits} edits recomputed"
    ending = "as the manifest says" if verdict.ok else f"{len(verdict.differences)} differences"
    console.print(f"{printable(out)}: {ending} ({checked})", highlight=False, markup=False, soft_wrap=True)


def list_differences(verdict: Verdict) -> list[dict[str, Any]]:
    return [dataclasses.asdict(item) for item in verdict.differences]


def make_edit(
    base: str,
    ft: str,
    out: Path,
    spec: EditSpec,
    console: Console,
    overwrite: bool,
    fresh: bool,
    publication: Publication,
) -> Manifest:
    from pome.cli.tables.edit import describe_plan
    from pome.editing.edit import edit
    from pome.editing.session import open_pair
    from pome.output.target import check_target

    if publication.push_to_hub is not None:
        from pome.output.upload import check_login

        check_login(publication.push_to_hub)
    # Everything that can be refused without torch is refused before torch takes its seconds to load.
    with open_pair(base, ft, spec) as opened:
        check_target(out, opened.list_inputs(), overwrite)
        console.print(describe_plan(opened), highlight=False, markup=False, soft_wrap=True)
    with show_progress(console) as progress:
        return edit(base, ft, out, spec, progress, overwrite=overwrite, fresh=fresh, card=publication.has_card)


def push(out: Path, publication: Publication, console: Console) -> None:
    if publication.push_to_hub is not None:
        from pome.output.upload import push_output

        address = push_output(out, publication.push_to_hub, private=publication.private)
        console.print(f"uploaded to {address}", highlight=False, markup=False, soft_wrap=True)


def show_plan(base: str, ft: str, out: Path, spec: EditSpec, console: Console, as_json: bool, overwrite: bool) -> None:
    from pome.cli.tables.edit import describe_plan, make_plan_table
    from pome.cli.tables.text import show_bytes
    from pome.editing.session import open_pair
    from pome.output.target import check_target

    with open_pair(base, ft, spec) as opened:
        check_target(out, opened.list_inputs(), overwrite)
        console.print(describe_plan(opened), highlight=False, markup=False, soft_wrap=True)
        console.print(make_plan_table(opened))
        console.print(f"expected memory: {show_bytes(opened.plan.memory)}", highlight=False)
        if as_json:
            print(json.dumps(opened.plan.to_json(), indent=1))


def report_edit(manifest: Manifest, out: Path, console: Console) -> None:
    from pome.checkpoint.sidefiles import MANIFEST_NAME
    from pome.cli.tables.edit import describe_kept, describe_warnings, make_closing_table
    from pome.cli.tables.text import show_bytes

    if manifest.tensors:
        console.print(make_closing_table(manifest))
    for line in [*describe_kept(manifest.kept), *describe_warnings(manifest)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not manifest.tensors:
        console.print("warning: no matrix was edited; OUT equals FT", highlight=False)
    size = show_bytes(sum(file.bytes for file in manifest.files.values()))
    merged = len(manifest.merged)
    rest = f"{merged} merged, every other byte as in BASE" if merged else "every other byte as in FT"
    line = (
        f"{printable(str(out))}  {size}, {len(manifest.tensors)} matrices edited, {rest}   "
        f"manifest: {printable(str(out / MANIFEST_NAME))}"
    )
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def make_console(quiet: bool) -> Console:
    """Everything for people goes to stderr; stdout is for `--json`."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LOG_WIDTH  # a log has no width of its own, and tables should not fold to a terminal's 80
    # The Hub's library, not loaded yet, draws bars of its own and tells of each request that it repeats.
    if quiet or not console.is_terminal:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if quiet:
        os.environ["HF_HUB_VERBOSITY"] = "error"
    return console


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    from pome.cli.progress import BarProgress, LineProgress
    from pome.editing.session import Progress

    if console.quiet:
        yield Progress()
    elif console.is_terminal:
        with BarProgress(console) as bars:
            yield bars
    else:
        yield LineProgress(console)


def describe_error(error: BaseException) -> str:
    """One error as a message for people, whatever raised it."""
    if isinstance(error, MemoryError):
        return "out of memory; use a machine with more, or --exclude the largest matrices (see --dry-run)"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return str(error)


def complain(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
