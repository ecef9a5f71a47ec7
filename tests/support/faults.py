"""Runs of pome whose system calls fail on order, and a disk that forgets what was never synced.

`Launcher` keeps a process with torch loaded that forks a child for each run. In the child every function of `os`
through which pome touches a file below one folder is wrapped: the wrapper can kill the process, raise an error, deliver
less than was asked for, or write a trace. `Disk` replays a trace and tells what a power cut would have left.

    python faults.py        (the launcher's process: a JSON request on each line of stdin, an answer on stdout)
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from support.checkpoints import llama_pair

READS = ("preadv", "pread", "read")
WRITES = ("pwrite", "write", "copy_file_range", "ftruncate")
SYNCS = ("fsync", "fdatasync")
FOLDERS = ("create", "rename", "mkdir", "unlink", "rmdir")  # `create` is an open that makes a file
CHANGES = (*WRITES, *SYNCS, *FOLDERS, "fchmod")
WRAPPED = (*READS, *WRITES, *SYNCS, *FOLDERS[1:], "fchmod", "open", "close")
LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Fault:
    """What happens at the call numbered `at` (from 0) among the wrapped calls of the names `calls`.

    kill: SIGKILL before the call. tear: half of what it would write, then SIGKILL. error: OSError of `code`.
    forget: the same, and all that was written to this file since its last sync is undone, as Linux may do after a
    failed sync. broken: OSError of `code` from this call on, for all of `calls`. short: every call moves only part.
    """

    kind: str
    calls: tuple[str, ...]
    at: int = 0
    code: int = errno.EIO


@dataclass(frozen=True)
class Outcome:
    """How one run ended: exit status (negative: the signal), stderr, seconds, and the trace where one was asked for."""

    status: int
    stderr: str
    seconds: float
    trace: list[tuple[Any, ...]] = field(default_factory=list)
    calls: int = 0  # that the fault's names have met


class Launcher:
    """Runs pome in forked children; a context manager."""

    def __enter__(self) -> Launcher:
        folders = [str(Path(__file__).resolve().parents[2] / name) for name in ("src", "tests")]
        path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(
        self,
        arguments: Iterable[str | Path],
        root: Path,
        fault: Fault | None = None,
        *,
        kill_after: float | None = None,
        trace: bool = False,
        **settings: Any,
    ) -> Outcome:
        """One `pome ARGUMENTS`; only calls on files below `root` are counted, traced and broken.

        Settings: commit_units (how many units a journal group holds), ignore_space (do not look at free space before
        the run), file_limit (bytes: the system's limit on file sizes), unsafe (no syncs, no hashes), limit (seconds).
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {
            "arguments": [str(argument) for argument in arguments],
            "root": str(root),
            "fault": asdict(fault) if fault else None,
            "kill_after": kill_after,
            "trace": trace,
            "settings": settings,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        report = Path(answer["report"])
        outcome = Outcome(answer["status"], answer["stderr"], answer["seconds"])
        if not report.is_file():
            return outcome
        made, calls = pickle.loads(report.read_bytes())  # our own child wrote it
        report.unlink()
        return replace(outcome, trace=made, calls=calls)


class Tap:
    """Stands between pome and `os` for files below `root`."""

    def __init__(self, root: str, fault: Fault | None, trace: bool) -> None:
        self.root = root
        self.fault = fault
        self.tracing = trace
        self.trace: list[tuple[Any, ...]] = []
        self.paths: dict[int, str] = {}
        self.undo: dict[str, list[tuple[int, bytes]]] = {}
        self.count = 0
        self.lock = threading.RLock()
        self.real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in WRAPPED if hasattr(os, name)}

    def install(self) -> None:
        for name in self.real:
            setattr(os, name, self._wrap(name))

    def _wrap(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # One call at a time, so that a trace is in the order in which things happened.
            with self.lock:
                return self._call(name, arguments, options)

        return call

    def _call(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        real = self.real[name]
        path = self._find_path(name, arguments, options)
        if name == "close":
            self.paths.pop(arguments[0], None)
            return real(*arguments)
        if path is None:
            return real(*arguments, **options)
        creates = name == "open" and bool(arguments[1] & (os.O_CREAT | os.O_TRUNC))
        kind = "create" if creates else name
        arguments = self._disturb(kind, path, arguments)
        if self.tracing:
            self._note(kind, path, arguments, options)
        if name in SYNCS:
            self.undo.pop(path, None)
        result = real(*arguments, **options)
        if name == "open":
            self.paths[result] = path
        if self.tracing and kind in WRITES and kind != "ftruncate":
            self._trim(result)
        return result

    def _find_path(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str | None:
        first = arguments[1] if name == "copy_file_range" else arguments[0]
        if isinstance(first, int):
            return self.paths.get(first)
        folder = options.get("dir_fd")
        start = self.paths.get(folder, "") if folder is not None else os.getcwd()
        path = os.path.join(start, os.fsdecode(first))
        # A folder opened only to try something (a nameless file) leaves no trace on the disk.
        nameless = name == "open" and hasattr(os, "O_TMPFILE") and arguments[1] & os.O_TMPFILE == os.O_TMPFILE
        return path if path.startswith(self.root) and not nameless else None

    def _disturb(self, kind: str, path: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        fault = self.fault
        if fault is None or kind not in fault.calls:
            if kind == "pwrite" and fault is not None and fault.kind == "forget":
                _, data, at = arguments
                with open(path, "rb") as file:
                    self.undo.setdefault(path, []).append((at, os.pread(file.fileno(), len(data), at)))
            return arguments
        here = self.count == fault.at
        late = self.count >= fault.at
        self.count += 1
        if fault.kind == "short":
            return _shorten(kind, arguments, 1 + 61 * self.count % 997)
        if fault.kind == "broken" and late:
            raise OSError(fault.code, os.strerror(fault.code))
        if not here:
            return arguments
        if fault.kind == "tear":
            half = _shorten(kind, arguments, max(1, _size(kind, arguments) // 2))
            self.real[kind](*half)
        if fault.kind in ("kill", "tear"):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "forget":
            for at, data in reversed(self.undo.pop(path, [])):
                self.real["pwrite"](arguments[0], data, at)
        if fault.kind in ("error", "forget"):
            raise OSError(fault.code, os.strerror(fault.code))
        return arguments

    def _note(self, kind: str, path: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if kind == "pwrite":
            self.trace.append(("write", path, arguments[2], bytes(arguments[1])))
        elif kind == "write":
            self.trace.append(("write", path, os.lseek(arguments[0], 0, os.SEEK_CUR), bytes(arguments[1])))
        elif kind == "copy_file_range":
            source, _, size, source_at, at = arguments
            self.trace.append(("write", path, at, os.pread(source, size, source_at)))
        elif kind == "ftruncate":
            self.trace.append(("truncate", path, arguments[1]))
        elif kind in SYNCS:
            self.trace.append(("sync", path))
        elif kind == "create":
            self.trace.append(("create", path))
            if arguments[1] & os.O_TRUNC:
                self.trace.append(("truncate", path, 0))
        elif kind == "rename":
            self.trace.append(("rename", path, os.path.abspath(os.fspath(arguments[1]))))
        elif kind in ("mkdir", "unlink", "rmdir"):
            self.trace.append((kind, path))

    def _trim(self, written: int) -> None:
        """Keep of the last noted write what the system took."""
        kind, path, at, data = self.trace[-1]
        self.trace[-1] = (kind, path, at, data[:written])


def _size(kind: str, arguments: tuple[Any, ...]) -> int:
    return int(arguments[2]) if kind == "copy_file_range" else len(arguments[1])


def _shorten(kind: str, arguments: tuple[Any, ...], most: int) -> tuple[Any, ...]:
    """The same call for at most `most` bytes."""
    if kind in ("pwrite", "write"):
        return (arguments[0], arguments[1][:most], *arguments[2:])
    if kind == "preadv":
        return (arguments[0], [arguments[1][0][:most]], arguments[2])
    if kind == "pread":
        return (arguments[0], min(arguments[1], most), arguments[2])
    if kind == "copy_file_range":
        return (*arguments[:2], min(arguments[2], most), *arguments[3:])
    return arguments


class Node:
    """A file or a folder of a `Disk`; `ops` are the writes to a file, each with whether a sync followed it."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.entries: dict[str, Node] = {}
        self.ops: list[tuple[Any, ...]] = []
        self.synced = 0


@dataclass
class Change:
    """One change of folders: entries that appear (None: go away) in each of the folders it touches, all at once."""

    entries: list[tuple[Node, str, Node | None]]
    safe: bool = False


class Disk:
    """The file system below `root` as a trace leaves it, and as a power cut would.

    What POSIX promises and no more: bytes of a file are safe after a sync of the file, an entry of a folder after a
    sync of the folder, and a rename happens in both folders or in none.
    """

    def __init__(self, root: str, trace: Iterable[tuple[Any, ...]]) -> None:
        self.root = root
        self.top = Node(True)
        self.changes: list[Change] = []
        for op in trace:
            getattr(self, "_" + op[0])(*op[1:])

    def _find(self, path: str) -> tuple[Node, str]:
        *folders, name = os.path.relpath(path, self.root).split(os.sep)
        node = self.top
        for folder in folders:
            if folder not in node.entries:  # made by a function that is not wrapped: taken for safe
                self._change([(node, folder, Node(True))], safe=True)
            node = node.entries[folder]
        return node, name

    def _change(self, entries: list[tuple[Node, str, Node | None]], safe: bool = False) -> None:
        self.changes.append(Change(entries, safe))
        _apply(entries)

    def _mkdir(self, path: str) -> None:
        parent, name = self._find(path)
        if name not in parent.entries:
            self._change([(parent, name, Node(True))])

    def _create(self, path: str) -> None:
        parent, name = self._find(path)
        if name not in parent.entries:
            self._change([(parent, name, Node(False))])

    def _unlink(self, path: str) -> None:
        parent, name = self._find(path)
        if name in parent.entries:
            self._change([(parent, name, None)])

    _rmdir = _unlink

    def _rename(self, path: str, to: str) -> None:
        old, name = self._find(path)
        new, target = self._find(to)
        self._change([(old, name, None), (new, target, old.entries[name])])

    def _write(self, path: str, at: int, data: bytes) -> None:
        parent, name = self._find(path)
        parent.entries[name].ops.append(("write", at, data))

    def _truncate(self, path: str, size: int) -> None:
        parent, name = self._find(path)
        parent.entries[name].ops.append(("truncate", size))

    def _sync(self, path: str) -> None:
        if os.path.abspath(path) == os.path.abspath(self.root):
            node = self.top
        else:
            parent, name = self._find(path)
            node = parent.entries[name]
        node.synced = len(node.ops)
        for change in self.changes:
            change.safe = change.safe or any(folder is node for folder, _, _ in change.entries)

    def cut(self, folder: Path, rng: Random | None) -> None:
        """Make `folder` hold what is left when the power goes now.

        Without `rng` nothing that was not synced is left. With it some of the writes are, some of them torn, and the
        changes of folders up to some moment (file systems keep those in order).
        """
        kept = rng.randint(0, len(self.changes)) if rng else 0
        left = Node(True)
        images = {id(self.top): left}
        for i, change in enumerate(self.changes):
            if change.safe or i < kept:
                for parent, name, node in change.entries:
                    image = images.setdefault(id(parent), Node(True))
                    if node is None:
                        image.entries.pop(name, None)
                    else:
                        image.entries[name] = images.setdefault(id(node), Node(node.folder))
                        images[id(node)].ops, images[id(node)].synced = node.ops, node.synced
        _write_out(left, folder, rng)


def _apply(entries: list[tuple[Node, str, Node | None]]) -> None:
    for parent, name, node in entries:
        if node is None:
            parent.entries.pop(name, None)
        else:
            parent.entries[name] = node


def _write_out(node: Node, path: Path, rng: Random | None) -> None:
    if node.folder:
        path.mkdir(exist_ok=True)
        for name, entry in node.entries.items():
            _write_out(entry, path / name, rng)
        return
    content = bytearray()
    for i, op in enumerate(node.ops):
        if i >= node.synced and (rng is None or rng.random() < 0.5):
            continue
        if op[0] == "truncate":
            content = content[: op[1]] + bytes(max(0, op[1] - len(content)))
            continue
        _, at, data = op
        if i >= node.synced and rng is not None and rng.random() < 0.3:
            data = data[: rng.randint(0, len(data))]
        content += bytes(max(0, at + len(data) - len(content)))
        content[at : at + len(data)] = data
    path.write_bytes(content)


def hash_files(folder: Path) -> dict[str, str]:
    """Every file below a folder -> the SHA-256 of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Scene:
    """A pair, the command that edits it, and what the command makes when nothing disturbs it."""

    def __init__(self, launcher: Launcher, base: Path, ft: Path, work: Path, *options: str) -> None:
        work.mkdir(exist_ok=True)
        self.launcher, self.base, self.ft, self.work = launcher, base, ft, work
        self.out, self.staging = work / "out", work / "out.pome-staging"
        self.command = ["edit", str(base), str(ft), str(self.out), *options]
        self.inputs = hash_files(base), hash_files(ft)
        started = self.run()
        assert started.status == 0, started.stderr
        self.seconds = started.seconds
        self.expected = self.read_output()
        self.clear()

    def run(self, fault: Fault | None = None, **options: Any) -> Outcome:
        """The command, with calls counted on the inputs and on everything beside OUT."""
        return self.launcher.run(self.command, self.work.parent, fault, **options)

    def count(self, *names: str, **settings: Any) -> int:
        """How many calls of these names an undisturbed run makes."""
        undisturbed = self.run(Fault("error", names, 1 << 60), **settings)
        assert undisturbed.status == 0, undisturbed.stderr
        self.clear()
        return undisturbed.calls

    def clear(self) -> None:
        for path in self.work.iterdir():
            shutil.rmtree(path)

    def read_output(self) -> dict[str, Any]:
        """Hashes of all files of OUT, and its manifest without what may differ between two runs."""
        files: dict[str, Any] = hash_files(self.out)
        manifest = json.loads((self.out / "pome_manifest.json").read_bytes())
        del manifest["created"], manifest["timing"]
        return {**files, "pome_manifest.json": manifest}

    def check_rest(self) -> None:
        """What every fault must leave: the inputs as they were, and no OUT or the whole one."""
        assert (hash_files(self.base), hash_files(self.ft)) == self.inputs, "an input was changed"
        if self.out.exists():
            self.check_output()

    def check_output(self) -> None:
        from pome.verification.verify import verify

        verdict = verify(self.out)
        assert verdict.ok, verdict.differences
        assert self.read_output() == self.expected, "OUT is not that of an undisturbed run"

    def check_resume(self) -> Outcome:
        """The rest is as it must be, and the same command completes it to the byte, leaving nothing beside it."""
        self.check_rest()
        # Killed at the very end, a run is done: then the same command finds OUT there, as after any finished run.
        done = self.out.exists() and not (self.staging.is_dir() and any(self.staging.iterdir()))
        again = self.run()
        assert again.status == (1 if done else 0), again.stderr
        self.check_rest()
        assert done or [path.name for path in self.work.iterdir()] == ["out"]
        self.clear()
        return again


def check_message(outcome: Outcome) -> None:
    """An error of the machine, told as one: status 1, one line, a file and a next step in it, no traceback."""
    assert outcome.status == 1, outcome
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in outcome.stderr, outcome.stderr
    assert "/" in lines[0] and ("; " in lines[0]), lines[0]


def main() -> None:
    """Serve requests until stdin ends."""
    import torch

    from pome.cli.app import run_command

    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="pome-launcher-")
    # Once here, so that everything is loaded before the first fork.
    base, ft = llama_pair(Path(folder))
    run_command(["edit", str(base), str(ft), folder + "/out", "--quiet"])
    shutil.rmtree(folder)
    os.mkdir(folder)
    gc.freeze()  # else the collector of each child would copy every page of torch's objects
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        report = os.path.join(folder, str(number))
        begun = time.perf_counter()
        errors = os.open(report + ".err", os.O_WRONLY | os.O_CREAT)  # here: a child may be killed before its first call
        pid = os.fork()
        if pid == 0:
            _serve(request, report, errors)
        os.close(errors)
        after = request["kill_after"]
        limit = after if after is not None else request["settings"].get("limit", LIMIT_SECONDS)
        done, status = os.waitpid(pid, os.WNOHANG)
        while not done and time.perf_counter() - begun < limit:
            time.sleep(0.0005)
            done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.perf_counter() - begun,
            "stderr": Path(report + ".err").read_text(errors="surrogateescape"),
            "report": report,
        }
        os.unlink(report + ".err")
        print(json.dumps(answer), flush=True)
    os.rmdir(folder)


def _serve(request: dict[str, Any], report: str, errors: int) -> None:
    """In the child: set the faults up, run, leave."""
    import pome.editing.hashes
    import pome.output.clone
    import pome.output.commits
    import pome.output.staging
    from pome.cli.app import run_command

    settings = request["settings"]
    null = os.open(os.devnull, os.O_RDWR)
    for fd, to in ((null, 0), (null, 1), (errors, 2)):
        os.dup2(fd, to)
    if "commit_units" in settings:
        pome.output.commits.COMMIT_UNITS = settings["commit_units"]
    if settings.get("ignore_space"):
        pome.output.staging.Staging.check_space = lambda *_: None  # type: ignore[method-assign]
    if "file_limit" in settings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_limit"], resource.RLIM_INFINITY))
    if settings.get("unsafe"):
        os.fsync = os.fdatasync = lambda fd: None
        fake: Any = lambda path, advance, wait=None: (os.stat(path).st_size, "0" * 64)  # noqa: E731
        pome.editing.hashes.hash_file = fake
    tap = None
    if request["fault"] or request["trace"]:
        # Shared blocks would pass by the wrapped calls.
        pome.output.clone.share_file = lambda *_: False
        fault = request["fault"]
        tap = Tap(request["root"], Fault(**fault) if fault else None, request["trace"])
        tap.install()
    try:
        status = run_command(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    sys.stderr.flush()
    if tap is not None:
        Path(report).write_bytes(pickle.dumps((tap.trace, tap.count)))
    os._exit(status)


if __name__ == "__main__":
    main()
