"""The tables of options on their page are those that are declared."""

from __future__ import annotations

from option_tables import MARKED, PAGE, fill_tables, make_table
from pome.config.spec import EDIT_OPTIONS


def test_the_tables_on_the_page_are_the_declared_ones() -> None:
    text = PAGE.read_text(encoding="utf-8")
    commands = ["edit", "inspect", "extract", "sweep", "estimate", "verify", "batch"]
    assert [match[2] for match in MARKED.finditer(text)] == commands
    assert fill_tables(text) == text, "run scripts/option_tables.py"


def test_a_table_names_every_option_of_the_command_line() -> None:
    table = make_table("edit")
    for name, option in EDIT_OPTIONS.items():
        assert (f"| `--{name.replace('_', '-')}" in table) == option.on_command_line
