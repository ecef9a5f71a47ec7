#!/usr/bin/env python3
"""The tables of options in docs/reference/options.md, made from the declarations.

scripts/option_tables.py             # writes them anew between their marks
scripts/option_tables.py edit        # prints one
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pome.choices import COMMANDS
from pome.cli.commands import load_command
from pome.cli.help import name_option, show_default
from pome.cli.options import find_flag, list_command_options
from pome.config.options import LIKE_EDIT, LIST_COMMANDS, Option, describe_option

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "options.md"
MARKED = re.compile(r"(<!-- options of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = ["| option | meaning | default |", "|---|---|---|"]


def make_table(command: str) -> str:
    """The options of a command; those that a sweep or an estimate shares with edit are named together."""
    options = _list_shown(command)
    takes_edits = command in (*LIST_COMMANDS, *LIKE_EDIT)
    shared = {name: options.pop(name) for name in _list_shown("edit") if name in options} if takes_edits else {}
    rows = [(f"`{name_option(option, command)}`", describe_option(option), _code(show_default(option)))
            for option in options.values()]  # fmt: skip
    if shared and command in LIKE_EDIT:
        rows += [(", ".join(f"`{find_flag(option)}`" for option in shared.values()), "As in `edit`.", "")]
    elif shared:
        axes = ", ".join(f"`{find_flag(option)}`" for option in shared.values() if option.axis)
        rest = ", ".join(f"`{find_flag(option)}`" for option in shared.values() if not option.axis)
        lists = "As in `edit`, but lists: a comma separates what is tried, `+` joins roles into one edit."
        rows = [(axes, lists, ""), *rows, (rest, "As in `edit`.", "")]
    return "\n".join([*HEAD, *(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in rows)]) + "\n"


def fill_tables(text: str) -> str:
    """A document with its tables as they are declared now."""
    return MARKED.sub(lambda match: match[1] + make_table(match[2]) + match[3], text)


def _list_shown(command: str) -> dict[str, Option]:
    options = list_command_options(command, load_command(command))
    return {name: option for name, option in options.items() if command not in option.hidden_in}


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    if sys.argv[1:]:
        print(make_table(sys.argv[1]) if sys.argv[1] in COMMANDS else f"none of {', '.join(COMMANDS)}", end="")
    else:
        PAGE.write_text(fill_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
