"""Jobs for the workers of the Ray engine that need no checkpoint, and a cluster of processes. No torch."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class CountingJob:
    """Squares numbers; notes each beginning in a file, and dies or fails where it is told to."""

    notes: Path
    seconds: float = 0.0
    deadly: tuple[int, ...] = ()
    deadly_on: str = "any"  # the device on which it dies
    wrong: int | None = None
    threads: bool = False  # return the number of threads instead

    def open(self, device: str, threads: int) -> CountingExecutor:
        return CountingExecutor(self, device, threads)


class CountingExecutor:
    def __init__(self, job: CountingJob, device: str, threads: int) -> None:
        self.job = job
        self.device = device
        self.threads = threads

    def read(self, unit: int) -> int:
        return unit

    def work(self, unit: int, data: int) -> Any:
        with open(self.job.notes, "a") as file:
            file.write(f"{unit} {os.getpid()}\n")  # one small append, whole or not at all
        if unit in self.job.deadly and self.job.deadly_on in ("any", self.device):
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == self.job.wrong:
            raise ValueError(f"unit {unit} is wrong")
        time.sleep(self.job.seconds)
        return (self.threads, os.environ["OMP_NUM_THREADS"]) if self.job.threads else unit * data

    def flush(self) -> None:
        pass


def count_begun(notes: Path) -> Counter[int]:
    """How often each unit was begun."""
    return Counter(int(line.split()[0]) for line in notes.read_text().splitlines()) if notes.is_file() else Counter()


def list_processes(word: str) -> list[int]:
    """Processes that have a word in their command line or in that of a process above them.

    A worker overwrites its own command line, and the daemon of its node above it names the temp folder.
    """
    lines, parents = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )

    def is_below(pid: int) -> bool:
        return pid in lines and (word in lines[pid] or is_below(parents[pid]))

    return [pid for pid in lines if is_below(pid) and pid != os.getpid()]


def list_workers(word: str) -> list[int]:
    """The workers among them that are at work."""
    found = []
    for pid in list_processes(word):
        with contextlib.suppress(OSError):
            if b"ray::Worker.work" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


class Nodes:
    """A cluster of processes on this machine: each node has a temp folder and ports of its own. A context manager."""

    def __init__(self, count: int = 3, cpus: int = 1, gpus: int = 0, **environment: str) -> None:
        self.count = count
        self.options = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", "--object-store-memory=80000000"]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **environment,
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Nodes:
        self.folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # a short path, for Ray's sockets
        self.port = find_port()
        self.address = f"{find_own_address()}:{self.port}"
        try:
            for _ in range(self.count):
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(len(self.processes)):
            self.kill(number)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, **environment: str) -> int:
        """Start one more node; its number."""
        number = len(self.processes)
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--disable-usage-stats",
            *self.options,
        ]
        command += ["--temp-dir", str(self.folder / str(number))]
        if number == 0:
            command += ["--head", f"--port={self.port}", "--include-dashboard=false"]
        else:
            command += [f"--address={self.address}"]
        log = self.folder / f"{number}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**self.environment, **environment}, start_new_session=True
            )
        self.processes.append(process)
        until = time.monotonic() + 60
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        return number

    def kill(self, number: int) -> None:
        """End a node with all its processes, as a power cut would."""
        for pid in [*list_processes(f"{self.folder}/{number}"), self.processes[number].pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes[number].wait()


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def find_own_address() -> str:
    """The address that Ray takes for this machine's."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


@contextlib.contextmanager
def killing(rng: Random, every: tuple[float, float], most: int, session: str) -> Iterator[list[int]]:
    """Inside, workers are killed at random instants, up to so many; yields the list of those that were."""
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        while len(killed) < most and not stop.wait(rng.uniform(*every)):
            workers = list_workers(session)
            if workers:
                pid = rng.choice(workers)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()
