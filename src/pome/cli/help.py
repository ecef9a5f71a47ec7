"""Help and usage errors, made from the declared options."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import textwrap
from typing import Any

from pome.choices import COMMANDS
from pome.cli.commands import load_command
from pome.cli.options import find_flag, list_arguments, list_command_options
from pome.config.options import GROUP_ORDER, LIST_COMMANDS, Option, nearest
from pome.errors import printable

MOST_WIDTH = 100  # longer lines are hard to read
COLUMN = 28  # where the explanations begin
NO_BREAK = "\xa0"  # a space at which no line ends


def describe_command(name: str, everything: bool = False) -> str:
    """The help of a command: usage, arguments, options by group, examples, exit statuses.

    Options that are seldom needed stand there only with `everything`.
    """
    module = load_command(name)
    title, _, rest = str(inspect.getdoc(module.run)).partition("\n\n")
    options = [option for option in list_command_options(name, module).values() if name not in option.hidden_in]
    shown = [option for option in options if everything or option.everyday]
    lines = [find_usage(name), "", *_wrap(title), ""]
    for argument in list_arguments(module.run).values():
        lines += _make_row(argument.metavar, argument.help)
    for group in GROUP_ORDER:
        rows = [option for option in shown if option.group == group]
        if rows:
            lines += ["", f"{group}:"]
        for option in rows:
            lines += _make_row(name_option(option, name), explain_option(option))
    lines += ["", "Examples:", *(f"  {example}" for example in module.EXAMPLES), "", *_wrap(rest)]
    if len(shown) < len(options):
        lines += ["", f"pome {name} --help-all shows {len(options) - len(shown)} more options."]
    return "\n".join(lines) + "\n"


def describe_commands() -> str:
    """The help of pome as a whole: the main job first."""
    lines = [
        *_wrap("Improve a fine-tuned checkpoint without data or training: equalize the leading directions of its "
               "updates."),
        "",
        "  pome edit BASE FT OUT       the main job: from two checkpoints to a third",
        "  pome edit --help            its options",
        "",
        "Commands:",
    ]  # fmt: skip
    for name in COMMANDS:
        title = str(inspect.getdoc(load_command(name).run)).partition("\n\n")[0]
        lines += _make_row(name, " ".join(title.split()))
    lines += ["", "Options:"]
    for flags, text in (
        ("--version", "Print the version and leave."),
        ("--install-completion", "Complete commands and options in your shell."),
        ("--show-completion", "Print what --install-completion would add."),
        ("-h, --help", "Show this; after a command, its help."),
    ):
        lines += _make_row(flags, text)
    return "\n".join(lines) + "\n"


def find_usage(name: str) -> str:
    """The usage line of a command."""
    run = load_command(name).run
    parameters = inspect.signature(run).parameters
    words = [
        row.metavar if parameters[key].default is inspect.Parameter.empty else f"[{row.metavar}]"
        for key, row in list_arguments(run).items()
    ]
    return " ".join(["Usage: pome", name, *words, "[OPTIONS]"])


def name_option(option: Option, command: str) -> str:
    """An option with what it takes, as in `--beta B`."""
    short = f"{option.short}, " if option.short else ""
    several = ",..." if option.axis and command in LIST_COMMANDS and "," not in option.metavar else ""
    takes = "" if option.is_switch else f" {option.metavar}{several}"
    return f"{short}{find_flag(option)}{takes}"


def explain_option(option: Option) -> str:
    """An option's help with its choices and its default."""
    text = option.help
    if option.choices:
        text = f"{text.rstrip('.')}: {', '.join(option.choices)}."
    default = f"[default: {show_default(option)}]".replace(" ", NO_BREAK)
    return f"{text} {default}" if show_default(option) else text


def show_default(option: Option) -> str:
    """The default as it would be typed; empty where there is none."""
    if isinstance(option.default, tuple):
        return ", ".join(map(str, option.default))
    return "" if option.default is None or option.is_switch else str(option.default)


def describe_usage_error(error: Any, arguments: list[str]) -> int:
    """Tell what is wrong with a command line, in words of our own where typer's are poorer; returns the exit status."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    command = name if name in COMMANDS else None
    kind, said = type(error).__name__, error.format_message()
    if name is not None and command is None:
        said = f"{printable(name)}: no such command{nearest(name, COMMANDS)}"
    elif kind == "NoSuchOption":
        flags = map(find_flag, list_command_options(command, load_command(command)).values()) if command else ()
        known = [*flags, "--help", *(["--help-all"] if command else ["--version"])]
        said = f"{printable(error.option_name)}: no such option{nearest(error.option_name, known)}"
    elif kind == "MissingParameter":
        said = f"{error.param.metavar or error.param.name}: missing"
    elif "unexpected extra argument" in said:
        given = said.partition("(")[2].rpartition("(")[2].rstrip(").")
        said = f"{given}: too many arguments"
    else:
        said = re.sub(r"^Option '(--?[\w-]+)' (.*?)\.?$", _reword_option, said)
    usage = find_usage(command) if command else "Usage: pome COMMAND ..."
    print(f"error: {said}\n{usage}\n`pome {f'{command} ' if command else ''}--help` tells more", file=sys.stderr)
    return int(error.exit_code)


def _reword_option(match: re.Match[str]) -> str:
    said = {"requires an argument": "needs a value", "does not take a value": "is a switch and takes no value"}
    return f"{match[1]}: {said.get(match[2], match[2])}"


def _width() -> int:
    return min(shutil.get_terminal_size().columns, MOST_WIDTH)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _width(), break_long_words=False, break_on_hyphens=False)


def _make_row(name: str, text: str) -> list[str]:
    """Lines with a name on the left and its explanation on the right, below the name where that is too long."""
    lines = textwrap.wrap(text, max(_width() - COLUMN, 20), break_long_words=False, break_on_hyphens=False)
    lines = [line.replace(NO_BREAK, " ") for line in lines]
    first = f"  {name}".ljust(COLUMN)
    head = (
        [f"{first}{lines[0]}"]
        if len(first) == COLUMN and first[-2:] == "  "
        else [f"  {name}", " " * COLUMN + lines[0]]
    )
    return [*head, *(" " * COLUMN + line for line in lines[1:])]
