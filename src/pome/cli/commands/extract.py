"""`pome extract`: the update of a full fine-tune as a PEFT LoRA."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pome.cli.batch import Job, read_name, read_sides
from pome.cli.console import make_console, print_lines, show_progress, write_document
from pome.cli.options import AsJson, Base, Config, FineTuned, Given, Out, Quiet
from pome.cli.outputs import accept_finished, check_upload, push
from pome.config.extraction import ExtractSpec
from pome.config.options import RUN, Option, find_options, pick_options
from pome.config.outputs import Publication, Replacing, Reports
from pome.config.yaml_text import make_spec
from pome.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from pome.manifest import Manifest

TAKES = (ExtractSpec, Publication, Replacing)
EXAMPLES = (
    "pome extract ./base ./fine-tuned ./adapter --rank 32",
    "pome extract ./base ./fine-tuned ./adapter --energy 0.9 --uniform-rank",
    "pome extract ./base ./fine-tuned ./adapter --rank 32 --save-modules --dry-run",
)


def run(
    base: Base,
    ft: FineTuned,
    out: Out,
    given: Given,
    config: Config = None,
    dry_run: Annotated[bool, Option("Print the plan and write nothing.", group=RUN)] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write to OUT a PEFT LoRA of BASE that holds the update of FT, with the best approximation of each matrix.

    Exit status: 0 done; 1 an error of the input or the machine; 2 usage; 130 interrupted, and the same command goes on.
    """
    spec = make_spec(config, pick_options(given, ExtractSpec), ExtractSpec, ExtractJob.check)
    publication = Publication(**pick_options(given, Publication))
    replacing = Replacing(**pick_options(given, Replacing))
    console = make_console(quiet)
    if dry_run:
        show_plan(base, ft, Path(out), spec, console, as_json, replacing.overwrite)
        return
    keep_freed_memory()
    manifest = make_extraction(base, ft, Path(out), spec, console, publication, replacing)
    if as_json:
        write_document([manifest.to_json()], f"{printable(out)} is complete, but ")
    push(Path(out), publication, console)


def keep_freed_memory() -> None:
    """Leave freed memory of some MiB with the process, where glibc can be told: the pages of a small matrix are not
    fetched anew for the next one. An edit has fewer passes over its matrices, and would hold more at its peak."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no libc to load, or another than glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, nbytes in ((-3, 32 << 20), (-1, 64 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, nbytes)


def show_plan(
    base: str, ft: str, out: Path, spec: ExtractSpec, console: Console, as_json: bool, overwrite: bool
) -> None:
    from pome.cli.tables.extract import describe_extraction, describe_needs, make_lora_table
    from pome.editing.extract import plan_opened
    from pome.editing.session import open_pair
    from pome.output.target import check_target

    with open_pair(base, ft, spec) as opened:
        extraction = plan_opened(opened, spec)
        target = check_target(out, opened.list_inputs(), overwrite=True)  # a dry run only says that OUT exists
        print_lines(console, [describe_extraction(opened, extraction)])
        console.print(make_lora_table(extraction))
        print_lines(console, describe_needs(extraction, spec, target, overwrite))
        if as_json:
            print(json.dumps({**extraction.to_json(), "notices": list(opened.notices)}, indent=1))


def make_extraction(
    base: str, ft: str, out: Path, spec: ExtractSpec, console: Console, publication: Publication, replacing: Replacing
) -> Manifest:
    """Extract and tell people; what can be refused without torch is refused before torch takes its seconds to load."""
    from pome.cli.tables.extract import describe_extraction, report_extraction
    from pome.editing.extract import extract, plan_opened
    from pome.editing.session import open_pair
    from pome.output.target import check_target

    check_upload(publication)
    with open_pair(base, ft, spec) as opened:
        extraction = plan_opened(opened, spec)
        check_target(out, opened.list_inputs(), replacing.overwrite)
        print_lines(console, [describe_extraction(opened, extraction)])
    with show_progress(console) as progress:
        manifest = extract(
            base, ft, out, spec, progress,
            overwrite=replacing.overwrite, fresh=replacing.fresh, card=publication.has_card,
        )  # fmt: skip
    report_extraction(manifest, out, console)
    return manifest


@dataclass(frozen=True)
class ExtractJob(Job):
    """An extraction of a batch."""

    spec: ExtractSpec
    publication: Publication
    replacing: Replacing
    writes: ClassVar[bool] = True

    @staticmethod
    def check(key: str, value: Any) -> None:
        options = find_options(ExtractSpec)
        if key in options:
            options[key].check(value)

    @classmethod
    def read(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> ExtractJob:
        base, fine_tuned, out = read_sides(values)
        publication = Publication(**pick_options(values, Publication))
        replacing = Replacing(**pick_options(values, Replacing))
        spec = ExtractSpec.from_given(pick_options(values, ExtractSpec))
        return cls(read_name(values, out), "extract", base, fine_tuned, out, spec, publication, replacing)

    def run(self, console: Console) -> dict[str, Any]:
        base, ft = str(self.base), str(self.fine_tuned)
        if not self.replacing.overwrite:
            from pome.verification.finished import find_finished

            def find() -> Manifest | None:
                return find_finished(self.folder, base, ft, self.spec, self.publication.has_card)

            if finished := accept_finished(find, self.folder, self.publication, Reports(), console):
                return finished
        manifest = make_extraction(base, ft, self.folder, self.spec, console, self.publication, self.replacing)
        push(self.folder, self.publication, console)
        return {"status": "done", "matrices": len(manifest.tensors)}


JOB = ExtractJob
