"""Changes of FT that no LoRA of an extraction holds: compared with BASE piece by piece, and the norm of each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pome.checkpoint.header import TensorEntry
from pome.checkpoint.source import Checkpoint
from pome.editing.unit import TORCH_DTYPES, put_view
from pome.manifest import LostRecord
from pome.planning.remainder import Rest
from pome.roles.layout import Part

PIECE = 1 << 22  # entries read and compared at a time
_DTYPES = TORCH_DTYPES | {
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def find_change(rest: Rest, base: Checkpoint, ft: Checkpoint) -> LostRecord | None:
    """The change of a tensor that no LoRA holds, as the record of a loss; None where nothing changed."""
    _, mine = ft.tensors[rest.name]
    theirs = base.tensors[rest.partner][1] if rest.partner is not None else None
    reason, part = rest.reason, None
    changed = weight = 0.0
    unknown = {entry.dtype for entry in (mine, theirs) if entry is not None} - _DTYPES.keys()
    if unknown:
        same = theirs is not None and hash_entry(ft, mine) == hash_entry(base, theirs)
        said = f"stored as {', '.join(sorted(unknown))}, of which no norm is known; {reason}"
        return None if same else LostRecord(rest.name, None, rest.role, 0.0, 0.0, said)
    if theirs is None or theirs.shape[1:] != mine.shape[1:]:
        if theirs is not None:
            reason = f"its shape is {list(mine.shape)}, BASE's {list(theirs.shape)}; {reason}"
        changed = sum(_square(piece) for piece in _read_pieces(ft, mine, math.prod(mine.shape)))
    elif rest.taken:
        part = "what is not selected of it"
        changed, weight = _compare_outside(rest, base, ft)
    else:
        if theirs.shape != mine.shape:
            reason = f"its shape is {list(mine.shape)}, BASE's {list(theirs.shape)}; {reason}"
        count = min(math.prod(mine.shape), math.prod(theirs.shape))
        pairs = zip(_read_pieces(ft, mine, count), _read_pieces(base, theirs, count), strict=True)
        for W, W_base in pairs:
            changed += 0.0 if _are_same(W, W_base) else _square(W.double() - W_base.double())
            weight += _square(W_base)
        changed += sum(_square(piece) for piece in _read_pieces(ft, mine, math.prod(mine.shape), count))
    if changed == 0.0:
        return None
    if not math.isfinite(changed) or not math.isfinite(weight):
        return LostRecord(rest.name, part, rest.role, 0.0, 0.0, f"NaN or infinity is in it; {reason}")
    share = math.sqrt(changed / weight) if weight else 1.0
    return LostRecord(rest.name, part, rest.role, math.sqrt(changed), share, reason)


def hash_entry(side: Checkpoint, entry: TensorEntry) -> str:
    """SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for at in range(entry.start, entry.end, PIECE):
        digest.update(side.read(entry.name, at, min(PIECE, entry.end - at)))
    return digest.hexdigest()


def _are_same(W: Tensor, W_base: Tensor) -> bool:
    """Whether two pieces hold the same bytes, NaN too."""
    return W.dtype == W_base.dtype and torch.equal(W.view(torch.uint8), W_base.view(torch.uint8))


def _square(A: Tensor) -> float:
    return float(A.double().square().sum())


def _read_pieces(side: Checkpoint, entry: TensorEntry, count: int, first: int = 0) -> Iterator[Tensor]:
    """Entries `first` to `count` of a tensor, a piece at a time."""
    dtype = _DTYPES[entry.dtype]
    for at in range(first, count, PIECE):
        size = min(PIECE, count - at)
        data = side.read(entry.name, entry.start + at * dtype.itemsize, size * dtype.itemsize)
        yield torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _compare_outside(rest: Rest, base: Checkpoint, ft: Checkpoint) -> tuple[float, float]:
    """Squared norms of the change and of BASE's weights, slice by slice, outside of what LoRAs hold."""
    assert rest.partner is not None
    changed = weight = 0.0
    shape = ft.tensors[rest.name][1].shape
    for at in range(shape[0]) if rest.layout.stacked else (None,):
        W, W_base = (_read_slice(side, name, at) for side, name in ((ft, rest.name), (base, rest.partner)))
        for part in rest.taken.get(at, frozenset[Part]()):
            for side in (W, W_base):
                put_view(side, replace(part, label=None)).zero_()
        changed += _square(W - W_base)
        weight += _square(W_base)
    return changed, weight


def _read_slice(side: Checkpoint, name: str, at: int | None) -> Tensor:
    _, entry = side.tensors[name]
    nbytes, shape = entry.nbytes, entry.shape
    if at is not None:
        nbytes, shape = nbytes // shape[0], shape[1:]
    stored = torch.frombuffer(side.read(name, entry.start + (at or 0) * nbytes, nbytes), dtype=_DTYPES[entry.dtype])
    return stored.reshape(shape).double()
