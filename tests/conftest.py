"""Fixtures that several test files share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from real_weights import Pair, Trio, anarcii_trio, rxnfp_pair  # noqa: E402


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
