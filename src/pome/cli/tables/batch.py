"""Closing table of `pome batch`: a row for each job."""

from __future__ import annotations

from typing import Any

from pome.cli.tables.fitted import FittedTable


def make_batch_table(results: list[dict[str, Any]]) -> FittedTable:
    """A row for each job of a batch."""
    heads = ("job", "status", "matrices", "seconds", "out or error")
    table = FittedTable(*heads, texts=(0, 4), lefts=(0, 1, 4), where="--json has them")
    for result in results:
        good = result["status"] == "done"
        last = result["out"] if good else result["error"]
        table.add_row(
            result["name"],
            result["status"],
            str(result.get("matrices", "-")),
            f"{result['seconds']:.1f}",
            last,
            style=None if good else "dim" if result["status"] == "not run" else "red",
        )
    return table
