"""HTML pages from templates: one layout and one style sheet, every text escaped. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pome.errors import printable

TEMPLATES = Path(__file__).parent / "templates"
LONGEST_TEXT = 2000  # characters of one text in a page


def render_page(template: str, **values: Any) -> str:
    """The page of a template, with style and scripts inside, so that it needs no other file and no network.

    Texts are escaped and made printable as they go into the page: names come from checkpoints that nobody vetted.
    """
    # Only a command that writes a page pays for loading jinja2.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def escape_control_characters(value: Any) -> Any:
        is_markup = hasattr(value, "__html__")
        return printable(value, LONGEST_TEXT) if isinstance(value, str) and not is_markup else value

    def read_template(name: str) -> str:
        """A file of ours as it is: style sheets and scripts hold braces that are not jinja's."""
        return (TEMPLATES / name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=escape_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["read_template"] = read_template
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template).render(**values)
