"""Checkpoints on the Hub: byte ranges of the files that are needed, or whole snapshots through the Hub's own cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pome.checkpoint.files import File, LocalFile, LocalListing
from pome.errors import HubError, printable

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# One request asks for at most this much, so that a connection cut in the middle costs no more than this again.
_PIECE = 32 << 20
# Of FT all files are fetched, but not weights in formats that the output would leave out.
_NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx*", "*.gguf", "*.tflite", "*.ot"]


def is_repository(text: str) -> bool:
    """Whether a text has the form `org/name[@revision]`."""
    return _ID.fullmatch(text) is not None


def _split(text: str) -> tuple[str, str | None]:
    match = _ID.fullmatch(text)
    assert match is not None  # callers asked is_repository
    return match["repo"], match["revision"]


def fetch_snapshot(text: str) -> tuple[Path, str]:
    """Download all files of a repository that an output may hold (or find them cached): their folder and the commit."""
    from huggingface_hub import snapshot_download

    repo, revision = _split(text)
    with _explain(text):
        folder = Path(snapshot_download(repo, revision=revision, ignore_patterns=_NOT_FETCHED))
    return folder, folder.name  # the cache names a snapshot's folder after its commit


def list_repository(text: str) -> HubListing | LocalListing:
    """The files of a repository at one commit; offline, those that the cache has."""
    from huggingface_hub import HfApi, constants

    repo, revision = _split(text)
    if constants.HF_HUB_OFFLINE:
        return LocalListing(*fetch_snapshot(text))
    with _explain(text):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = {}
    for sibling in info.siblings or []:
        lfs = sibling.lfs
        files[sibling.rfilename] = _Listed(sibling.size or 0, lfs.sha256 if lfs else None)
    return HubListing(repo, str(info.sha), files)


@dataclass(frozen=True)
class _Listed:
    size: int
    sha256: str | None  # of large files; small ones lie in git and have none


class HubListing:
    """A repository at one commit. Opening a file downloads nothing but what is read of it, unless the cache has it."""

    folder = None

    def __init__(self, repo: str, revision: str, files: dict[str, _Listed]) -> None:
        self.repo = repo
        self.revision = revision
        self.label = f"{repo}@{revision[:7]}"
        self.files = files
        self.names = sorted(name for name in files if "/" not in name)

    def read(self, name: str) -> bytes:
        return self._download(name).read_bytes()

    def open(self, name: str) -> File:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, name, revision=self.revision)
        if isinstance(cached, str):
            return LocalFile(Path(cached))
        listed = self.files[name]
        if listed.sha256 is None:
            return LocalFile(self._download(name))
        url = hf_hub_url(self.repo, name, revision=self.revision)
        return RemoteFile(url, f"{self.label}/{name}", listed.size, listed.sha256)

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with _explain(f"{self.label}/{name}"):
            return Path(hf_hub_download(self.repo, name, revision=self.revision))


class RemoteFile:
    """A file on the Hub, read by HTTP ranges; a failed range is asked for again by the Hub's own backoff."""

    path = None

    def __init__(self, url: str, where: str, size: int, sha256: str) -> None:
        self.url = url
        self.where = where
        self.size = size
        self.sha256 = sha256

    @property
    def identity(self) -> list[Any]:
        return [self.where, self.size, self.sha256]

    def read_into(self, view: memoryview, at: int) -> int:
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        count = min(len(view), _PIECE, max(self.size - at, 0))
        if count == 0:
            return 0
        headers = {**build_hf_headers(), "Range": f"bytes={at}-{at + count - 1}", "Accept-Encoding": "identity"}
        with _explain(self.where):
            response = http_backoff("GET", self.url, headers=headers)
            hf_raise_for_status(response)
        piece = response.content
        if response.status_code != 206 or len(piece) != count:
            raise HubError(
                f"{self.where}: the server answered {response.status_code} with {len(piece)} bytes to a request for "
                f"{count}; download the model and give its folder"
            )
        view[:count] = piece
        return count

    def check_unchanged(self) -> None:
        """A commit never changes."""

    def close(self) -> None:
        """Nothing is held open."""


@contextlib.contextmanager
def _explain(what: str) -> Iterator[None]:
    """Turn what the Hub's library raises into a HubError that names the repository and the next step."""
    from huggingface_hub import errors

    # Whichever HTTP library the Hub's is built on (it has changed twice): its errors are a base of the Hub's own.
    bases: list[type[Exception]] = [base for base in errors.HfHubHTTPError.__mro__[1:] if issubclass(base, Exception)]
    bases.remove(Exception)
    unreachable: tuple[type[Exception], ...] = (errors.OfflineModeIsEnabled, errors.HFValidationError, *bases)
    name = printable(what)
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(f"{name}: gated; accept its terms on its page, then log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name}: the repository has no such revision; check what stands after the @") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{name}: neither a local file or folder nor a repository that the Hub shows you; check the name, or log "
            "in with `hf auth login` if it is private"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise HubError(
            f"{name}: not (wholly) in the local cache, and the Hub cannot be reached; check the network and "
            "HF_HUB_OFFLINE, or give a local folder"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "an error")
        raise HubError(f"{name}: the Hub answered {status}; try again later, or give a local folder") from None
    except unreachable as error:
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise HubError(f"{name}: cannot reach the Hub ({reason}); check the network or give a local folder") from None
