"""Upload of a complete output to the Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from pome.checkpoint.hub_calls import ask_hub
from pome.errors import HubError

_NEVER = (".git", ".cache")  # what git and the Hub's client keep in a folder


def check_login(repo: str) -> None:
    """Refuse early what an upload would refuse late: no token, a wrong one, or no network. Raises HubError."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repo}: nothing can be uploaded while HF_HUB_OFFLINE is set; unset it, or upload later")
    ask_hub(repo, lambda: HfApi().whoami())


def push_output(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder as one new commit of a model repository, which is made if it is missing; its address.

    Readers see the whole output or nothing of it: large files are stored first, and the one commit names all. The
    library's own upload of a folder makes several commits, between which the model is half old and half new.
    `private` says what a new repository becomes; one that exists keeps what it is. Raises HubError with the command
    that tries again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [CommitOperationAdd(name, folder / name) for name in names if name.split("/")[0] not in _NEVER]
    try:
        # None and not False: an organization may have set that new repositories are private.
        address = ask_hub(repo, lambda: api.create_repo(repo, private=private or None, exist_ok=True))
        message = "Upload an output of pome"
        ask_hub(repo, lambda: api.create_commit(repo, files, commit_message=message))
    except (HubError, KeyboardInterrupt) as error:
        again = shlex.join(["hf", "upload", repo, str(folder), ".", "--create-pr", *(["--private"] * private)])
        said = (
            f"{str(error) or 'interrupted'}; {folder} is complete, upload it with `{again}` and merge that when whole"
        )
        raise type(error)(said) from None
    return str(address)
