"""Table that fits its place on the terminal without cutting a number."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pome.cli.tables.text import wrap_message, wrap_name
from pome.errors import printable

NAME_WIDTH = 24  # a name folds to no less: folded names are hard to read
GAP = 2  # columns between two cells


class FittedTable:
    """A table that fits its place. No number is cut or folded: part of a number would be read as another number.

    Only the columns of `texts` (their indices) are folded, between the parts of a name. If that is not enough, whole
    columns are left out, from the last on, and a line says which, and `where` they can be found. `lefts` are the
    columns aligned to the left.
    """

    def __init__(self, *heads: str, texts: tuple[int, ...] = (0,), lefts: tuple[int, ...] = (0,), where: str) -> None:
        self.heads, self.texts, self.lefts, self.where = tuple(map(printable, heads)), texts, lefts, where
        self.rows: list[tuple[list[Text], str | None]] = []

    def add_row(self, *cells: str | Text, style: str | None = None) -> None:
        self.rows.append(([cell if isinstance(cell, Text) else Text(printable(cell, 300)) for cell in cells], style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [max([len(head), *(cells[i].cell_len for cells, _ in self.rows)]) for i, head in enumerate(self.heads)]
        fitted = self._fit(widths, options.max_width)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, width in enumerate(fitted):
            table.add_column(
                Text(self.heads[i]), justify="left" if i in self.lefts else "right", min_width=width, no_wrap=True,
                overflow="fold" if i in self.texts else "crop",
            )  # fmt: skip
        for cells, style in self.rows:
            shown = [
                Text(wrap_name(cell.plain, width), cell.style) if cell.cell_len > width else cell
                for cell, width in zip(cells, fitted, strict=False)
            ]
            table.add_row(*shown, style=style)
        yield table
        left_out = self.heads[len(fitted) :]
        if left_out:
            said = f"not shown for want of width: {', '.join(left_out)}; {self.where}"
            yield Text(wrap_message(said, options.max_width), style="dim")

    def _fit(self, widths: list[int], available: int) -> list[int]:
        """The widths of the columns that are shown: texts as wide as there is place, numbers as wide as they are."""
        least = [min(width, NAME_WIDTH) if i in self.texts else width for i, width in enumerate(widths)]
        count = len(least)
        while count > 1 and sum(least[:count]) + GAP * (count - 1) > available:
            count -= 1
        fitted = least[:count]
        free = available - sum(fitted) - GAP * (count - 1)
        if free < 0:  # one column alone, wider than the terminal
            return [max(1, min(fitted[0], available))]
        for i in self.texts:
            if i < count:
                more = min(free, widths[i] - fitted[i])
                fitted[i] += more
                free -= more
        return fitted
