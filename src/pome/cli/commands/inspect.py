"""`pome inspect`: look before an edit, or at what one did."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pome.cli.batch import SIDES, Job, read_job_text, read_name
from pome.cli.console import make_console, print_lines, show_progress, write_document
from pome.cli.options import Argument, AsJson, Given, Quiet
from pome.config.look import Look, read_look
from pome.config.options import check_text, list_options, pick_options
from pome.config.outputs import Reports
from pome.config.spec import EditSpec
from pome.errors import SpecError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from pome.inspection.records import Survey
    from pome.manifest import Manifest

LOOKS = (EditSpec, Look)
TAKES = (*LOOKS, Reports)
EXAMPLES = (
    "pome inspect ./base ./fine-tuned --html report.html",
    "pome inspect ./base ./fine-tuned --layers ffn --weights --csv matrices.csv",
    "pome inspect ./out --html what-the-edit-did.html",
)


def run(
    base: Annotated[str, Argument("BASE", "Pretrained checkpoint; or, alone, an output of pome.")],
    given: Given,
    ft: Annotated[str | None, Argument("FT", "Fine-tuned checkpoint.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Look before you edit: spectra of the updates, k and alpha by every rule, noise, and a suggestion.

    With one argument, an output of pome, it shows what the edit did, from its manifest.
    """
    reports = Reports(**pick_options(given, Reports))
    stray = next((key for key in given if key in list_options(LOOKS, "inspect")), None)
    if ft is None and stray:
        said = f"{stray}: has no effect on an output, whose manifest is shown; give BASE and FT"
        raise SpecError(said, options=[stray])
    _, document = show_inspection(base, ft, *read_look(given, given), reports, make_console(quiet))
    if as_json:
        write_document(document)


def show_inspection(
    base: str, ft: str | None, spec: EditSpec, weights: bool, reports: Reports, console: Console
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
    from pome.reports.weights import describe_weights

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
        with open_pair(base, ft, dataclasses.replace(spec, allow_missing=True)) as opened:
            print_lines(console, [describe_survey(opened)])
        with show_progress(console) as progress:
            found = survey(base, ft, spec, progress, weights)
        sheet = make_sheet(found, list_warnings(found.matrices), suggest(base, ft, found.matrices))
        document = found.to_json()
    for table in make_survey_tables(sheet):
        console.print(table)
    lines = [*describe_weights(sheet), *describe_kept(found.kept), *describe_notices(sheet)]
    if sheet.suggestion:
        lines += [f"suggested: {sheet.suggestion.title}. {sheet.suggestion.why}", f"  {sheet.suggestion.command}"]
    print_lines(console, [*lines, *(f"wrote {path}" for path in write_reports(sheet, reports))])
    return len(sheet.rows), document


@dataclass(frozen=True)
class InspectJob(Job):
    """A look of a batch: at an output where `out` is given, else at a pair."""

    spec: EditSpec
    weights: bool
    reports: Reports

    @classmethod
    def read(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> InspectJob:
        out = values.get("out")
        stray = [key for key in given if key in (*SIDES, *list_options(LOOKS, "inspect"))]
        if out is not None and stray:
            said = f"{stray[0]}: has no effect with out, whose manifest tells what was edited; give one of the two"
            raise SpecError(said)
        base, fine_tuned = (read_job_text(values, key) if out is None else None for key in SIDES)
        name = read_name(values, f"inspect {out or fine_tuned}")
        reports = Reports(**pick_options(values, Reports))
        told = "" if out is None else check_text("out", out)
        return cls(name, "inspect", base, fine_tuned, told, *read_look(values, given), reports)

    def run(self, console: Console) -> dict[str, Any]:
        sides = self.base or self.out, self.fine_tuned
        matrices, _ = show_inspection(*sides, self.spec, self.weights, self.reports, console)
        return {"status": "done", "matrices": matrices, "out": ", ".join(self.reports.paths) or self.out}


JOB = InspectJob
