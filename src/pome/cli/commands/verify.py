"""`pome verify`: prove an output."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pome.cli.batch import SIDES, Job, read_job_text, read_name
from pome.cli.console import complain, make_console, print_lines, write_document
from pome.cli.options import Argument, AsJson, Given, Quiet
from pome.config.options import CHECKED, Option, check_switch
from pome.errors import SpecError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from pome.verification.verify import Verdict

EXAMPLES = (
    "pome verify ./out",
    "pome verify ./out --ft ./fine-tuned",
    "pome verify ./out --base ./base --ft ./fine-tuned --full",
)


def run(
    out: Annotated[str, Argument("OUT", "An output of pome: a folder or a Hub id.")],
    given: Given,
    base: Annotated[str | None, Option("Recompute edits from this and --ft.", metavar="BASE", group=CHECKED)] = None,
    ft: Annotated[str | None, Option("Compare all unedited bytes with this.", metavar="FT", group=CHECKED)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove an output: re-hash its files, compare untouched bytes with FT, recompute edits from BASE and FT.

    Exit status: 0 all is as the manifest says; 1 something differs or cannot be read; 2 usage.
    """
    full = given.get("full", False)
    check_sides(base, ft, full)
    from pome.verification.verify import verify

    console = make_console(quiet)
    verdict = verify(out, base, ft, full=full)
    report_verdict(verdict, out, console)
    if as_json:
        write_document([json.dumps({"ok": verdict.ok, "differences": list_differences(verdict)}, indent=1), "\n"])
    if not verdict.ok:
        raise typer.Exit(1)


def check_sides(base: str | None, ft: str | None, full: bool) -> None:
    """Refuse combinations of sides and options that `verify` cannot check."""
    if full and (base is None or ft is None):
        said = "full: every edit is recomputed from both sides; give BASE and FT too"
        raise SpecError(said, options=["full"])
    if base is not None and ft is None:
        raise SpecError("base: an edit is recomputed from both sides; give FT too", options=["base"])


def report_verdict(verdict: Verdict, out: str, console: Console) -> None:
    """Every difference as an error, what was checked, and at the end OK or the number of differences."""
    from pome.cli.tables.text import count_noun, show_bytes

    for item in verdict.differences:
        where = f"{printable(item.file)}: {printable(item.tensor)}" if item.tensor else printable(item.file)
        complain(f"{where}: {item.what}")
    checked = [f"{count_noun(verdict.files, 'file')} hashed"]
    if verdict.bytes_compared:
        checked.append(f"{show_bytes(verdict.bytes_compared)} compared with FT")
    if verdict.edits:
        checked.append(f"{count_noun(verdict.edits, 'edit')} recomputed")
    ending = "OK" if verdict.ok else count_noun(len(verdict.differences), "difference")
    print_lines(console, [f"{printable(out)}: {', '.join(checked)}", ending])


def list_differences(verdict: Verdict) -> list[dict[str, Any]]:
    return [dataclasses.asdict(item) for item in verdict.differences]


@dataclass(frozen=True)
class VerifyJob(Job):
    """A verification of a batch."""

    full: Annotated[bool, Option("Recompute every edit, not a sample.", group=CHECKED)] = False

    @classmethod
    def read(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> VerifyJob:
        out = read_job_text(values, "out")
        base, ft = (None if values.get(key) is None else read_job_text(values, key) for key in SIDES)
        full = check_switch("full", values.get("full", False))
        check_sides(base, ft, full)
        return cls(read_name(values, f"verify {out}"), "verify", base, ft, out, full)

    def run(self, console: Console) -> dict[str, Any]:
        from pome.verification.verify import verify

        verdict = verify(self.out, self.base, self.fine_tuned, full=self.full)
        report_verdict(verdict, self.out, console)
        if verdict.ok:
            return {"status": "done", "matrices": verdict.edits}
        from pome.cli.tables.text import count_noun

        error = count_noun(len(verdict.differences), "difference")
        return {"status": "failed", "error": error, "differences": list_differences(verdict)}


TAKES = (VerifyJob,)
JOB = VerifyJob
