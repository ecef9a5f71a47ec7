"""README's tables of options are those that are declared."""

from __future__ import annotations

from option_tables import MARKED, README, fill_tables, make_table
from pome.config.spec import EDIT_OPTIONS


def test_the_tables_in_the_readme_are_the_declared_ones() -> None:
    text = README.read_text(encoding="utf-8")
    assert [match[2] for match in MARKED.finditer(text)] == ["edit", "sweep"]
    assert fill_tables(text) == text, "run scripts/option_tables.py"


def test_a_table_names_every_option_of_the_command_line() -> None:
    table = make_table("edit")
    for name, option in EDIT_OPTIONS.items():
        assert (f"| `--{name.replace('_', '-')}" in table) == option.on_command_line
