"""Table that fits its place on the terminal without cutting a number."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pome.errors import printable

NAME_WIDTH = 24  # a name folds to no less: folded names are hard to read


class FittedTable:
    """A table that fits its place. No number is cut or folded: part of a number would be read as another number.

    Only the columns of `texts` (their indices) are folded. If that is not enough, whole columns are left out, from the
    last on, and a line says which, and `where` they can be found. `lefts` are the columns aligned to the left.
    """

    def __init__(self, *heads: str, texts: tuple[int, ...] = (0,), lefts: tuple[int, ...] = (0,), where: str) -> None:
        self.heads, self.texts, self.lefts, self.where = tuple(map(printable, heads)), texts, lefts, where
        self.rows: list[tuple[list[Text], str | None]] = []

    def add_row(self, *cells: str | Text, style: str | None = None) -> None:
        self.rows.append(([cell if isinstance(cell, Text) else Text(printable(cell, 300)) for cell in cells], style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [max([len(head), *(cells[i].cell_len for cells, _ in self.rows)]) for i, head in enumerate(self.heads)]
        least = [min(width, NAME_WIDTH) if i in self.texts else width for i, width in enumerate(widths)]
        count = len(least)
        while count > 1 and sum(least[:count]) + 2 * (count - 1) > options.max_width:
            count -= 1
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, head in enumerate(self.heads[:count]):
            table.add_column(
                Text(head), justify="left" if i in self.lefts else "right", overflow="fold", min_width=least[i],
                no_wrap=i not in self.texts,
            )  # fmt: skip
        for cells, style in self.rows:
            table.add_row(*cells[:count], style=style)
        yield table
        if count < len(self.heads):
            yield Text(f"not shown for want of width: {', '.join(self.heads[count:])}; {self.where}", style="dim")
