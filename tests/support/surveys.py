"""Sheets of surveys, for tests of reports."""

from __future__ import annotations

from pome.inspection.suggest import list_warnings, suggest
from pome.reports.sheet import make_sheet


def draw_sheet(found):
    return make_sheet(found, list_warnings(found.matrices), suggest(found.base, found.fine_tuned, found.matrices))
