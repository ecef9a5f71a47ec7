"""Tables on the terminal: no number cut, whatever the width."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from pome.cli.tables.fitted import FittedTable
from pome.cli.tables.inspect import make_survey_tables
from pome.inspection.records import Survey
from pome.inspection.survey import survey
from support.checkpoints import llama_pair
from support.surveys import draw_sheet


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return survey(*llama_pair(tmp_path_factory.mktemp("pair"), layers=3))


def show_at(width, *tables):
    console = Console(width=width, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [200, 140, 80, 45, 12])
def test_no_number_is_cut_or_folded_where_width_is_short(small, width):
    matrices = [dataclasses.replace(m, noise_share=1.71e-07, drift=6.66e-05) for m in small.matrices]
    tables = make_survey_tables(draw_sheet(Survey("b", "f", tuple(matrices), ())))
    drawn = show_at(width, *tables)
    assert max(map(len, drawn.splitlines())) <= width
    for whole, part in (("1.71e-07", "1.71"), ("6.66e-05", "6.66")):
        assert drawn.replace(whole, "").count(part) == 0
    heads = tables[0].heads
    first = drawn.splitlines()[0].rstrip()
    count = next(n for n in range(len(heads), 0, -1) if first.endswith(heads[n - 1]))
    dropped = " ".join(drawn.split()).partition("not shown for want of width: ")[2]
    assert dropped.startswith(f"{', '.join(heads[count:])}; --csv has them") if count < len(heads) else not dropped


def test_long_names_give_way_to_numbers():
    table = FittedTable("name", "k", where="")
    table.add_row("x" * 100, "1234567890")
    table.add_row("[red]y[/red]", "2")
    lines = show_at(40, table).splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["k", "1234567890"]
    assert "".join(line.split()[0] for line in lines[1:-1]) == "x" * 100
    assert lines[-1].split() == ["[red]y[/red]", "2"]
