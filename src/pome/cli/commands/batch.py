"""`pome batch`: many jobs from one file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pome.cli.batch import Job, read_batch
from pome.cli.console import complain, describe_error, make_console, write_document
from pome.cli.options import Argument, AsJson, Quiet
from pome.config.options import JOBS, Option
from pome.errors import PomeError, SpecError, printable

if TYPE_CHECKING:
    from rich.console import Console

TAKES = ()
EXAMPLES = (
    "pome batch jobs.yaml",
    "pome batch jobs.yaml --only math --only code",
    "pome batch jobs.yaml --set fine_tuned=./math --set data=held-out.jsonl",
)


def run(
    file: Annotated[str, Argument("FILE.yaml", "Defaults and a list of jobs.")],
    only: Annotated[tuple[str, ...], Option("Run this job alone; repeatable.", metavar="NAME", group=JOBS)] = (),
    variables: Annotated[
        tuple[str, ...],
        Option("Give a variable of the file; repeatable.", metavar="NAME=VALUE", flag="--set", group=JOBS),
    ] = (),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run many jobs from one YAML file; a failed job does not stop the others.

    Exit status: 0 all done; 1 at least one failed; 2 the file is wrong, and nothing was run; 130 interrupted.
    """
    pairs = [text.partition("=") for text in variables]
    if wrong := next((name for name, equals, _ in pairs if not equals), None):
        raise SpecError(f"--set {printable(wrong)}: write NAME=VALUE")
    jobs = read_batch(Path(file), only, {name: value for name, _, value in pairs})
    console = make_console(quiet)
    results: list[dict[str, Any]] = []
    stopped: str | None = None
    for job in jobs:
        result: dict[str, Any] = {"name": job.name, "command": job.command, "out": job.out, "seconds": 0.0}
        if stopped is not None:
            results.append({**result, "status": "not run", "error": ""})
            continue
        console.print(
            printable(f"[{len(results) + 1}/{len(jobs)}] {job.name}"), style="bold", highlight=False, markup=False
        )
        try:
            results.append(run_job(job, console))
        except KeyboardInterrupt as error:
            said = str(error) or "interrupted"
            stopped = f"{printable(job.name)}: {said}; {len(results)} of {len(jobs)} jobs came to an end before it"
            results.append({**result, "status": "interrupted", "error": said})
    from pome.cli.tables.batch import make_batch_table

    console.print(make_batch_table(results))
    if as_json:
        write_document([json.dumps({"jobs": results}, indent=1), "\n"])
    if stopped is not None:
        raise KeyboardInterrupt(stopped)
    if any(result["status"] != "done" for result in results):
        raise typer.Exit(1)


def run_job(job: Job, console: Console) -> dict[str, Any]:
    """Run one job; an error of it is told and becomes its result."""
    begun = time.monotonic()
    result: dict[str, Any] = {"name": job.name, "command": job.command, "out": job.out}
    try:
        result |= job.run(console)
    except (PomeError, OSError, MemoryError) as error:
        complain(f"{job.name}: {describe_error(error)}")
        result |= {"status": "failed", "error": describe_error(error)}
    result["seconds"] = round(time.monotonic() - begun, 3)
    return result
