"""The command line: options to a spec, errors to exit statuses. It decides nothing about checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import pome
from pome.errors import PomeError, printable
from pome.roles import ROLES
from pome.spec import EDIT_KEYS, EditSpec, Job, Publication, Reports, merge_options, read_batch, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from pome.findings import Survey
    from pome.manifest import Manifest
    from pome.run import Progress
    from pome.verification import Verdict


class Interrupted(PomeError):
    """Ctrl-C or SIGTERM, with what is safe and how to go on."""

    exit_status = 130


class _Commands(TyperGroup):
    """The commands. Typer turns a KeyboardInterrupt into a bare exit, its message lost; so it does not reach typer."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or "interrupted; nothing was written") from None


app = typer.Typer(
    name="pome",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Improve a fine-tuned checkpoint without data or training: equalize the leading directions of its updates.",
)

LOG_WIDTH = 140
# Every error of typer's parser. Typer brings its own copy of click in some releases and needs click in others, so the
# class is taken from what typer itself exports: BadParameter, UsageError, ClickException.
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]

RankRule = Literal["ratio", "fixed", "energy", "noise-floor", "gavish-donoho", "effective"]
Scale = Literal["frobenius", "unit", "rms", "mean", "spectral"]
Dtype = Literal["keep", "float32", "bfloat16", "float16"]
Engine = Literal["local"]
OutFormat = Literal["full", "adapter"]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pome {pome.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command("edit")
def edit_command(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="Pretrained: folder, .safetensors file or Hub id.")],
    ft: Annotated[str, typer.Argument(metavar="FT", help="Fine-tuned: folder, .safetensors file or Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Role, group or re:PATTERN over tensor names; repeatable. \\[default: up]"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to leave alone (regex); repeatable.")
    ] = None,
    rank_ratio: Annotated[
        float | None, typer.Option(metavar="K", help="k = max(1, round(K * rank)). \\[default: 0.5]")
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="k = min(N, rank).")] = None,
    rank_rule: Annotated[RankRule | None, typer.Option(help="How k is chosen. \\[default: ratio]")] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="E", help="Least k that holds E of the squared norm. \\[default: 0.9]")
    ] = None,
    scale: Annotated[Scale | None, typer.Option(help="Rule for alpha_0. \\[default: frobenius]")] = None,
    beta: Annotated[
        float | None, typer.Option(metavar="B", help="The factor; 1 keeps the update's norm. \\[default: 1.0]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps. \\[default: auto]")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the edited tensors. \\[default: keep]")] = None,
    engine: Annotated[Engine | None, typer.Option(help="Where units are worked on. \\[default: local]")] = None,
    dequantize: Annotated[
        bool | None, typer.Option("--dequantize", help="See and write fp8 weights with block scales as bfloat16.")
    ] = None,
    common_rows: Annotated[
        bool | None, typer.Option("--common-rows", help="Edit the first rows that resized embeddings share.")
    ] = None,
    out_format: Annotated[
        OutFormat | None, typer.Option(help="Of an adapter as FT: a full checkpoint or an adapter. \\[default: full]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with these names as keys; options win.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else on stderr.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop an interrupted run's progress.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write a model card in place of FT's README.md.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload OUT with its model card; makes the repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository of --push-to-hub private.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Write to OUT the checkpoint FT with the updates of chosen matrices equalized.

    Exit status: 0 done; 1 an error of the input or the machine; 2 usage; 130 interrupted, and the same command goes on.
    """
    given = {key: context.params[key] for key in EDIT_KEYS if context.params.get(key) not in (None, [], ())}
    spec = EditSpec.from_mapping(merge_options(read_config(config) if config else {}, given))
    publication = Publication(card, push_to_hub, private)
    console = _console(quiet)
    if dry_run:
        _show_plan(base, ft, out, spec, console, as_json, overwrite)
        return
    manifest = _edit(base, ft, out, spec, console, overwrite, fresh, publication)
    _report(manifest, out, console)
    if as_json:
        sys.stdout.write(manifest.to_json())
    _push(out, publication, console)


@app.command("verify")
def verify_command(
    out: Annotated[str, typer.Argument(metavar="OUT", help="An output of pome: a folder or a Hub id.")],
    base: Annotated[str | None, typer.Option(metavar="BASE", help="Recompute edits from this and --ft.")] = None,
    ft: Annotated[str | None, typer.Option(metavar="FT", help="Compare all unedited bytes with this.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Recompute every edit, not a sample.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Prove an output: re-hash its files, compare untouched bytes with FT, recompute edits from BASE and FT.

    Exit status: 0 all is as the manifest says; 1 something differs or cannot be read; 2 usage.
    """
    from pome.verification import verify

    console = _console(quiet)
    verdict = verify(out, base, ft, full=full)
    _report_verdict(verdict, out, console)
    if as_json:
        print(json.dumps({"ok": verdict.ok, "differences": _list(verdict)}, indent=1))
    if not verdict.ok:
        raise typer.Exit(1)


@app.command("inspect")
def inspect_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Pretrained checkpoint; or, alone, an output of pome.")],
    ft: Annotated[str | None, typer.Argument(metavar="FT", help="Fine-tuned checkpoint.")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Role, group or re:PATTERN over tensor names; repeatable. \\[default: all]"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors not to look at (regex); repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else on stderr.")] = False,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Write a table, a line for each matrix.")] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report, one page for a browser.")] = None,
    plots: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write plots, PNG and SVG; needs pome-edit\\[plot].")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Look before you edit: spectra of the updates, k and alpha by every rule, noise, and a suggestion.

    With one argument, an output of pome, it shows what the edit did, from its manifest.
    """
    console = _console(quiet)
    spec = EditSpec(layers=tuple(layers or ROLES), exclude=tuple(exclude or ()), device=device)
    _, document = _inspect(base, ft, spec, Reports(html, csv, plots), console)
    if as_json:
        sys.stdout.writelines(document)


def _inspect(
    base: str, ft: str | None, spec: EditSpec, reports: Reports, console: Console
) -> tuple[int, Iterable[str]]:
    """Look, tell people, write the reports; returns the number of matrices and the JSON document in pieces."""
    from pome.checkpoint.sidefiles import MANIFEST_NAME
    from pome.manifest import read_manifest
    from pome.progress import describe_kept, describe_notices, describe_survey, make_survey_tables
    from pome.report import check_targets, write_reports
    from pome.run import open_pair
    from pome.sheet import make_edit_sheet, make_sheet
    from pome.suggest import list_warnings, suggest
    from pome.survey import survey

    check_targets(reports)
    found: Survey | Manifest
    document: Iterable[str]
    if ft is None:
        found = read_manifest(Path(base).expanduser() / MANIFEST_NAME)
        sheet, document = make_edit_sheet(found), [found.to_json()]
    else:
        # What can be refused without torch is refused before torch takes its seconds to load.
        with open_pair(base, ft, spec) as opened:
            console.print(describe_survey(opened), highlight=False, markup=False, soft_wrap=True)
        with _progress(console) as progress:
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


@app.command("batch")
def batch_command(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Defaults and a list of jobs.")],
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run this job alone; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Run many jobs from one YAML file; a failed job does not stop the others.

    Exit status: 0 all done; 1 at least one failed; 2 the file is wrong, and nothing was run; 130 interrupted.
    """
    jobs = read_batch(file, only or ())
    console = _console(quiet)
    results = [_run_job(job, console) for job in jobs]
    from pome.progress import make_batch_table

    console.print(make_batch_table(results))
    if as_json:
        print(json.dumps({"jobs": results}, indent=1))
    if any(result["status"] != "done" for result in results):
        raise typer.Exit(1)


def _run_job(job: Job, console: Console) -> dict[str, Any]:
    begun = time.monotonic()
    result: dict[str, Any] = {"name": job.name, "command": job.command, "out": job.out}
    console.print(printable(job.name), style="bold", highlight=False, markup=False)
    try:
        result |= RUNNERS[job.command](job, console)
    except (PomeError, OSError, MemoryError) as error:
        _complain(f"{job.name}: {describe_error(error)}")
        result |= {"status": "failed", "error": describe_error(error)}
    result["seconds"] = round(time.monotonic() - begun, 3)
    return result


def _run_edit(job: Job, console: Console) -> dict[str, Any]:
    from pome.verification import find_finished

    assert job.base is not None and job.fine_tuned is not None  # the spec saw to it
    if not job.overwrite:
        finished = find_finished(Path(job.out), job.base, job.fine_tuned, job.spec)
        if finished is not None:
            console.print("done by an earlier run", highlight=False)
            _push(Path(job.out), job.publication, console)
            return {"status": "done", "matrices": len(finished.tensors)}
    publication, out = job.publication, Path(job.out)
    manifest = _edit(job.base, job.fine_tuned, out, job.spec, console, job.overwrite, job.fresh, publication)
    _report(manifest, out, console)
    _push(out, publication, console)
    return {"status": "done", "matrices": len(manifest.tensors)}


def _run_verify(job: Job, console: Console) -> dict[str, Any]:
    from pome.verification import verify

    verdict = verify(job.out, job.base, job.fine_tuned, full=job.full)
    _report_verdict(verdict, job.out, console)
    if verdict.ok:
        return {"status": "done", "matrices": verdict.edits}
    return {"status": "failed", "error": f"{len(verdict.differences)} differences", "differences": _list(verdict)}


def _run_inspect(job: Job, console: Console) -> dict[str, Any]:
    matrices, _ = _inspect(job.base or job.out, job.fine_tuned, job.spec, job.reports, console)
    written = ", ".join(path for path in (job.reports.html, job.reports.csv, job.reports.plots) if path)
    return {"status": "done", "matrices": matrices, "out": written or job.out}


RUNNERS = {"edit": _run_edit, "inspect": _run_inspect, "verify": _run_verify}


def _report_verdict(verdict: Verdict, out: str, console: Console) -> None:
    from pome.progress import show_bytes

    for item in verdict.differences:
        where = f"{printable(item.file)}: {printable(item.tensor)}" if item.tensor else printable(item.file)
        _complain(f"{where}: {item.what}")
    checked = f"{verdict.files} files hashed, {show_bytes(verdict.bytes_compared)} compared with FT, "
    checked += f"{verdict.edits} edits recomputed"
    ending = "as the manifest says" if verdict.ok else f"{len(verdict.differences)} differences"
    console.print(f"{printable(out)}: {ending} ({checked})", highlight=False, markup=False, soft_wrap=True)


def _list(verdict: Verdict) -> list[dict[str, Any]]:
    return [dataclasses.asdict(item) for item in verdict.differences]


def _edit(
    base: str,
    ft: str,
    out: Path,
    spec: EditSpec,
    console: Console,
    overwrite: bool,
    fresh: bool,
    publication: Publication,
) -> Manifest:
    from pome.checkpoint.output import check_target
    from pome.progress import describe_plan
    from pome.run import edit, open_pair

    if publication.push_to_hub is not None:
        from pome.upload import check_login

        check_login(publication.push_to_hub)
    # Everything that can be refused without torch is refused before torch takes its seconds to load.
    with open_pair(base, ft, spec) as opened:
        check_target(out, [Path(base).expanduser(), Path(ft).expanduser()], overwrite)
        console.print(describe_plan(opened), highlight=False, markup=False, soft_wrap=True)
    with _progress(console) as progress:
        return edit(base, ft, out, spec, progress, overwrite=overwrite, fresh=fresh, card=publication.has_card)


def _push(out: Path, publication: Publication, console: Console) -> None:
    if publication.push_to_hub is not None:
        from pome.upload import push_output

        address = push_output(out, publication.push_to_hub, private=publication.private)
        console.print(f"uploaded to {address}", highlight=False, markup=False, soft_wrap=True)


def _show_plan(
    base: str, ft: str, out: Path, spec: EditSpec, console: Console, as_json: bool, overwrite: bool
) -> None:
    from pome.checkpoint.output import check_target
    from pome.progress import describe_plan, make_plan_table, show_bytes
    from pome.run import open_pair

    with open_pair(base, ft, spec) as opened:
        check_target(out, [Path(base).expanduser(), Path(ft).expanduser()], overwrite)
        console.print(describe_plan(opened), highlight=False, markup=False, soft_wrap=True)
        console.print(make_plan_table(opened))
        console.print(f"expected memory: {show_bytes(opened.plan.memory)}", highlight=False)
        if as_json:
            print(json.dumps(opened.plan.to_json(), indent=1))


def _report(manifest: Manifest, out: Path, console: Console) -> None:
    from pome.checkpoint.sidefiles import MANIFEST_NAME
    from pome.progress import describe_kept, describe_warnings, make_closing_table, show_bytes

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


def _console(quiet: bool) -> Console:
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
def _progress(console: Console) -> Iterator[Progress]:
    from pome.progress import BarProgress, LineProgress
    from pome.run import Progress

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


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line and leave with its exit status."""
    # torch asks Linux for huge pages then: a large result costs a third of its page faults. Read when torch starts.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command; returns its exit status. Errors go to stderr as one message, never as a traceback."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # A scheduler's or CI's stop is handled as Ctrl-C is: progress is made safe and the same command goes on.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        status = app(arguments, standalone_mode=False, prog_name="pome")
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted; nothing was written")
        return 130
    except USAGE_ERROR as error:
        error.show()
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader of our stdout went away (`pome ... | head`); it must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except PomeError as error:
        _complain(str(error))
        return error.exit_status
    except (OSError, MemoryError) as error:
        _complain(describe_error(error))
        return 1
