"""One run at a time on one staging folder, also where the file system grants its locks to everybody."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pome.errors import OutputError
from pome.output import lock
from pome.output.lock import take_lock


@pytest.fixture
def lying_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)


@pytest.fixture
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `tmp_path` until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from pome.output.lock import take_lock\n"
        "held = take_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def leave_holder(folder: Path, **holder: object) -> None:
    (folder / "lock").write_text(json.dumps(holder))


def test_a_second_run_is_refused_and_told_who_holds_the_lock(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    with pytest.raises(OutputError, match=f"process {other_process.pid} on"):
        take_lock(tmp_path)


def test_a_second_thread_of_the_same_process_is_refused(tmp_path: Path) -> None:
    held = take_lock(tmp_path)
    with pytest.raises(OutputError, match="another run"):
        take_lock(tmp_path)
    held.release()
    take_lock(tmp_path).release()


def test_a_killed_run_does_not_block(tmp_path: Path, other_process: subprocess.Popen[str]) -> None:
    other_process.kill()
    other_process.wait()
    take_lock(tmp_path).release()


@pytest.mark.usefixtures("lying_locks")
def test_without_working_flock_the_living_holder_is_found_by_its_process(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    with pytest.raises(OutputError, match=f"process {other_process.pid} on"):
        take_lock(tmp_path)
    other_process.kill()
    other_process.wait()
    take_lock(tmp_path).release()


@pytest.mark.usefixtures("lying_locks")
def test_a_later_process_of_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    leave_holder(tmp_path, pid=1, host=os.uname().nodename, started="never")
    take_lock(tmp_path).release()


@pytest.mark.usefixtures("lying_locks", "short_watch")
def test_a_heartbeat_from_another_machine_is_heard(tmp_path: Path) -> None:
    leave_holder(tmp_path, pid=1, host="elsewhere", started="1")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(tmp_path / "lock")

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(OutputError, match="process 1 on elsewhere"):
            take_lock(tmp_path)
    finally:
        stop.set()
        heart.join()


@pytest.mark.usefixtures("lying_locks", "short_watch")
def test_a_holder_without_heartbeat_does_not_block(tmp_path: Path) -> None:
    leave_holder(tmp_path, pid=1, host="elsewhere", started="1")
    take_lock(tmp_path).release()


@pytest.mark.usefixtures("short_watch")
def test_the_holder_keeps_its_heart_beating(tmp_path: Path) -> None:
    held = take_lock(tmp_path)
    before = (tmp_path / "lock").stat().st_mtime_ns
    deadline = time.monotonic() + 30
    while (tmp_path / "lock").stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release()


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "\x00" * 20])
def test_whatever_a_crash_left_in_the_lock_file_does_not_block(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    take_lock(tmp_path).release()
