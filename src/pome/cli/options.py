"""From declared options to a command line: typer's parameters, texts to values, completion of a shell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from pome.config.options import RUN, Option, as_flag, find_options, list_options
from pome.errors import SpecError


@dataclass(frozen=True)
class Argument:
    """What is known of an argument of a command: its name in the usage line, and what it is."""

    metavar: str
    help: str


Given = dict[str, Any]  # options by name, those that were given

# Parameters that several commands share.
Base = Annotated[str, Argument("BASE", "Pretrained: folder, .safetensors file or Hub id.")]
FineTuned = Annotated[str, Argument("FT", "Fine-tuned: folder, .safetensors file or Hub id.")]
Out = Annotated[str, Argument("OUT", "Folder to make.")]
Config = Annotated[
    Path | None, Option("YAML with these names as keys; options win.", metavar="FILE", group=RUN)
]  # fmt: skip
AsJson = Annotated[bool, Option("One JSON document on stdout; all else on stderr.", flag="--json", group=RUN)]
Quiet = Annotated[bool, Option("Print nothing but errors.", short="-q", group=RUN)]


def list_arguments(run: Callable[..., None]) -> dict[str, Argument]:
    """The arguments that a command's function declares, by name."""
    found = {}
    for name, hint in get_type_hints(run, include_extras=True).items():
        for kind in (hint, *get_args(hint)):  # Python 3.10 wraps it once more where the default is None
            for row in getattr(kind, "__metadata__", ()):
                if isinstance(row, Argument):
                    found[name] = row
    return found


def list_command_options(name: str, module: Any) -> dict[str, Option]:
    """All options of a command's command line, by name: those it shares, then those of its function."""
    declared = {key: option for key, option in list_options(module.TAKES, name).items() if option.on_command_line}
    return {**declared, **find_options(module.run)}


def find_flag(option: Option) -> str:
    """An option's name on the command line."""
    return option.flag or as_flag(option.name)


def make_callback(name: str, module: Any, show_all: Callable[[bool], None]) -> Callable[..., None]:
    """The function that typer calls for a command, with the signature that the declarations say.

    typer sees texts and switches only: every value is read and refused in words of our own. `show_all` is called with
    True for --help-all.
    """
    run = module.run
    arguments, options = list_arguments(run), list_command_options(name, module)
    own = find_options(run)

    def call(help_all: bool, **texts: Any) -> None:
        for key, argument in arguments.items():
            refuse_empty(argument.metavar, texts[key])
        given = {}
        for key, option in options.items():
            value = texts[key]
            if value in (None, False, [], ()):
                continue
            refuse_empty(find_flag(option), value)
            listed = option.takes_list(name)
            given[key] = tuple(value) if listed else option.parse(value)
        passed = {key: texts[key] for key in arguments}
        if "given" in inspect.signature(run).parameters:
            passed["given"] = {key: value for key, value in given.items() if key not in own}
        run(**passed, **{key: value for key, value in given.items() if key in own})

    parameters = [_make_argument(run, key, argument) for key, argument in arguments.items()]
    parameters += [_make_option(name, option) for option in options.values()]
    everything = typer.Option("--help-all", is_eager=True, callback=show_all, help="All options.")
    parameters.append(_make_parameter("help_all", Annotated[bool, everything], False))
    # inspect and typer read it; mypy does not know that a function may have one.
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = run.__doc__
    return call


def refuse_empty(name: str, value: Any) -> None:
    """Refuse an empty text, which would mean the working folder: in CI it comes from a variable that is not set."""
    if "" in (value if isinstance(value, (list, tuple)) else (value,)):
        raise SpecError(f"{name}: empty; is a variable unset?")


def _make_parameter(key: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)


def _make_argument(run: Callable[..., None], key: str, argument: Argument) -> inspect.Parameter:
    default = inspect.signature(run).parameters[key].default
    kind: Any = str if default is inspect.Parameter.empty else str | None
    return _make_parameter(key, Annotated[kind, typer.Argument(metavar=argument.metavar, help=argument.help)], default)


def _make_option(command: str, option: Option) -> inspect.Parameter:
    names = [find_flag(option), *([option.short] if option.short else [])]
    if option.is_switch:
        return _make_parameter(option.name, Annotated[bool, typer.Option(*names, help=option.help)], False)
    kind: Any = list[str] | None if option.takes_list(command) else str | None
    words = list(option.choices or option.suggestions)
    complete = _make_completion(words) if words else None
    info = typer.Option(*names, metavar=option.metavar, help=option.help, autocompletion=complete)
    return _make_parameter(option.name, Annotated[kind, info], None)


def _make_completion(words: Iterable[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        # What stands before the last comma of a list is done.
        done, comma, begun = incomplete.rpartition(",")
        return [done + comma + word for word in words if word.startswith(begun)]

    return complete
