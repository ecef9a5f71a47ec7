"""The map over units: every result, whatever it is, once; the first error after all workers have stopped."""

import os
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pome.engines.local import map_units


def find_workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pome-read")]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.none(), st.integers(), st.just(ValueError("a value"))), max_size=12), st.integers(1, 3))
def test_every_result_comes_once_whatever_it_is(results, workers):
    found = list(map_units(range(len(results)), ["cpu"] * workers, lambda n: results[n], lambda n, data, _: (n, data)))
    assert sorted(found, key=lambda pair: pair[0]) == list(enumerate(results))
    bare = list(map_units(range(len(results)), ["cpu"] * workers, lambda n: results[n], lambda n, data, _: data))
    assert sorted(map(repr, bare)) == sorted(map(repr, results))


@pytest.mark.parametrize("where", ["read", "work"])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_is_raised_and_no_worker_is_left(where, workers):
    def fail(stage, number):
        if stage == where and number == 3:
            raise OSError(f"{stage} of {number}")
        return number

    before = len(find_workers())
    with pytest.raises(OSError, match=f"{where} of 3"):
        list(map_units(range(9), ["cpu"] * workers, lambda n: fail("read", n), lambda n, _, __: fail("work", n)))
    assert len(find_workers()) == before


def test_closing_stops_the_workers():
    seen, many = [], 100_000  # seconds of work, of which the first is enough
    before = len(find_workers())
    results = map_units(range(many), ["cpu"], lambda n: n, lambda n, _, __: seen.append(n))
    next(results)
    results.close()
    assert len(seen) < many and len(find_workers()) == before


def test_ctrl_c_yields_what_the_worker_is_at_and_then_is_raised():
    def work(number, _, __):
        if number == 1:
            taken.wait()
            time.sleep(0.2)  # until the main thread waits again
            os.kill(os.getpid(), signal.SIGINT)  # which the main thread gets while it waits for this very result
            time.sleep(0.2)
        return number

    taken = threading.Event()
    found, before = [], len(find_workers())
    with pytest.raises(KeyboardInterrupt):
        for result in map_units(range(100), ["cpu"], lambda n: n, work):
            found.append(result)
            taken.set()
    assert found == [0, 1] and len(find_workers()) == before


def test_ctrl_c_while_the_workers_are_started_begins_no_unit(monkeypatch):
    def start(thread):
        really_start(thread)
        if thread.name.startswith("Thread-"):  # a worker, not a timer of another test
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # in which a unit could begin

    really_start, begun, before = threading.Thread.start, [], set(threading.enumerate())
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        list(map_units(range(100), ["cpu"] * 3, begun.append, lambda n, _, __: n))
    assert not begun and not set(threading.enumerate()) - before
