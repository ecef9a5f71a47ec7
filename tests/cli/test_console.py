"""What people read: lines as they are, and options named as the command line names them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pome.cli.console import name_options, print_lines
from pome.config.options import find_options
from pome.config.outputs import Publication
from pome.config.spec import EditSpec
from pome.errors import SpecError


def test_lines_are_neither_folded_nor_read_as_markup_and_no_terminal_acts_on_them() -> None:
    file = io.StringIO()
    print_lines(Console(file=file, width=20), ["[red]one[/red] two three four five", "a\nb", "\x1b[31mred\u202e"])
    assert file.getvalue() == "[red]one[/red] two three four five\na\nb\n\\x1b[31mred\\u202e\n"


@pytest.mark.parametrize(
    ("options", "argument", "flag"),
    [
        ({"rank_ratio": 2}, "rank_ratio: 2 is not", "--rank-ratio: 2 is not"),
        ({"rank": 3, "rank_rule": "energy"}, "rank: rank and rank_rule 'energy'",
         "--rank: --rank and --rank-rule 'energy'"),
        ({"layers": "rank"}, "layers: 'rank' is neither", "--layers: 'rank' is neither"),
        ({"exclude": "exclude("}, "exclude: 'exclude(' is not", "--exclude: 'exclude(' is not"),
        ({"scale": "a scale b"}, "scale: 'a scale b' is not", "--scale: 'a scale b' is not"),
    ],
)  # fmt: skip
def test_an_error_names_arguments_and_the_command_line_options(
    options: dict[str, object], argument: str, flag: str
) -> None:
    with pytest.raises(SpecError) as caught:
        EditSpec.from_mapping(options)
    assert str(caught.value).startswith(argument)
    assert name_options(caught.value).startswith(flag)


def test_every_refusal_of_a_value_names_its_option() -> None:
    for owner in (EditSpec, Publication):
        for name, option in find_options(owner).items():
            with pytest.raises(SpecError) as caught:
                option.check(object())
            assert name in caught.value.options
