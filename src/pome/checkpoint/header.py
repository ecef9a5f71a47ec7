"""The header of a safetensors file, to and from a table of tensors. No torch, no tensor data.

A file is eight bytes of length N (little-endian), N bytes of JSON, then the data:
`{"__metadata__": {text: text}, name: {"dtype": ..., "shape": [...], "data_offsets": [start, end]}, ...}`.

What is accepted here is a subset of what `safetensors.safe_open` accepts. Headers come from strangers, so the
JSON is walked one entry at a time: memory and time stay in proportion to the text, whatever it holds.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pome.checkpoint.json_text import (
    Malformed,
    decode_object,
    decode_text,
    measure_value,
    scan_object,
    scan_strings,
    skip_space,
)
from pome.errors import HeaderError, printable

# Bits, not bytes: the format packs the 4- and 6-bit floats.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_INTEGER = 2**63 - 1
_MAX_ENTRY_CHARACTERS = 65_536  # one tensor's entry; a rank of thousands still fits
_MAX_SIDE_CHARACTERS = 1_048_576  # one value of an index other than its weight_map, and
_MAX_SIDE_VALUES = 100  # how many such values
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `start` and `end` are absolute byte offsets in the file."""

    name: str
    dtype: str  # safetensors name, such as "BF16"
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The table of a file: its tensors in the header's own order, which need not be the order of the data."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str] | None
    data_start: int
    file_size: int


def read_header_with(read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> Header:
    """The table of a file of `size` bytes, of which `read(offset, count)` fetches a part. Raises HeaderError."""
    if size < 8:
        _refuse(where, f"has {size} bytes, too few for a safetensors file; download it again")
    length = int.from_bytes(read(0, 8), "little")
    if length == int.from_bytes(b"version ", "little"):
        _refuse(where, "is a Git LFS pointer, not the weights; run `git lfs pull`")
    if length > MAX_HEADER_BYTES:
        _refuse(where, f"is not a safetensors file: it claims a header of {length} bytes; check the path")
    if 8 + length > size:
        _refuse(where, f"is truncated: a header of {length} bytes in {size}; download it again")
    return parse_header(bytes(read(8, length)), size, where)


def parse_header(raw_json: bytes, file_size: int, where: str) -> Header:
    """The table in a header's JSON, `raw_json`, of a file of `file_size` bytes.

    Raises HeaderError unless the offsets cover the data exactly, without overlap or hole, and agree
    with dtypes and shapes.
    """
    if len(raw_json) > MAX_HEADER_BYTES:
        _refuse(where, f"its header of {len(raw_json)} bytes is over the format's {MAX_HEADER_BYTES}")
    data_start = 8 + len(raw_json)
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] | None = None

    def read_value(name: str, at: int) -> int:
        nonlocal metadata
        if name == _METADATA:
            if text.startswith("null", at):
                return at + 4
            metadata, at = scan_strings(text, at)
            return at
        name = sys.intern(name)  # the other side of a pair has the same ones
        tensors[name], at = _read_entry(text, at, name, data_start)
        return at

    try:
        text = decode_text(raw_json)
        del raw_json  # a header may have 100 MB
        at = scan_object(text, 0, read_value)
        if skip_space(text, at) != len(text):
            raise Malformed(f"something follows the header's closing brace at character {at}")
        _check_cover(tensors, data_start, file_size)
    except ValueError as error:
        _refuse(where, f"{_describe(error)}; download or save the file again", error)
    return Header(tensors, metadata, data_start, file_size)


Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def order_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Entries of a new layout in the order in which safetensors writes: wider dtypes first, then by name.

    So every tensor begins at a multiple of its item's size, which some readers need: the format allows no padding.
    """
    return sorted(entries, key=lambda entry: (-DTYPE_BITS[entry[1]], entry[0]))


def build_header(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and padded JSON of a file that holds `entries` (name, dtype, shape) back to back in this order.

    Raises HeaderError for a table that the format cannot hold.
    """
    table: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    position = 0
    for name, dtype, shape in entries:
        if name in table or name == _METADATA:
            _refuse("the header to write", f"has tensor '{printable(name)}' twice, or it is a reserved name")
        try:
            size = _count_bytes(dtype, shape)
        except Malformed as error:
            _refuse("the header to write", f"cannot hold tensor '{printable(name)}': {error}", error)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    try:
        encoded = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        _refuse("the header to write", "holds a name that is not valid Unicode; rename it", error)
    encoded += b" " * (-len(encoded) % 8)  # data aligned to 8 bytes
    if len(encoded) > MAX_HEADER_BYTES:
        _refuse("the header to write", f"takes {len(encoded)} bytes, over the format's {MAX_HEADER_BYTES}")
    return len(encoded).to_bytes(8, "little") + encoded


def parse_index(raw: bytes, where: str) -> dict[str, str]:
    """Tensor name -> path of its shard below the folder, from the text of a `model.safetensors.index.json`.

    `./name` is `name`. Raises HeaderError unless every shard is a `.safetensors` file in the folder or below it.
    """
    if len(raw) > MAX_HEADER_BYTES:
        _refuse(where, f"an index of {len(raw)} bytes is over {MAX_HEADER_BYTES}")
    weight_map: dict[str, str] | None = None
    side_values = 0

    def read_value(key: str, at: int) -> int:
        nonlocal weight_map, side_values
        if key == "weight_map":
            weight_map, at = scan_strings(text, at)
            return at
        side_values += 1
        if side_values > _MAX_SIDE_VALUES:
            raise Malformed(f"it has over {_MAX_SIDE_VALUES} keys beside weight_map")
        return at + measure_value(text[at : at + _MAX_SIDE_CHARACTERS])

    try:
        text = decode_text(raw)
        at = scan_object(text, skip_space(text, 0), read_value)
        if skip_space(text, at) != len(text):
            raise Malformed(f"something follows its closing brace at character {at}")
        if weight_map is None:
            raise Malformed("it has no weight_map")
        paths = {shard: _read_path(shard) for shard in dict.fromkeys(weight_map.values())}
    except (ValueError, RecursionError) as error:
        _refuse(where, f"{_describe(error)}; download the index again", error)
    return {name: paths[shard] for name, shard in weight_map.items()}


def _read_path(shard: str) -> str:
    """A shard's path without `.` in it. Raises Malformed where it is none, or leads out of the folder."""
    parts = [part for part in shard.split("/") if part not in ("", ".")]
    leads_out = shard.startswith("/") or "\\" in shard or ".." in parts or ":" in shard
    if leads_out or not shard.endswith(".safetensors") or not shard.isprintable() or parts[-1] == ".safetensors":
        raise Malformed(f"weight_map names '{printable(shard)}', not a .safetensors file in its folder")
    return "/".join(parts)


def _read_entry(text: str, at: int, name: str, data_start: int) -> tuple[TensorEntry, int]:
    # An entry holds no braces of its own, so its text is known before anything is built from it.
    end = text.find("}", at, at + _MAX_ENTRY_CHARACTERS) + 1
    entry = text[at:end]
    if not entry.startswith("{") or entry.count("[") != 2:
        raise Malformed(f"tensor '{printable(name)}' is not an object of dtype, shape and data_offsets")
    if "-" in entry:
        raise Malformed(f"tensor '{printable(name)}' has a negative number")
    fields = decode_object(entry)
    if fields.keys() != _FIELDS:
        raise Malformed(f"tensor '{printable(name)}' has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not _are_integers(shape) or not _are_integers(offsets) or len(offsets) != 2:
        raise Malformed(f"tensor '{printable(name)}': shape and data_offsets are not lists of 63-bit integers")
    try:
        size = _count_bytes(dtype, shape)
    except Malformed as error:
        raise Malformed(f"tensor '{printable(name)}': {error}") from error
    start, stop = offsets
    if stop - start != size:
        stated = f"{dtype} {printable(str(shape), 80)} takes {size} bytes, its offsets {stop - start}"
        raise Malformed(f"tensor '{printable(name)}': {stated}")
    return TensorEntry(name, sys.intern(dtype), _share(tuple(shape)), data_start + start, data_start + stop), end


@functools.lru_cache(1 << 10)
def _share(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same shape, once for all tensors that have it."""
    return shape


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int} and max(value, default=0) <= _MAX_INTEGER


def _count_bytes(dtype: object, shape: Iterable[int]) -> int:
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise Malformed(f"dtype '{printable(str(dtype))}' is not one of the format")
    bits = 1
    for size in (*shape, DTYPE_BITS[dtype]):
        bits *= size
        # Every partial product, as other readers do: a zero at the end does not excuse an overflow before it.
        if not 0 <= bits <= _MAX_INTEGER:
            raise Malformed("its shape is negative or overflows 63 bits")
    if bits % 8:
        raise Malformed("its packed elements do not end at a byte")
    return bits // 8


def _check_cover(tensors: Mapping[str, TensorEntry], data_start: int, file_size: int) -> None:
    position = data_start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            fault = "overlaps the one before it" if entry.start < position else "leaves a hole before it"
            raise Malformed(f"tensor '{printable(entry.name)}' {fault}")
        position = entry.end
    if position != file_size:
        fault = "is truncated" if file_size < position else "is too long"
        raise Malformed(f"the file {fault}: {file_size} bytes, its header describes {position}")


def _describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON at character {error.pos} ({error.msg})"
    return "it is nested too deep" if isinstance(error, RecursionError) else printable(str(error), 500)


def _refuse(where: str, what: str, cause: BaseException | None = None) -> NoReturn:
    raise HeaderError(f"{printable(where, 500)}: {what}") from cause
