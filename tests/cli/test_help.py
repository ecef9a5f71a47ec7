"""Help, usage errors and completion: golden texts at 80 columns, and what a shell is offered."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pome.choices import COMMANDS, RANK_RULES
from pome.cli.app import USAGE_ERROR, app, run_command
from pome.cli.commands import load_command
from pome.cli.options import find_flag, list_arguments, list_command_options
from support.checkpoints import environment

GOLDEN = Path(__file__).parent / "help"
MOST_LINES = 60  # of a terminal's window, so that the whole is seen


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of one command."""
    status = run_command(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("command", ["pome", *COMMANDS])
def test_help_is_the_golden_text(capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = ["--help"] if command == "pome" else [command, "--help"]
    status, out, _ = run(capsys, *arguments)
    golden = GOLDEN / f"{command}.txt"
    assert (status, out) == (0, golden.read_text()), f"COLUMNS=80 pome {' '.join(arguments)} > {golden}"
    assert out.count("\n") <= MOST_LINES and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_names_every_option_and_help_the_everyday_ones(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (_, everyday, _), (status, everything, _) = (run(capsys, command, flag) for flag in ("-h", "--help-all"))
    assert status == 0
    for option in list_command_options(command, load_command(command)).values():
        shown = command not in option.hidden_in
        assert (f"{find_flag(option)} " in everything.replace("\n", " \n")) == shown
        assert (f"  {find_flag(option)} " in everyday.replace("\n", " \n") or option.short != "") == (
            shown and option.everyday
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_in_the_help_is_a_command_line_that_is_understood(command: str) -> None:
    examples = load_command(command).EXAMPLES
    assert len(examples) == 3
    for example in examples:
        pome, name, *arguments = shlex.split(example)
        assert (pome, name) == ("pome", command)
        # Parsed, not run: one of them names models on the Hub. What does not exist is refused here.
        context = typer.main.get_command(app).commands[command].make_context(command, arguments)
        given = {key for key, value in context.params.items() if value not in (None, False, [], ())}
        assert given >= set(list_arguments(load_command(command).run)) - {"ft"}
        with pytest.raises(USAGE_ERROR):
            typer.main.get_command(app).commands[command].make_context(command, [*arguments, "--no-such"])


def test_pome_alone_shows_the_main_job_first(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys)
    assert (status, out) == (2, "")
    assert err == (GOLDEN / "pome.txt").read_text()
    assert err.index("pome edit BASE FT OUT") < err.index("Commands:")


EDIT_USAGE = "Usage: pome edit BASE FT OUT [OPTIONS]\n`pome edit --help` tells more\n"
POME_USAGE = "Usage: pome COMMAND ...\n`pome --help` tells more\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("edit base", "FT: missing\n" + EDIT_USAGE),
        ("edit base ft out more", "more: too many arguments\n" + EDIT_USAGE),
        ("edit base ft out --bta 2", "--bta: no such option; did you mean '--beta'?\n" + EDIT_USAGE),
        ("edit base ft out --rank", "--rank: needs a value\n" + EDIT_USAGE),
        ("edit base ft out --card=yes", "--card: is a switch and takes no value\n" + EDIT_USAGE),
        ("edut base ft out", "edut: no such command; did you mean 'edit'?\n" + POME_USAGE),
        ("--frob", "--frob: no such option\n" + POME_USAGE),
        ("edit base ft out --scale frob", "--scale: 'frob' is not one of frobenius, unit, rms, mean, spectral; did you "
         "mean 'frobenius'?\n"),
        ("edit base ft out --rank 10 --rank-ratio 0.5",
         "--rank-ratio: has no effect with --rank; give one of the two\n"),
        ("edit base ft out --rank-rule energy --rank-ratio 0.5",
         "--rank-ratio: has no effect with --rank-rule 'energy'; give one of the two\n"),
        ("edit base ft out --rank-rule fixed", "--rank-rule: 'fixed' needs --rank, the number of directions to keep\n"),
        ("edit base ft out --rank-ratio x", "--rank-ratio: 'x' is not a number above 0 and at most 1\n"),
        ("edit base ft out --beta 1e9", "--beta: 1000000000.0 is not a number from 1e-06 to 1e+06\n"),
        ("edit base ft out --private", "--private: says what an upload becomes; give --push-to-hub too\n"),
        ("sweep base ft out", "nothing to score with; give one of --score-cmd, --loss and --lm-eval\n"),
        ("sweep base ft out --loss x --limit 3", "--limit: goes with --lm-eval, not with --loss\n"),
        ("sweep base ft out --lm-eval x --search all", "--search: 'all' is not one of grid, coordinate\n"),
        ("sweep base ft out --lm-eval x --dtype float32",
         "--dtype: a sweep scores candidates in the fine-tuned model's own layout; leave it out, and give it to "
         "`pome edit` with the options that win\n"),
    ],
)  # fmt: skip
def test_a_usage_error_is_told_in_our_words(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    assert run(capsys, *arguments.split()) == (2, "", f"error: {said}")


def complete(line: str) -> list[str]:
    """What a shell is offered for the last word of a command line."""
    more = {"_POME_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    result = subprocess.run(
        [sys.executable, "-m", "pome"], env={**environment(), **more}, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()


def test_a_shell_completes_roles_rules_and_lists_of_them() -> None:
    assert complete("pome edit a b c --layers at") == ["attention"]
    assert complete("pome edit a b c --rank-rule ") == list(RANK_RULES)
    assert complete("pome sweep a b c --scale mean,fr") == ["mean,frobenius"]
