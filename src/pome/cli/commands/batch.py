"""`pome batch`: many jobs from one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pome.choices import ENGINES, EngineName
from pome.cli.batch import Job, read_batch, run_job
from pome.cli.console import make_console, write_document
from pome.cli.options import Argument, AsJson, Quiet
from pome.config.options import JOBS, Option, find_options
from pome.config.reading import read_address
from pome.errors import SpecError, printable

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
    engine: Annotated[
        EngineName, Option("Where jobs are run: here, or spread over a Ray cluster.", metavar="NAME", choices=ENGINES)
    ] = "local",
    ray_address: Annotated[
        str | None, Option("The Ray cluster: HOST:PORT of its head, or auto.", metavar="ADDRESS", read=read_address)
    ] = None,
    at_once: Annotated[int | None, Option("Run at most N jobs at once, with engine ray.", metavar="N")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run many jobs from one YAML file; a failed job does not stop the others.

    Exit status: 0 all done; 1 at least one failed; 2 the file is wrong, and nothing was run; 130 interrupted.
    """
    pairs = [text.partition("=") for text in variables]
    if wrong := next((name for name, equals, _ in pairs if not equals), None):
        raise SpecError(f"--set {printable(wrong)}: write NAME=VALUE")
    own = {"engine": engine, "ray_address": ray_address, "at_once": at_once}
    for name, value in own.items():
        if value is not None:
            find_options(run)[name].check(value)
    jobs = read_batch(Path(file), only, {name: value for name, _, value in pairs})
    console = make_console(quiet)
    if engine == "ray":
        results, stopped = run_spread(jobs, ray_address, at_once, quiet)
    elif at_once is not None or ray_address is not None:
        given = "at_once" if at_once is not None else "ray_address"
        raise SpecError(f"{given}: has no effect without engine 'ray'; give both or neither", options=[given, "engine"])
    else:
        results, stopped = run_here(jobs, console)
    from pome.cli.tables.batch import make_batch_table

    console.print(make_batch_table(results))
    if as_json:
        write_document([json.dumps({"jobs": results}, indent=1), "\n"])
    if stopped is not None:
        raise KeyboardInterrupt(stopped)
    if any(result["status"] != "done" for result in results):
        raise typer.Exit(1)


def run_spread(
    jobs: list[Job], address: str | None, at_once: int | None, quiet: bool
) -> tuple[list[dict[str, Any]], str | None]:
    """Results of jobs run on Ray, in the order of the file; and what to say where they were interrupted."""
    from pome.cli.remote import run_on_ray

    found: dict[str, dict[str, Any]] = {}
    stopped = None
    try:
        for result in run_on_ray(jobs, address, at_once, quiet):
            found[result["name"]] = result
    except KeyboardInterrupt:
        stopped = f"interrupted; {len(found)} of {len(jobs)} jobs came to an end before it"
    return [found.get(job.name, {**job.begin(), "status": "interrupted", "error": ""}) for job in jobs], stopped


def run_here(jobs: list[Job], console: Console) -> tuple[list[dict[str, Any]], str | None]:
    """Results of jobs run one after the other; and what to say where they were interrupted."""
    results: list[dict[str, Any]] = []
    stopped: str | None = None
    for job in jobs:
        result = job.begin()
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
    return results, stopped
