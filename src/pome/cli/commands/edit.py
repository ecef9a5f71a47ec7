"""`pome edit`: the main job, from checkpoint to checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pome.cli.batch import Job, read_name, read_sides
from pome.cli.console import make_console, print_lines, show_progress, write_document
from pome.cli.options import AsJson, Base, Config, FineTuned, Given, Out, Quiet
from pome.cli.outputs import accept_finished, check_upload, push, report_edit
from pome.config.options import RUN, Option, pick_options
from pome.config.outputs import Publication, Replacing, Reports
from pome.config.preset import Preset, pick_edit_options
from pome.config.spec import EditSpec
from pome.config.yaml_text import make_spec
from pome.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from pome.manifest import Manifest

TAKES = (EditSpec, Preset, Publication, Replacing)
EXAMPLES = (
    "pome edit mistralai/Mistral-7B-v0.1 meta-math/MetaMath-Mistral-7B out",
    "pome edit ./base ./fine-tuned ./out --layers ffn --beta 1.5",
    "pome edit ./base ./fine-tuned ./out --dry-run",
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
    """Write to OUT the checkpoint FT with the updates of chosen matrices equalized.

    Exit status: 0 done; 1 an error of the input or the machine; 2 usage; 130 interrupted, and the same command goes on.
    """
    spec = make_spec(config, pick_edit_options(given, EditSpec), EditSpec)
    publication, replacing = (
        Publication(**pick_options(given, Publication)),
        Replacing(**pick_options(given, Replacing)),
    )
    console = make_console(quiet)
    if dry_run:
        show_plan(base, ft, Path(out), spec, console, as_json, replacing.overwrite)
        return
    manifest = make_edit(base, ft, Path(out), spec, console, publication, replacing)
    if as_json:
        write_document([manifest.to_json()], f"{printable(out)} is complete, but ")
    push(Path(out), publication, console)


def show_plan(base: str, ft: str, out: Path, spec: EditSpec, console: Console, as_json: bool, overwrite: bool) -> None:
    from pome.cli.tables.edit import describe_left_out, describe_needs, describe_plan, make_plan_table
    from pome.editing.session import open_pair
    from pome.output.target import check_target
    from pome.planning.devices import find_device
    from pome.planning.rates import find_rates

    begun = time.perf_counter()
    with open_pair(base, ft, spec) as opened:
        device = find_device(spec.device)
        cost = opened.estimate(spec, device, find_rates(device.name), time.perf_counter() - begun)
        target = check_target(out, opened.list_inputs(), overwrite=True)  # a dry run only says that OUT exists
        print_lines(console, [describe_plan(opened), *describe_left_out(opened.not_copied)])
        console.print(make_plan_table(opened))
        print_lines(console, describe_needs(opened, spec, target, overwrite, cost))
        if as_json:
            print(json.dumps({**opened.to_json(), "estimate": cost.to_json()}, indent=1))


def make_edit(
    base: str, ft: str, out: Path, spec: EditSpec, console: Console, publication: Publication, replacing: Replacing
) -> Manifest:
    """Edit and tell people; what can be refused without torch is refused before torch takes its seconds to load."""
    from pome.cli.tables.edit import describe_plan
    from pome.editing.edit import edit
    from pome.editing.session import open_pair
    from pome.output.target import check_target

    check_upload(publication)
    with open_pair(base, ft, spec) as opened:
        check_target(out, opened.list_inputs(), replacing.overwrite)
        print_lines(console, [describe_plan(opened)])
    with show_progress(console) as progress:
        manifest = edit(
            base, ft, out, spec, progress,
            overwrite=replacing.overwrite, fresh=replacing.fresh, card=publication.has_card,
        )  # fmt: skip
    report_edit(manifest, out, console)
    return manifest


@dataclass(frozen=True)
class EditJob(Job):
    """An edit of a batch."""

    spec: EditSpec
    publication: Publication
    replacing: Replacing
    writes: ClassVar[bool] = True

    @classmethod
    def read(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> EditJob:
        base, fine_tuned, out = read_sides(values)
        publication = Publication(**pick_options(values, Publication))
        replacing = Replacing(**pick_options(values, Replacing))
        spec = EditSpec.from_given(pick_edit_options(values, EditSpec))
        return cls(read_name(values, out), "edit", base, fine_tuned, out, spec, publication, replacing)

    @property
    def engine(self) -> str:
        return self.spec.engine

    def run(self, console: Console) -> dict[str, Any]:
        base, ft = str(self.base), str(self.fine_tuned)
        if not self.replacing.overwrite:
            from pome.verification.finished import find_finished

            def find() -> Manifest | None:
                return find_finished(self.folder, base, ft, self.spec, self.publication.has_card)

            if finished := accept_finished(find, self.folder, self.publication, Reports(), console):
                return finished
        manifest = make_edit(base, ft, self.folder, self.spec, console, self.publication, self.replacing)
        push(self.folder, self.publication, console)
        return {"status": "done", "matrices": len(manifest.tensors)}


JOB = EditJob
