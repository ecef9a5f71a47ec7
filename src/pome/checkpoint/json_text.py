"""JSON of untrusted files, scanned value by value: nothing is built from a text before its extent is known.

Stricter than JSON, as the formats are: no repeated key, only integers where a table is read, no broken Unicode.
Every fault is a ValueError; those found here are `Malformed`, with a text fit for a message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from pome.errors import printable

_SPACES = frozenset(" \t\n\r")
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN_STRING = re.compile(r'"([^"\\\x00-\x1f]*)"')  # nearly every one: no escapes


class Malformed(ValueError):
    """A fault in a text, before it is known in which file."""


def decode_text(raw: bytes) -> str:
    """The text of UTF-8 bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        # From None: the error would keep the whole input alive.
        raise Malformed(f"it is not UTF-8 at byte {error.start}") from None


def scan_object(text: str, at: int, read_value: Callable[[str, int], int]) -> int:
    """Walk the object that opens at `at`; returns the position after its closing brace.

    Each key, and where its value begins, goes to `read_value`, which returns where the value ends.
    """
    _expect("{", text, at)
    at = skip_space(text, at + 1)
    if text.startswith("}", at):
        return at + 1
    seen = set()
    while True:
        key, at = read_string(text, at)
        if key in seen:
            raise Malformed(f"the key '{printable(key)}' is there twice")
        seen.add(key)
        at = skip_space(text, at)
        _expect(":", text, at)
        at = skip_space(text, read_value(key, skip_space(text, at + 1)))
        if text.startswith("}", at):
            return at + 1
        _expect(",", text, at)
        at = skip_space(text, at + 1)


def scan_strings(text: str, at: int) -> tuple[dict[str, str], int]:
    """The object of texts that opens at `at`, and the position after its closing brace."""
    found: dict[str, str] = {}
    shared: dict[str, str] = {}  # an index repeats a few shard names for every tensor

    def read_value(key: str, at: int) -> int:
        value, at = read_string(text, at)
        found[key] = shared.setdefault(value, value)
        return at

    return found, scan_object(text, at, read_value)


def read_string(text: str, at: int) -> tuple[str, int]:
    """The text that opens with a quotation mark at `at`, and the position after its closing mark."""
    plain = _PLAIN_STRING.match(text, at)
    if plain is not None:
        return plain[1], plain.end()
    _expect('"', text, at)
    value, at = _STRICT.raw_decode(text, at)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed(f"the text '{printable(value)}' is not valid Unicode") from None
    return value, at


def skip_space(text: str, at: int) -> int:
    """The first position from `at` on that holds no white space."""
    if text[at : at + 1] not in _SPACES:
        return at
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def decode_object(text: str) -> dict[str, Any]:
    """The object that is the whole of `text`, which must be short: its values are all built."""
    found, end = _STRICT.raw_decode(text)
    if not isinstance(found, dict) or end != len(text):
        raise Malformed("an object was expected")
    return found


def measure_value(text: str) -> int:
    """Length of the value at the beginning of `text`, in characters.

    Raises RecursionError for one nested too deep.
    """
    return _ANY.raw_decode(text)[1]


def _expect(character: str, text: str, at: int) -> None:
    if not text.startswith(character, at):
        raise Malformed(f"'{character}' expected at character {at}")


def _unite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    united = dict(pairs)
    if len(united) != len(pairs):
        raise Malformed("a key is there twice")
    return united


def _refuse_number(digits: str) -> NoReturn:
    raise Malformed(f"{printable(digits, 40)} is not an integer")


_STRICT = json.JSONDecoder(object_pairs_hook=_unite, parse_float=_refuse_number, parse_constant=_refuse_number)
# For values that are only stepped over: any number that JSON allows will do, unread.
_ANY = json.JSONDecoder(object_pairs_hook=_unite, parse_int=len, parse_float=len, parse_constant=_refuse_number)
