"""Fixtures that several test files share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from real_weights import Pair, Trio, anarcii_trio, cache_root, rxnfp_pair
from real_weights import smollm2 as make_smollm2
from support.hub_server import HubServer

# What a test uses, as a fixture or by name, that makes it slow: real weights, a browser, processes that are killed, a
# survey of all architectures. Marked where they stand: what starts several processes that load torch, Ray, what
# measures time or memory, and of a test over many families all but a few (support/quick.py).
SLOW = frozenset(["rxnfp", "rxnfp_bare", "anarcii", "smollm2", "open_page", "launcher", "surveyed"])


@pytest.fixture(autouse=True, scope="session")
def _own_rates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test leaves rates in the cache of the user who runs it, nor takes them from there."""
    with pytest.MonkeyPatch.context() as patch:
        # What else follows this variable stays where it is: real weights, and what matplotlib knows of fonts.
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib")))
        patch.setenv("POME_CACHE", str(cache_root()))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        if SLOW & {*item.fixturenames, *item.function.__code__.co_names}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def rxnfp() -> Pair:
    """A real BERT and its fine-tune with a 50-class head (fp32, 12 layers, d 256, ffn 512)."""
    return rxnfp_pair()


@pytest.fixture(scope="session")
def rxnfp_bare() -> Pair:
    """The same base and another fine-tune, whose names lack the prefix `bert.`."""
    return rxnfp_pair("bert_ft")


@pytest.fixture(scope="session")
def anarcii() -> Trio:
    """Three real encoder-decoders of one shape (fp32, 2 + 2 layers, d 128, ffn 512)."""
    return anarcii_trio()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M in bfloat16, dequantised from 4 bits: a real Llama checkpoint with its tokenizer."""
    return make_smollm2()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of this test's own, with an empty cache and no token; retries do not wait."""
    from huggingface_hub import constants, file_download, utils

    with HubServer() as server:
        home = tmp_path / "hf_home"
        # The library reads its environment once, when it is imported, and other tests import it earlier.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # up to 0.36
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # before retries, the library's own too
        utils.disable_progress_bars()
        yield server
        utils.enable_progress_bars()
        # Open connections would be complained of later; the function has another name up to 0.36.
        (getattr(utils, "close_session", None) or utils.reset_sessions)()
