"""The command line: options to a spec, errors to exit statuses. It decides nothing about checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

import pome
from pome.choices import ROLES
from pome.cli.actions import (
    complain,
    describe_error,
    list_differences,
    make_console,
    make_edit,
    make_sweep_of,
    push,
    report_edit,
    report_verdict,
    run_job,
    show_inspection,
    show_plan,
)
from pome.cli.batch import (
    SWEEP_KEYS,
    check_verification,
    make_spec,
    make_sweep,
    read_batch,
    read_config,
)
from pome.config.outputs import Publication, Reports
from pome.config.spec import EDIT_KEYS, EditSpec, merge_options
from pome.errors import OutputError, PomeError, SpecError, printable
from pome.sweeping.scorers.options import BATCH_SIZE


class Interrupted(PomeError):
    """Ctrl-C or SIGTERM, with what is safe and how to go on."""

    exit_status = 130


class _Commands(TyperGroup):
    """The commands. Typer turns a KeyboardInterrupt into a bare exit, its message lost; so it does not reach typer."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or "interrupted; run the same command again") from None


class _Command(TyperCommand):
    """A command that refuses an empty text, which would mean the working folder: in CI it is a variable not set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = list(args)  # the parser takes them off
        rest = super().parse_args(ctx, args)
        given, _, _ = self.make_parser(ctx).parse_args(args=typed)
        for param in self.get_params(ctx):
            value = given.get(str(param.name))
            if "" in (value if isinstance(value, (list, tuple)) else (value,)):
                name = param.metavar if param.param_type_name == "argument" else param.opts[0]
                raise SpecError(f"{name}: empty; is a variable unset?")
        return rest


app = typer.Typer(
    name="pome",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Improve a fine-tuned checkpoint without data or training: equalize the leading directions of its updates.",
)

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


@app.command("edit", cls=_Command)
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
    spec = make_spec(config, given)
    publication = Publication(card, push_to_hub, private)
    console = make_console(quiet)
    if dry_run:
        show_plan(base, ft, out, spec, console, as_json, overwrite)
        return
    manifest = make_edit(base, ft, out, spec, console, overwrite, fresh, publication)
    report_edit(manifest, out, console)
    if as_json:
        _write([manifest.to_json()], f"{printable(str(out))} is complete, but ")
    push(out, publication, console)


@app.command("verify", cls=_Command)
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
    check_verification(base, ft, full)
    from pome.verification.verify import verify

    console = make_console(quiet)
    verdict = verify(out, base, ft, full=full)
    report_verdict(verdict, out, console)
    if as_json:
        _write([json.dumps({"ok": verdict.ok, "differences": list_differences(verdict)}, indent=1), "\n"])
    if not verdict.ok:
        raise typer.Exit(1)


@app.command("inspect", cls=_Command)
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
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps. \\[default: auto]")
    ] = None,
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
    options = {"layers": layers, "exclude": exclude, "device": device}
    given = {key: value for key, value in options.items() if value}
    if ft is None and given:
        raise SpecError(f"--{next(iter(given))}: has no effect on an output, whose manifest is shown; give BASE and FT")
    console = make_console(quiet)
    spec = EditSpec.from_given({"layers": ROLES, **given})
    _, document = show_inspection(base, ft, spec, Reports(html, csv, plots), console)
    if as_json:
        _write(document)


@app.command("sweep", cls=_Command)
def sweep_command(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="Pretrained: folder, .safetensors file or Hub id.")],
    ft: Annotated[str, typer.Argument(metavar="FT", help="Fine-tuned: folder, .safetensors file or Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make, of the best.")],
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B+C", help="Roles to try; a comma separates, + joins. \\[default: up]"),
    ] = None,
    rank_ratio: Annotated[
        list[str] | None, typer.Option(metavar="K,...", help="Shares of the rank to keep. \\[default: 0.5]")
    ] = None,
    rank: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Numbers of directions to keep.")] = None,
    rank_rule: Annotated[list[str] | None, typer.Option(metavar="NAME,...", help="Other rules for k.")] = None,
    energy: Annotated[
        list[str] | None, typer.Option(metavar="E,...", help="Shares of the squared norm to keep.")
    ] = None,
    scale: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Rules for alpha_0. \\[default: frobenius]")
    ] = None,
    beta: Annotated[
        list[str] | None, typer.Option(metavar="B,...", help="Factors; 1 keeps the norm. \\[default: 1.0]")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to leave alone (regex); repeatable.")
    ] = None,
    score_cmd: Annotated[
        str | None, typer.Option(metavar="'CMD {model}'", help="Scores by its last number, or by JSON with score.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help="Scores by mean token loss of prompt/completion or text.")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASKS", help="Scores by tasks of lm-eval, or files of tasks.")
    ] = None,
    train_data: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help="Choose by the loss on this; --loss judges the choice.")
    ] = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="Of --score-cmd, less is better.")] = False,
    score_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Of one --score-cmd; after it the candidate has failed.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help=f"Records scored at once, at most. \\[default: {BATCH_SIZE}]")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Examples of each --lm-eval task.")] = None,
    search: Annotated[
        str, typer.Option(metavar="NAME", help="grid: all. coordinate: beta, then k, then roles.")
    ] = "grid",
    write_best: Annotated[
        bool, typer.Option("--write-best", help="Write the best even if it does not beat FT beyond noise.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Score again what had no score in an earlier run.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps. \\[default: auto]")
    ] = None,
    dequantize: Annotated[
        bool | None, typer.Option("--dequantize", help="See and write fp8 weights with block scales as bfloat16.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with options of edit that all candidates share.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else on stderr.")] = False,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result as one page.")] = None,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result as a table.")] = None,
    plots: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write heat maps, PNG and SVG; needs pome-edit\\[plot].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop the scores of an earlier run.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write a model card in place of FT's README.md.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Score many edits of one pair, and write the best to OUT if it beats FT beyond noise.

    Exit status: 0 done, whether OUT was written or not (`written` in --json); 1 an error; 2 usage; 130 interrupted, and
    the same command goes on.
    """
    given = {key: value for key, value in context.params.items() if value not in (None, [], ())}
    options = {key: given[key] for key in (*EDIT_KEYS, *SWEEP_KEYS) if key in given}
    job = make_sweep(merge_options(read_config(config, lists=True) if config else {}, options))
    console = make_console(quiet)
    reports = Reports(html, csv, plots)
    outcome = make_sweep_of(base, ft, out, job, console, reports, overwrite, fresh, card)
    if as_json:
        done = f"{printable(str(out))} is complete, but " if outcome.manifest else ""
        _write([json.dumps(outcome.to_json(), indent=1, allow_nan=False), "\n"], done)


@app.command("batch", cls=_Command)
def batch_command(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Defaults and a list of jobs.")],
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run this job alone; repeatable.")] = None,
    variables: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Give a variable of the file; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Run many jobs from one YAML file; a failed job does not stop the others.

    Exit status: 0 all done; 1 at least one failed; 2 the file is wrong, and nothing was run; 130 interrupted.
    """
    pairs = [text.partition("=") for text in variables or ()]
    if wrong := next((name for name, equals, _ in pairs if not equals), None):
        raise SpecError(f"--set {printable(wrong)}: write NAME=VALUE")
    jobs = read_batch(file, only or (), {name: value for name, _, value in pairs})
    console = make_console(quiet)
    results: list[dict[str, Any]] = []
    stopped: str | None = None
    for job in jobs:
        result: dict[str, Any] = {"name": job.name, "command": job.command, "out": job.out, "seconds": 0.0}
        if stopped is not None:
            results.append({**result, "status": "not run", "error": ""})
            continue
        try:
            results.append(run_job(job, console))
        except KeyboardInterrupt as error:
            said = str(error) or "interrupted"
            stopped = f"{printable(job.name)}: {said}; {len(results)} of {len(jobs)} jobs came to an end before it"
            results.append({**result, "status": "interrupted", "error": said})
    from pome.cli.tables import make_batch_table

    console.print(make_batch_table(results))
    if as_json:
        _write([json.dumps({"jobs": results}, indent=1), "\n"])
    if stopped is not None:
        raise KeyboardInterrupt(stopped)
    if any(result["status"] != "done" for result in results):
        raise typer.Exit(1)


def _write(document: Iterable[str], done: str = "") -> None:
    """The one document of `--json`; `done` says what stands all the same if it cannot be written."""
    try:
        sys.stdout.writelines(document)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{done}the document of --json could not be written: {error.strerror}") from None


def run_command(arguments: list[str]) -> int:
    """Run one command; returns its exit status. Errors go to stderr as one message, never as a traceback."""
    try:
        status = app(arguments, standalone_mode=False, prog_name="pome")
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted; run the same command again")
        return 130
    except USAGE_ERROR as error:
        error.show()
        return int(error.exit_code)
    except BrokenPipeError:  # the reader of our stdout went away: `pome ... | head`
        return 1
    except PomeError as error:
        complain(str(error))
        return error.exit_status
    except (OSError, MemoryError) as error:
        complain(describe_error(error))
        return 1
