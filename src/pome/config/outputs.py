"""Options of what a command writes beside weights: a model card, an upload, reports; and of what it may replace."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pome.config.options import OUTPUT, RUN, Option, documented, find_options
from pome.errors import SpecError, printable

SELDOM_IN_SWEEP = {"sweep": {"everyday": False}}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _read_repository(key: str, value: object) -> str:
    if not (isinstance(value, str) and REPOSITORY.fullmatch(value)):
        said = f"{key}: {printable(str(value))!r} is not a repository; give ORG/NAME, no revision"
        raise SpecError(said, options=[key])
    return value


@documented
@dataclass(frozen=True)
class Publication:
    """Options for publishing OUT: a model card, and an upload, which writes a card as well.

    Raises SpecError. None of it changes a weight.
    """

    card: Annotated[
        bool,
        Option(
            "Write a model card in place of FT's README.md.",
            group=OUTPUT, instead={**SELDOM_IN_SWEEP, "extract": {"help": "Write a model card, README.md."}},
        ),
    ] = False  # fmt: skip
    push_to_hub: Annotated[
        str | None,
        Option(
            "Upload OUT with its model card; makes the repository.",
            metavar="ORG/NAME", group=OUTPUT, read=_read_repository, instead=SELDOM_IN_SWEEP,
        ),
    ] = None  # fmt: skip
    private: Annotated[bool, Option("Make the repository of --push-to-hub private.", group=OUTPUT, everyday=False)] = (
        False
    )

    def __post_init__(self) -> None:
        _check_all(self)
        if self.private and self.push_to_hub is None:
            said = "private: says what an upload becomes; give push_to_hub too"
            raise SpecError(said, options=["private", "push_to_hub"])

    @property
    def has_card(self) -> bool:
        return self.card or self.push_to_hub is not None


@documented
@dataclass(frozen=True)
class Reports:
    """What an inspection or a sweep writes: a page, a table, and a folder of plots; paths, or None."""

    html: Annotated[str | None, Option("Write the result as one page.", metavar="FILE", group=OUTPUT)] = None
    csv: Annotated[str | None, Option("Write the result as a table.", metavar="FILE", group=OUTPUT)] = None
    plots: Annotated[
        str | None, Option("Write plots, PNG and SVG; needs pome-edit[plot].", metavar="DIR", group=OUTPUT)
    ] = None

    def __post_init__(self) -> None:
        _check_all(self)

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.html, self.csv, self.plots) if path is not None]


@documented
@dataclass(frozen=True)
class Replacing:
    """Options for what may be replaced or deleted of an earlier run."""

    overwrite: Annotated[bool, Option("Replace an existing OUT, whatever lies there.", group=OUTPUT)] = False
    fresh: Annotated[bool, Option("Drop what an interrupted run has done.", group=RUN)] = False

    def __post_init__(self) -> None:
        _check_all(self)


def _check_all(options: Publication | Reports | Replacing) -> None:
    for name, option in find_options(type(options)).items():
        option.check(getattr(options, name))
