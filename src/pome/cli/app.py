"""The command line: commands registered, errors to messages and exit statuses. It decides nothing about checkpoints."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import pome
from pome.choices import COMMANDS
from pome.cli.commands import load_command
from pome.cli.console import complain, describe_error, name_options
from pome.cli.help import describe_command, describe_commands, describe_usage_error
from pome.cli.options import make_callback
from pome.errors import PomeError


class Interrupted(PomeError):
    """Ctrl-C or SIGTERM, with what is safe and how to go on."""

    exit_status = 130


class _Commands(TyperGroup):
    """The commands. Typer turns a KeyboardInterrupt into a bare exit, its message lost; so it does not reach typer."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or "interrupted; run the same command again") from None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(describe_commands())


class _Command(TyperCommand):
    """A command whose help is made from its declared options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(describe_command(str(self.name)))


app = typer.Typer(
    name="pome",
    cls=_Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Improve a fine-tuned checkpoint without data or training: equalize the leading directions of its updates.",
)

# Every error of typer's parser. Typer brings its own copy of click in some releases and needs click in others, so the
# class is taken from what typer itself exports: BadParameter, UsageError, ClickException.
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pome {pome.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


def _register(name: str) -> None:
    def show_all(wanted: bool) -> None:
        if wanted:
            print(describe_command(name, everything=True), end="")
            raise typer.Exit

    app.command(name, cls=_Command)(make_callback(name, load_command(name), show_all))


for _name in COMMANDS:
    _register(_name)


def run_command(arguments: list[str]) -> int:
    """Run one command; returns its exit status. Errors go to stderr as one message, never as a traceback."""
    if not arguments and "_POME_COMPLETE" not in os.environ:  # with which a shell asks what could come next
        print(describe_commands(), end="", file=sys.stderr)
        return 2
    try:
        status = app(arguments, standalone_mode=False, prog_name="pome")
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted; run the same command again")
        return 130
    except USAGE_ERROR as error:
        return describe_usage_error(error, arguments)
    except BrokenPipeError:  # the reader of our stdout went away: `pome ... | head`
        return 1
    except PomeError as error:
        complain(name_options(error))
        return error.exit_status
    except (OSError, MemoryError) as error:
        complain(describe_error(error))
        return 1
