"""Steps after an output is written: the closing table, the upload, and jobs that were done already."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from pome.cli.console import print_lines
from pome.config.outputs import Publication, Reports
from pome.errors import OutputError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from pome.manifest import Manifest


HYPOTHESIS = "An edit is a hypothesis until `pome sweep` or a test of your own has tried it."
_told: WeakSet[Console] = WeakSet()  # the consoles on which that was said


def report_edit(manifest: Manifest, out: Path, console: Console) -> None:
    """Show what was edited, what was kept, and what OUT is now."""
    from pome.cli.tables.edit import (
        describe_closing,
        describe_kept,
        describe_left_out,
        describe_warnings,
        make_closing_table,
    )

    if manifest.tensors:
        console.print(make_closing_table(manifest))
    lines = [*describe_kept(manifest.kept), *describe_left_out(manifest.not_copied), *describe_warnings(manifest)]
    if not manifest.tensors:
        same = "OUT is BASE with the adapter merged" if manifest.template == "BASE" else "OUT equals FT"
        lines.append(f"warning: no matrix was edited; {same}")
    print_lines(console, [*lines, *describe_closing(manifest, out)])
    if manifest.tensors and manifest.sweep is None and console not in _told:
        _told.add(console)
        print_lines(console, [HYPOTHESIS])


def check_upload(publication: Publication) -> None:
    """Refuse an upload that was asked for and cannot be made, before the work. Raises HubError."""
    if publication.push_to_hub is not None:
        from pome.output.upload import check_login

        check_login(publication.push_to_hub)


def push(out: Path, publication: Publication, console: Console) -> None:
    """Upload OUT, if that was asked for."""
    if publication.push_to_hub is not None:
        from pome.output.upload import push_output

        address = push_output(out, publication.push_to_hub, private=publication.private)
        print_lines(console, [f"uploaded to {address}"])


def accept_finished(
    find: Callable[[], Manifest | None], out: Path, publication: Publication, reports: Reports, console: Console
) -> dict[str, Any] | None:
    """The result of a job whose output an earlier run made, whole and as it is asked for now; else None."""
    manifest = find()
    if manifest is None:
        return None
    missing = [path for path in reports.paths if not os.path.exists(os.path.expanduser(path))]
    if missing:  # they need every score again, which are gone with OUT written
        said = f"made by an earlier run, but {printable(missing[0])} is not there; 'overwrite: true' runs it all again"
        raise OutputError(f"{printable(str(out))}: {said}")
    console.print("done by an earlier run", highlight=False)
    push(out, publication, console)
    return {"status": "done", "matrices": len(manifest.tensors)}
