"""Checkpoints on the Hub: byte ranges over HTTP, or whole snapshots in the Hub's own cache."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pome.checkpoint.files import File, LocalFile, LocalListing
from pome.checkpoint.hub_calls import ask_hub, list_library_errors
from pome.checkpoint.leftovers import find_leftover
from pome.errors import HubError, printable

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# One request asks for at most this much: a server's or a proxy's limit on the time of one answer is then never met.
_PIECE = 32 << 20
NOT_FETCHED = "{reason}; not downloaded"
# Offline, for releases of the library that know what the cache lacks: files that no output needs (find_leftover).
_NOT_NEEDED = (
    "pytorch_model*.bin*", "*/pytorch_model*.bin*", "tf_model*", "flax_model*", "rust_model.ot", "*.gguf", "*.onnx*",
    "consolidated*", "original/*", "metal/*", "*checkpoint-[0-9]*/*", "global_step[0-9]*/*", "optimizer*",
)  # fmt: skip


def is_repository(text: str) -> bool:
    """Whether a text has the form `org/name[@revision]`."""
    return _ID.fullmatch(text) is not None


def split_id(text: str) -> tuple[str, str | None]:
    """`org/name`, and the revision if one is given, of a text for which `is_repository` holds."""
    match = _ID.fullmatch(text)
    assert match is not None
    return match["repo"], match["revision"]


def _leave_out(names: Iterable[str]) -> dict[str, str]:
    """The files of a repository that are not fetched for FT, each with the reason."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    reasons = {name: find_leftover(name, folders[name.rpartition("/")[0]]) for name in names}
    return {name: NOT_FETCHED.format(reason=reason) for name, reason in reasons.items() if reason}


def fetch_snapshot(text: str) -> Snapshot:
    """All files of a repository that an output may hold, downloaded; offline, what the cache has. Raises HubError."""
    from huggingface_hub import constants, snapshot_download

    repo, revision = split_id(text)
    if constants.HF_HUB_OFFLINE:
        ignored = list(_NOT_NEEDED)
        folder = Path(ask_hub(text, lambda: snapshot_download(repo, revision=revision, ignore_patterns=ignored)))
        return Snapshot(folder, repo, {})

    ask_hub(text, lambda: _list_files(repo, revision), patient=False)

    def fetch() -> tuple[Path, dict[str, str]]:
        commit, files = _list_files(repo, revision)
        left_out = _leave_out(files)
        folder = Path(snapshot_download(repo, revision=revision, ignore_patterns=[*map(glob.escape, left_out)]))
        # When the Hub fails, the library returns what the cache has, perhaps of an older commit.
        absent = [name for name in files if name not in left_out and not (folder / name).is_file()]
        if folder.name != commit or absent:
            raise ConnectionError(f"{absent[0] if folder.name == commit else commit} did not come")
        return folder, left_out

    folder, left_out = ask_hub(text, fetch)
    return Snapshot(folder, repo, left_out)


def list_repository(text: str, whole: bool) -> HubListing | Snapshot:
    """The files of a repository at one commit, downloaded if `whole`; offline, those that the cache has.

    Raises HubError.
    """
    from huggingface_hub import constants

    repo, revision = split_id(text)
    if whole or constants.HF_HUB_OFFLINE:
        return fetch_snapshot(text)
    return HubListing(repo, *ask_hub(text, lambda: _list_files(repo, revision), patient=False))


def _list_files(repo: str, revision: str | None) -> tuple[str, dict[str, _Listed]]:
    """The commit of a revision, and the files there; raises what the Hub's library raises."""
    from huggingface_hub import HfApi, constants

    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
    if info.sha is None or info.siblings is None:
        raise ValueError("it names no commit or no files")
    files = {}
    for sibling in info.siblings:
        lfs = sibling.lfs
        files[sibling.rfilename] = _Listed(sibling.size or 0, lfs.sha256 if lfs else None)
    return info.sha, files


def show_commit(repo: str, revision: str) -> str:
    """`org/name@1234567`, for messages."""
    return f"{repo}@{revision[:7]}"


@dataclass(frozen=True)
class _Listed:
    size: int
    sha256: str | None  # of large files; small ones lie in git and have none


class Snapshot(LocalListing):
    """A repository at one commit, in the Hub's cache."""

    def __init__(self, folder: Path, repo: str, left_out: dict[str, str]) -> None:
        super().__init__(folder, folder.name)  # the cache names a snapshot's folder after its commit
        self.repo = repo
        self.label = show_commit(repo, folder.name)
        self.left_out = left_out
        # A repository of pickled weights alone must be told from an empty one.
        self.names = sorted({*self.names, *(name for name in left_out if "/" not in name)})

    def open(self, name: str) -> CachedFile:
        return CachedFile(self.folder / name, [self.repo, self.revision, name])

    def find_newer(self, names: Sequence[str], than: Sequence[str]) -> list[str]:
        return []  # times in the cache are those of the download


class CachedFile(LocalFile):
    """A file in the Hub's cache. Its commit and name identify it: the cache may be filled anew between two runs."""

    def __init__(self, path: Path, identity: list[Any]) -> None:
        super().__init__(path)
        self._commit = identity

    @property
    def identity(self) -> list[Any]:
        return self._commit


class HubListing:
    """A repository at one commit. Opening a file downloads nothing but what is read of it, unless the cache has it."""

    folder = None
    left_out: Mapping[str, str] = {}

    def __init__(self, repo: str, revision: str, files: dict[str, _Listed]) -> None:
        self.repo = repo
        self.revision = revision
        self.label = show_commit(repo, revision)
        self.files = files
        self.names = sorted(name for name in files if "/" not in name)

    def holds(self, name: str) -> bool:
        return name in self.files

    def find_weights_below(self) -> list[str]:
        return sorted({n.rpartition("/")[0] for n in self.files if "/" in n and n.endswith(".safetensors")})

    def find_newer(self, names: Sequence[str], than: Sequence[str]) -> list[str]:
        return []  # a commit says nothing of when its files were written

    def read(self, name: str) -> bytes:
        return self._download(name).read_bytes()

    def open(self, name: str) -> File:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, name, revision=self.revision)
        listed = self.files[name]
        identity = [self.repo, self.revision, name]
        if isinstance(cached, str):
            return CachedFile(Path(cached), identity)
        if listed.sha256 is None:
            return CachedFile(self._download(name), identity)
        url = hf_hub_url(self.repo, name, revision=self.revision)
        return RemoteFile(url, f"{self.label}/{name}", listed.size, listed.sha256, identity)

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(ask_hub(f"{self.label}/{name}", lambda: hf_hub_download(self.repo, name, revision=self.revision)))


class RemoteFile:
    """A file on the Hub, read by HTTP ranges; a request that fails for a passing reason is repeated."""

    path = stored = None

    def __init__(self, url: str, where: str, size: int, sha256: str, identity: list[Any]) -> None:
        self.url = url
        self.where = where
        self.size = size
        self.sha256 = sha256
        self.identity = identity
        self._storage: str | None = None  # where the Hub sent the last request on to, signed for some time

    def read_into(self, view: memoryview, at: int) -> int:
        count = min(len(view), _PIECE, max(self.size - at, 0))
        return ask_hub(self.where, lambda: self._fetch(view[:count], at)) if count else 0

    def _fetch(self, view: memoryview, at: int) -> int:
        """One request; what arrived before the connection was cut is kept."""
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {"Range": f"bytes={at}-{at + len(view) - 1}", "Accept-Encoding": "identity"}
        storage = self._storage
        if storage is not None:
            # A signed address needs no token, and the token is the Hub's alone. An address that has expired, or whose
            # server is gone, is dropped: the Hub knows another.
            gone = contextlib.suppress(HubError, *list_library_errors())
            with gone, _stream(storage, headers) as (response, pieces):
                if response.status_code == 206:
                    return self._receive(view, at, response, pieces)
            self._storage = None
        with _stream(self.url, {**build_hf_headers(), **headers}) as (response, pieces):
            hf_raise_for_status(response)
            if urlsplit(str(response.url)).netloc != urlsplit(self.url).netloc:
                self._storage = str(response.url)
            return self._receive(view, at, response, pieces)

    def _receive(self, view: memoryview, at: int, response: Any, pieces: Iterator[bytes]) -> int:
        extent = response.headers.get("content-range", "")
        if response.status_code != 206 or not extent.startswith(f"bytes {at}-"):
            # Before its body is read: a server that does not know ranges sends the whole file.
            sent = f"{response.status_code} ({printable(extent) or 'the whole file'})"
            raise HubError(
                f"{self.where}: the server answered {sent} to a request for bytes from {at}; download the model with "
                "`hf download` and give its folder"
            )
        done = 0
        try:
            for piece in pieces:
                if done + len(piece) > len(view):
                    raise HubError(f"{self.where}: the server sent more bytes than were asked for; try again later")
                view[done : done + len(piece)] = piece
                done += len(piece)
        except list_library_errors():
            if done == 0:
                raise
        if done == 0:
            raise ConnectionError("the connection was closed before the first byte")
        return done

    def check_unchanged(self) -> None:
        """A commit never changes."""

    def close(self) -> None:
        """Nothing is held open."""


@contextlib.contextmanager
def _stream(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """A GET request's response, its body not yet read, and the pieces of the body."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if hasattr(session, "stream") and callable(session.stream):  # httpx and its successors
        with session.stream("GET", url, headers=headers, timeout=timeout) as response:
            yield response, response.iter_bytes()
    else:  # requests, up to huggingface_hub 0.36; its `stream` is a flag
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(1 << 16)
