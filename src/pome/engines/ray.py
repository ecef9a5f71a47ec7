"""The Ray engine: a map over units on the nodes of a Ray cluster, or on this machine alone.

Ray runs in a process of its own (`ray_driver`). So its output, signal handlers and settings do not touch the run, which
journals and publishes, and neither does its end: Ray exits at once where the head is lost. No tensor and no byte
of a weight passes through Ray: actors read and write files by path and return small records.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from pome.engines.ray_probe import make_look
from pome.engines.ray_worker import Job
from pome.errors import ClusterError, OutputError, printable

READY_SECONDS = 55.0  # from the start of the process until it has found and checked the nodes
QUIT_SECONDS = 15.0
_SOCKETS = 65  # characters that Ray adds to its temp folder for a socket, whose path has at most 107
SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would upload the working directory
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 would let every other process of the machine go first
}


@dataclass(frozen=True)
class Cluster:
    """Where and how units are worked on.

    address: of a cluster that runs, `auto` for the one that this machine belongs to, None for an instance that is
    started for this run. device: `auto`, `cpu` or `cuda`. threads: cores of a slot on CPUs. memory: bytes that a worker
    needs. at_once: the most workers. ahead: bundles that a worker holds; it reads one while it works on another.
    patient: whether Ctrl-C waits for what the workers are at. apart: whether the others go on where a unit is given up.
    """

    address: str | None = None
    device: str = "auto"
    threads: int = 1
    memory: int = 0
    at_once: int | None = None
    ahead: int = 2
    patient: bool = True
    apart: bool = False


@dataclass(frozen=True)
class Lost:
    """A unit at which one worker after the other died, by its place in the list."""

    number: int
    error: ClusterError


@dataclass(frozen=True)
class Placed:
    """The workers of a run."""

    workers: int
    hosts: int
    nodes: int
    device: str
    threads: int

    def describe(self) -> str:
        each = "one GPU" if self.device == "cuda" else f"{self.threads} core{'s' * (self.threads != 1)}"
        workers, nodes = (
            f"{self.workers} worker{'s' * (self.workers != 1)}",
            f"{self.nodes} node{'s' * (self.nodes != 1)}",
        )
        return f"{workers} of {each} on {nodes} of Ray"


class RayEngine:
    """Workers on a cluster, found and checked; a context manager, at whose end they are gone.

    Args:
        cluster: where.
        job: what all units share; the nodes open it.
        paths: the files that every node must see as this machine does.
        folder: a folder to make, in which every node must find a file and write one; it is removed at the end.

    Raises ClusterError (on entering): no Ray, no cluster, no slot that fits, a node that finds something else.
    """

    def __init__(self, cluster: Cluster, job: Job, paths: Iterable[Path], folder: Path | None) -> None:
        self.cluster = cluster
        self.start_seconds = 0.0  # until the first worker was there to work
        self.stats: dict[str, Any] = {}
        self.notes: list[str] = []
        self._job = pickle.dumps(job)
        self._paths = sorted({os.path.abspath(path) for path in paths})
        self._folder = os.path.abspath(folder) if folder is not None else ""
        self._heard: deque[tuple[str, Any]] = deque()
        self._news = threading.Condition()

    def __enter__(self) -> RayEngine:
        if importlib.util.find_spec("ray") is None:
            raise ClusterError("engine: Ray is not installed; pip install 'pome-edit[ray]'", options=["engine"])
        begun = time.monotonic()
        self._temp = Path(tempfile.mkdtemp(prefix="pome-ray-", dir=_find_short_folder()))
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self._temp, ignore_errors=True)
            settings = {**vars(self.cluster), "job": self._job, "folder": self._folder, "temp": str(self._temp)}
            settings["facts"] = stack.enter_context(self._marking())
            self._start()
            stack.callback(self._end)
            self._send("open", settings)
            self.placed = Placed(**self._wait_ready())
            self.start_seconds = time.monotonic() - begun
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @contextlib.contextmanager
    def _marking(self) -> Iterator[dict[str, Any]]:
        """What this machine finds; inside, the folder holds a token that only a node which shares it knows."""
        token = secrets.token_hex(16)
        here = make_look()(self._paths, "", token, "")
        if not self._folder:
            yield here
            return
        folder = Path(self._folder)
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir()
            (folder / "token").write_text(token, encoding="ascii")
        except OSError as error:
            raise OutputError(
                f"{printable(self._folder, 1000)}: {error.strerror or error}; mend it, then run the same command again"
            ) from error
        try:
            yield here
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self) -> None:
        ours, theirs = Pipe()
        self._connection: Connection = ours
        self._log = self._temp / "driver.log"
        with open(self._log, "wb") as log:
            code = "import sys; from pome.engines.ray_driver import main; main(int(sys.argv[1]))"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=_make_environment(self.cluster.address), start_new_session=True,  # Ctrl-C is for this process
            )  # fmt: skip
        theirs.close()
        self._listener = threading.Thread(target=self._listen, name="pome-ray", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Receive the messages of the process, on a thread: an interrupt must not split a message."""
        while True:
            try:
                item = self._connection.recv()
            except (EOFError, OSError):
                item = ("gone", None)
            with self._news:
                self._heard.append(item)
                self._news.notify()
            if item[0] == "gone":
                return

    def _send(self, kind: str, what: Any = None) -> None:
        with contextlib.suppress(OSError):  # it is gone, which the listener says
            self._connection.send((kind, what))

    def _hear(self, timeout: float | None = None) -> tuple[str, Any]:
        """Next message of the process; `late` after so many seconds of silence."""
        with self._news:  # an interrupt during this wait loses no message
            if not self._news.wait_for(lambda: self._heard, timeout):
                return "late", None
        return self._heard.popleft()

    def _wait_ready(self) -> dict[str, Any]:
        until = time.monotonic() + READY_SECONDS
        while True:
            kind, what = self._hear(max(0.0, until - time.monotonic()))
            if kind == "ready":
                return dict(what)
            if kind == "late":
                where = self.cluster.address or "the instance that was started here"
                raise ClusterError(
                    f"Ray at {where} gave no answer in {READY_SECONDS:.0f} s; see whether `ray status` answers there"
                )
            self._take(kind, what)

    def _take(self, kind: str, what: Any) -> None:
        """Raise the errors among the messages that are no results, and keep the others."""
        if kind == "error":
            raise pickle.loads(what)
        if kind == "note":
            self.notes.append(what)
        if kind == "gone":
            lines = self._log.read_text("utf-8", "replace").split("\n") if self._log.is_file() else []
            said = next((line for line in reversed(lines) if line.strip()), "")
            raise ClusterError(
                "the process that speaks to Ray ended, as it does where the head of the cluster is lost; run the same "
                f"command again to go on (its last words: {printable(said)})"
            )

    def map(self, units: Sequence[Any], costs: Sequence[float], names: Sequence[str]) -> Generator[Any, None, None]:
        """Yield the result of every unit, in any order; the costliest are begun first, `names` are for messages.

        An error of a unit, or Ctrl-C, is raised here after the workers have finished what they are at and those
        results were yielded; a second Ctrl-C waits for nothing. Raises ClusterError too: a unit at which one
        worker after the other dies (`Lost` is yielded for it where units stand apart), no worker left, the head lost.
        """
        begun = time.monotonic()
        self._send(
            "map", [(pickle.dumps(unit), cost, name) for unit, cost, name in zip(units, costs, names, strict=True)]
        )
        failure: BaseException | None = None
        while True:
            try:
                kind, what = self._hear()
            except KeyboardInterrupt as interrupt:
                if isinstance(failure, KeyboardInterrupt) or not self.cluster.patient:
                    raise
                self._send("stop")
                failure = interrupt
                continue
            if kind == "results":
                for result in what:
                    yield pickle.loads(result)
            elif kind == "lost":
                number, error = what
                yield Lost(number, pickle.loads(error))
            elif kind == "error":
                failure = failure or pickle.loads(what)
            elif kind == "working":
                self.start_seconds += time.monotonic() - begun
            elif kind == "end":
                self.stats = what
                break
            else:
                self._take(kind, what)
        if failure is not None:
            raise failure

    def _end(self) -> None:
        """Let the process stop its workers and its own instance of Ray, then make sure that it has ended."""
        self._send("quit")
        try:
            self._process.wait(QUIT_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._connection.close()


def _find_short_folder() -> str | None:
    """A folder for Ray's sockets; None is the usual one for temporary files."""
    usual = tempfile.gettempdir()
    return "/tmp" if len(usual) + len("/pome-ray-12345678") + _SOCKETS > 107 and os.access("/tmp", os.W_OK) else None


def _make_environment(address: str | None) -> dict[str, str]:
    """The environment of the process: Ray's settings, and the way to this very pome."""
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": path}
    if address is None:
        # A secret of this run alone. Ray would write one to ~/.ray, and change how clusters are spoken to by that.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment.pop("RAY_ADDRESS", None)
    elif "RAY_AUTH_MODE" not in environment and (
        environment.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} or (Path.home() / ".ray/auth_token").is_file()
    ):
        # `ray start` asks for the token where there is one, and a driver with an address does not offer it by itself.
        environment["RAY_AUTH_MODE"] = "token"
    return environment
