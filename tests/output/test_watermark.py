"""Hashing behind the writers: nothing is read before it is final, whatever the order of the writes."""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.checkpoint.hashing import hash_file
from pome.errors import CheckpointError
from pome.output import clone
from pome.output.watermark import Watermark


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=12), seed=st.integers(0, 999))
def test_the_hash_is_that_of_what_was_written(tmp_path_factory, sizes, seed):
    file = tmp_path_factory.mktemp("watermark") / "file"
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    file.write_bytes(b"\0" * sum(sizes))
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    watermark = Watermark(("file", start) for start in starts)
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(clone, "_CHUNK", 700)
        future = pool.submit(hash_file, file, read.append, partial(watermark.wait, "file"))
        for i in order:
            assert sum(read) <= min([start for j, start in enumerate(starts) if j in order[order.index(i) :]])
            with file.open("r+b") as out:
                out.seek(starts[i])
                out.write(bytes([i + 1]) * sizes[i])
            watermark.mark_written("file", starts[i])
        assert future.result(timeout=10) == (sum(sizes), hashlib.sha256(file.read_bytes()).hexdigest())


def test_files_do_not_wait_for_each_other(tmp_path: Path) -> None:
    watermark = Watermark([("a", 10), ("b", 10)])
    watermark.wait("a", 10)
    watermark.wait("c", 1 << 40)
    watermark.mark_written("a", 10)
    watermark.wait("a", 1 << 40)


def test_abandon_ends_the_waiting_readers() -> None:
    watermark = Watermark([("a", 10)])
    threading.Timer(0.05, watermark.abandon).start()
    with pytest.raises(CheckpointError, match="cancelled"):
        watermark.wait("a", 11)
