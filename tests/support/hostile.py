"""Files that a stranger might hand over: sane safetensors files, and the same broken in every way we know.

Everything is drawn from one seeded `random.Random`, so that a seed names a file.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy
from safetensors.numpy import save

# What the format's reference reader lists in its refusal of an unknown dtype.
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
BITS |= dict.fromkeys(("I32", "U32", "F32"), 32)
BITS |= dict.fromkeys(("C64", "F64", "I64", "U64"), 64)

NASTY_TEXT = (
    "", " ", "\x00", "\x07\x1b[2J", "a\nb", "\x7f", "\\", '"', "/", "..", "é", "漢字", "😀", "\u202eevil",
    "\u2028", "\ufeff", "__metadata__", "{", "}", "[", "]", "{}[]", ":", ",", "null", "dtype", "x" * 300,
)  # fmt: skip
NASTY_TOKENS = (
    "-1", "-0", "1.0", "1e0", "01", "true", "null", '"1"', "[]", "{}", "[1]", "NaN", "Infinity",
    "9" * 19, "9" * 20, "9" * 5000, "4611686018427387904", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "[" * 200 + "]" * 200, "[" * 2000, '{"a":' * 500,
    '"\\ud800"', '"\\udc00\\ud800"', '"\x01"', "+1", "0x1", "1_0", "١", "",
)  # fmt: skip
NASTY_BYTES = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"{", b"}", b"[",
    b"]", b'"', b"\\", b",", b":", b" ", b"\n", b"\x0b", b"\xc2\xa0", b"0", b"9", b"-", b".", b"e",
    b"[[[[[[[[", b"//", b"null",
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """A piece of JSON that is written as it stands, whatever it is."""

    token: str


@dataclass(frozen=True)
class Pairs:
    """A JSON object whose keys may repeat."""

    items: tuple[tuple[str, object], ...]


def make_sane_file(rng: Random) -> bytes:
    """A file that the format allows, in one of the styles in which JSON may be written."""
    table, data = _make_table(rng)
    return _assemble(_write(table, rng, _draw_style(rng)), data)


def make_hostile_file(rng: Random) -> bytes:
    """A sane or a real file with a few faults in its table, in its bytes, or in both."""
    if rng.random() < 0.3:
        return _break_bytes(rng.choice(make_real_files()), rng, rng.randint(1, 3))
    table, data = _make_table(rng)
    for _ in range(rng.randint(0, 3)):
        table = _break_table(table, rng)
    file = _assemble(_write(table, rng, _draw_style(rng)), data)
    return _break_bytes(file, rng, rng.choice((0, 0, 0, 1, 2)))


def make_hostile_index(rng: Random) -> bytes:
    """The text of an index, sane or broken."""
    shards = ("model.safetensors", "model-00001-of-00002.safetensors", "é.safetensors")
    bad = (
        "", "..", "../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "a\x00.safetensors",
        "a\n.safetensors", "a\\b.safetensors", "\u202e.safetensors",
    )  # fmt: skip
    values: list[object] = [rng.choice(shards) for _ in range(rng.randint(0, 5))]
    for at in range(len(values)):
        if rng.random() < 0.2:
            values[at] = rng.choice(bad) if rng.random() < 0.5 else Raw(rng.choice(NASTY_TOKENS))
    weight_map: object = Pairs(tuple((_draw_name(rng), value) for value in values))
    if rng.random() < 0.1:
        weight_map = Raw(rng.choice(NASTY_TOKENS))
    items: list[tuple[str, object]] = [("metadata", Pairs((("total_size", Raw(rng.choice(("1", "1.5", "0")))),)))]
    if rng.random() < 0.95:
        items.append(("weight_map", weight_map))
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        key = rng.choice(("weight_map", "metadata", *NASTY_TEXT))
        items.insert(rng.randint(0, len(items)), (key, Raw(rng.choice(NASTY_TOKENS))))
    return _break_some(_write(Pairs(tuple(items)), rng, _draw_style(rng)), rng, rng.choice((0, 0, 1, 2)))


@cache
def make_real_files() -> tuple[bytes, ...]:
    """What a real writer makes: names of a Llama and of a BERT, several dtypes, with and without metadata."""
    llama = [f"model.layers.{i}.mlp.{role}_proj.weight" for i in range(2) for role in ("gate", "up", "down")]
    bert = [
        f"bert.encoder.layer.{i}.{part}.dense.{kind}"
        for i in range(2)
        for part in ("intermediate", "output")
        for kind in ("weight", "bias")
    ]
    half = {name: numpy.ones((3, 2), numpy.float16) for name in llama}
    mixed = {name: numpy.ones((2, 1 + i), "f4") for i, name in enumerate(bert)}
    mixed |= {
        "position_ids": numpy.arange(5),
        "mask": numpy.ones(3, bool),
        "scale": numpy.array(2.0),
    }
    return save(half, {"format": "pt"}), save(mixed), save({}), save({"empty": numpy.ones((0, 7))}, {})


def list_heavy_headers(size: int) -> Iterator[tuple[str, bytes]]:
    """Headers of about `size` bytes, each meant to cost a reader far more than that."""
    entry = '{"dtype":"U8","shape":[],"data_offsets":[0,0]}'
    zero = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    keys = (f'"{i}":{zero}' for i in range(size // (len(zero) + 10)))
    yield "opening brackets", b"[" * size
    yield "nested objects", b'{"a":' * (size // 5)
    yield "brackets in a value", b'{"a":' + b"[" * size
    yield "brackets in a shape", b'{"a":{"dtype":"U8","shape":' + b"[" * size
    yield "empty lists in a value", b'{"a":[' + b"[]," * (size // 3) + b"[]]}"
    yield "empty lists in metadata", b'{"__metadata__":{"a":[' + b"[]," * (size // 3) + b"[]]}}"
    yield (
        "ones in a shape",
        b'{"a":{"dtype":"U8","shape":[' + b"1," * (size // 2) + b'1],"data_offsets":[0,1]}}',
    )
    yield "one long integer", b'{"a":{"dtype":"U8","shape":[' + b"9" * size + b'],"data_offsets":[0,1]}}'
    yield "one duplicate key", b"{" + (f'"a":{entry},' * (size // (len(entry) + 5))).encode() + b"}"
    yield "duplicate metadata", b'{"__metadata__":{' + b'"a":"",' * (size // 7) + b'"a":""}}'
    yield "duplicate fields", b'{"a":{' + b'"dtype":"U8",' * (size // 13) + b'"dtype":"U8"}}'
    yield "many tensors", ("{" + ",".join(keys) + "}").encode()
    yield (
        "many metadata",
        ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(size // 16)) + "}}").encode(),
    )
    yield "one long name", b'{"' + b"a" * size + b'":1}'
    yield "one long wide name", b'{"' + b"a" * size + "😀".encode() + b'":1}'
    yield "escapes in a name", b'{"' + b'\\"' * (size // 2) + b'":1}'
    yield "an open string", b'{"' + b"a" * size
    yield "white space", b"{" + b" " * size + b"}"
    yield "white space before a fault", b"{" + b" " * size + b"!"
    yield "many keys without a value", b"{" + b'"a",' * (size // 4) + b"}"
    yield "an index of side keys", ("{" + ",".join(f'"{i}":[]' for i in range(size // 16)) + "}").encode()
    yield (
        "an index of shards",
        ('{"weight_map":{' + ",".join(f'"{i}":"{i}.safetensors"' for i in range(size // 32)) + "}}").encode(),
    )


def _draw_name(rng: Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(NASTY_TEXT)
    return "".join(rng.choice(string.ascii_lowercase + "._0é😀") for _ in range(rng.randint(1, 12)))


def _make_table(rng: Random) -> tuple[Pairs, bytes]:
    items: list[tuple[str, object]] = []
    position = 0
    names = {_draw_name(rng) for _ in range(rng.randint(0, 5))} - {"__metadata__"}
    for name in sorted(names):
        dtype = rng.choice(tuple(BITS))
        shape = [rng.choice((0, 1, 2, 3, 4)) for _ in range(rng.randint(0, 3))]
        if BITS[dtype] < 8:
            shape.append(4)  # so that it ends at a byte
        count = 1
        for length in shape:
            count *= length
        end = position + count * BITS[dtype] // 8
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [position, end])]
        if rng.random() < 0.2:
            rng.shuffle(fields)
        items.append((name, Pairs(tuple(fields))))
        position = end
    if rng.random() < 0.5:
        rng.shuffle(items)
    if rng.random() < 0.4:
        texts = {_draw_name(rng): rng.choice(NASTY_TEXT) for _ in range(rng.randint(0, 3))}
        items.insert(rng.randint(0, len(items)), ("__metadata__", Pairs(tuple(texts.items()))))
    return Pairs(tuple(items)), rng.getrandbits(8 * position).to_bytes(position, "little") if position else b""


def _break_table(table: Pairs, rng: Random) -> Pairs:
    """One fault at one place of a table: a value, a key, a field too many or too few, a repeated entry."""
    if not table.items or rng.random() < 0.1:
        extra = (rng.choice(NASTY_TEXT), Raw(rng.choice(NASTY_TOKENS)))
        return Pairs((*table.items, extra))
    at = rng.randrange(len(table.items))
    key, value = table.items[at]
    items = list(table.items)
    fault = rng.randrange(6)
    if fault == 0:
        items.insert(rng.randint(0, len(items)), items[at])
    elif fault == 1:
        del items[at]
    elif fault == 2:
        items[at] = (rng.choice((*NASTY_TEXT, key.upper())), value)
    elif fault == 3:
        items[at] = (key, Raw(rng.choice(NASTY_TOKENS)))
    else:
        items[at] = (key, _break_value(value, rng))
    return replace(table, items=tuple(items))


def _break_value(value: object, rng: Random) -> object:
    if isinstance(value, Pairs):
        return _break_table(value, rng)
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        changed = list(value)
        fault = rng.randrange(5)
        if fault == 0:
            del changed[at]
        elif fault == 1:
            changed.insert(at, changed[at])
        elif fault == 2:
            changed[at] = Raw(rng.choice(NASTY_TOKENS))
        else:
            step = rng.choice((-1, 1, 8, -8, 2**32, 2**63, 2**64))
            changed[at] = changed[at] + step if isinstance(changed[at], int) else changed[at]
        return changed
    return rng.choice((*BITS, "f32", "F7", "F32 ", *NASTY_TEXT)) if isinstance(value, str) else [value]


def _draw_style(rng: Random) -> tuple[str, str, bool]:
    return rng.choice(((",", ":", False), (", ", ": ", True), (" ,\n\t", "\r : ", True)))


def _write(value: object, rng: Random, style: tuple[str, str, bool]) -> bytes:
    return (_dump(value, style) + " " * rng.choice((0, 0, 1, 7))).encode("utf-8", "surrogatepass")


def _dump(value: object, style: tuple[str, str, bool]) -> str:
    comma, colon, ascii_only = style
    if isinstance(value, Raw):
        return value.token
    if isinstance(value, Pairs):
        return "{" + comma.join(_dump(k, style) + colon + _dump(v, style) for k, v in value.items) + "}"
    if isinstance(value, list):
        return "[" + comma.join(_dump(item, style) for item in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


def _assemble(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _break_bytes(file: bytes, rng: Random, times: int) -> bytes:
    """Faults in the header's bytes (its length kept true, mostly), in its length, and in the file's size."""
    length = int.from_bytes(file[:8], "little")
    header, data = file[8 : 8 + length], file[8 + length :]
    for _ in range(times):
        fault = rng.randrange(10)
        if fault == 0:
            return (length + rng.choice((-9, -1, 1, 8, 2**31, 2**62))).to_bytes(8, "little", signed=True) + file[8:]
        if fault == 1:
            return file[: rng.randint(0, len(file))]
        if fault == 2:
            data += bytes(rng.randint(1, 9))
        elif fault == 3:
            data = data[: rng.randint(0, len(data))]
        else:
            header = _break_some(header, rng, 1)
    return _assemble(header, data)


def _break_some(text: bytes, rng: Random, times: int) -> bytes:
    for _ in range(times):
        at = rng.randint(0, len(text))
        fault = rng.randrange(4)
        if fault == 0:
            text = text[:at] + rng.choice(NASTY_BYTES) + text[at:]
        elif fault == 1:
            text = text[:at] + rng.choice(NASTY_BYTES) + text[at + 1 :]
        elif fault == 2:
            text = text[:at] + text[at + rng.randint(1, 4) :]
        else:
            end = min(len(text), at + rng.randint(1, 40))
            text = text[:end] + text[at:end] + text[end:]
    return text
