"""What a command writes beside weights: a model card, an upload, reports. No torch."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from pome.config.spec import check_text
from pome.errors import SpecError, printable

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Publication:
    """What OUT gets beside the edit: a model card in place of FT's, and an upload, which has one too.

    Raises SpecError. None of it changes a weight.
    """

    card: bool = False
    push_to_hub: str | None = None  # org/name
    private: bool = False  # of a repository that the upload makes

    def __post_init__(self) -> None:
        repo = self.push_to_hub
        if repo is not None and not (isinstance(repo, str) and REPOSITORY.fullmatch(repo)):
            raise SpecError(f"push_to_hub: {printable(str(repo))!r} is not a repository; give ORG/NAME, no revision")
        if self.private and repo is None:
            raise SpecError("private: says what an upload becomes; give push_to_hub too")

    @property
    def has_card(self) -> bool:
        return self.card or self.push_to_hub is not None


@dataclass(frozen=True)
class Reports:
    """What an inspection or a sweep writes: a page, a table, and a folder of plots; paths, or None."""

    html: str | None = None
    csv: str | None = None
    plots: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                check_text(field.name, value)

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.html, self.csv, self.plots) if path is not None]
