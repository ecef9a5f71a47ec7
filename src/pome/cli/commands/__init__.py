"""The commands, a module each: `TAKES` (declarations of options), `run` (the command line), `EXAMPLES`, and `JOB`
where a batch may hold the command. A new command is a module here and its name in `pome.choices.COMMANDS`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pome.choices import COMMANDS

if TYPE_CHECKING:
    from pome.cli.batch import Job


def load_command(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"pome.cli.commands.{name}")


def list_job_kinds() -> dict[str, type[Job]]:
    """The commands that a batch may hold, and what each makes of a job."""
    modules = {name: load_command(name) for name in COMMANDS}
    return {name: module.JOB for name, module in modules.items() if hasattr(module, "JOB")}
