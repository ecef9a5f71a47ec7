"""Warnings of an edit's records, grouped by kind, each with the option that answers it. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pome.inspection.suggest import Notice
from pome.manifest import TensorRecord

# Pattern of a warning of the kernel -> the notice for all matrices that have it, and the option for it.
KINDS = (
    (
        re.compile(r"the cut at k=\d+ falls into a cluster"),
        "The singular values on both sides of the cut are as good as equal: the data do not say which directions lie "
        "above it.",
        "--rank-ratio or --rank, with another number",
    ),
    (
        re.compile(r"only 0 of the \d+ kept singular values lie above the noise"),
        "No kept singular value lies above the noise of storage: the whole update may be rounding.",
        "--exclude, with their names",
    ),
    (
        re.compile(r"only \d+ of the \d+ kept singular values lie above the noise"),
        "Most of the kept singular values lie below the noise of storage: what is kept there is rounding.",
        "--rank-rule noise-floor",
    ),
    (
        re.compile(r"W_ft has rank \d+ and W_base \d+"),
        "The fine-tuned weight has a lower rank than its base: which directions get the base's other singular values "
        "is not determined.",
        "--exclude, with their names",
    ),
    (
        re.compile(r"singular values of W_ft are tied"),
        "The fine-tuned weight has equal singular values where its base has others: which directions get which is not "
        "determined.",
        "--exclude, with their names",
    ),
    (
        re.compile(r"[\w ,.-]+ handed over: "),
        "A faster solver could not be certified and a slower one was used; the result is certified all the same.",
        "",
    ),
)


def group_warnings(records: Iterable[TensorRecord]) -> list[Notice]:
    """One notice for each kind of warning, in the order in which they come; a text of another kind is its own."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for record in records:
        for text in record.warnings:
            kind = next(((said, option) for pattern, said, option in KINDS if pattern.match(text)), (text, ""))
            found.setdefault(kind, {})[record.title] = None
    return [Notice(said, option, tuple(titles)) for (said, option), titles in found.items()]
