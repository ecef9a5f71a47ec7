"""Calls to the Hub: retries of passing failures, and a message for each kind of failure."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TypeVar

from pome.errors import HubError, printable

# Seconds before each further try of what failed in a way that passes by itself: 4 retries, 15 s in all.
WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 300.0  # that a server may ask for; the window of the Hub's rate limits
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

# Raised for an answer without the expected JSON, or for an invalid name: the library checks neither.
_NOT_KNOWN = (ValueError, LookupError, TypeError, AttributeError)

Value = TypeVar("Value")


def ask_hub(what: str, call: Callable[[], Value], *, patient: bool = True) -> Value:
    """Result of a call to the Hub, which is repeated while it fails for a passing reason. Raises HubError.

    Without patience a Hub to which no connection can be made is tried once more, and not for all of WAITS: the first
    request about a name, which may be a mistyped path on a machine without a network.
    """
    for wait in WAITS:
        try:
            return call()
        except list_library_errors() as error:
            given_up = not patient and wait != WAITS[0] and _is_out_of_reach(error)
            if given_up or not _may_pass(error):
                raise explain_failure(what, error) from None
            time.sleep(min(max(wait, _read_wait(error)), _LONGEST_WAIT))
    try:
        return call()
    except list_library_errors() as error:
        raise explain_failure(what, error) from None


def list_library_errors() -> tuple[type[Exception], ...]:
    """What the Hub's library raises, whichever HTTP library it is built on: that has changed twice."""
    from huggingface_hub import errors

    mro = errors.HfHubHTTPError.__mro__
    bases = [base for base in mro if issubclass(base, Exception) and base is not Exception]
    return (*bases, errors.EntryNotFoundError, RuntimeError, *_NOT_KNOWN)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    from huggingface_hub import errors

    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalTokenNotFoundError)):
        return False
    if isinstance(error, errors.LocalEntryNotFoundError):  # "neither there nor here": its cause says why not there
        return error.__cause__ is not None and _may_pass(error.__cause__)
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of a thread that uploads one file
        return _may_pass(error.__cause__)
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error) in _PASSING
    if isinstance(error, _NOT_KNOWN):
        return False
    return not isinstance(error, OSError) or error.errno is None or isinstance(error, ConnectionError)


def _is_out_of_reach(error: BaseException) -> bool:
    """Whether no connection could be made: no network, no such host, nobody who answers there."""
    seen: BaseException | None = error
    while seen is not None:
        # Names, since the Hub's library has been built on three HTTP libraries.
        if type(seen).__name__ in ("ConnectError", "ConnectTimeout", "NewConnectionError", "NameResolutionError"):
            return True
        if isinstance(seen, (ConnectionRefusedError, socket.gaierror)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _read_wait(error: BaseException) -> float:
    """Seconds that the server asked to wait, or 0."""
    text = _read_header(error, "retry-after")
    return float(text) if text.isdigit() else 0.0


def _read_header(error: BaseException, name: str) -> str:
    return str(getattr(getattr(error, "response", None), "headers", {}).get(name, ""))


def explain_failure(what: str, error: BaseException) -> HubError:
    """A HubError of one line that names the repository, the reason and the next step."""
    reason, step = _explain(error)
    return HubError(f"{printable(what)}: {reason}; {step}")


def _explain(error: BaseException) -> tuple[str, str]:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "gated", "accept its terms on its page, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision", "check what stands after the @"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "you are not logged in", "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _explain(error.__cause__)
    status = _status(error)
    if status == 401 and "credentials" in _read_header(error, "x-error-message"):
        return "the Hub does not know the token", "log in again with `hf auth login`, or correct HF_TOKEN"
    # The Hub answers 401 for what it hides from those who have not logged in, be it private or absent.
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            "neither a local file or folder nor a repository that the Hub shows you",
            "check the name, or log in with `hf auth login` if it is private",
        )
    if status == 403:
        return "the Hub answered 403", "check what your token allows on its settings page"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__
        if cause is not None and not isinstance(cause, errors.OfflineModeIsEnabled):
            return _explain(cause)
        return "not (wholly) in the local cache, and the Hub is switched off", "unset HF_HUB_OFFLINE, or give a folder"
    if status is not None:
        return f"the Hub answered {status}", "try again later"
    detail = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
    if isinstance(error, _NOT_KNOWN):
        return f"the request or its answer is not what the Hub knows ({detail})", "check the name and HF_ENDPOINT"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return (
            f"cannot be stored in the cache {constants.HF_HUB_CACHE} ({error.strerror})",
            "make room there, or set HF_HOME to another place",
        )
    return f"cannot reach the Hub ({detail})", "check the network"
