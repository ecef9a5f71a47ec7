"""Surveys of a small pair and of a very large model."""

from __future__ import annotations

import dataclasses
from array import array

import pytest

from pome.inspection.records import Survey
from pome.inspection.survey import survey
from support.checkpoints import llama_pair


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return survey(*llama_pair(tmp_path_factory.mktemp("pair"), layers=3))


@pytest.fixture(scope="session")
def large(small):
    """61 layers of 256 experts: names and spectra made up, as many as a model of 671 B parameters has."""
    model = small.matrices[0]
    sigma = array("f", (0.3 / (i + 1) for i in range(2048)))
    made = []
    for layer in range(61):
        stem = f"model.layers.{layer}."
        experts = [(f"{stem}mlp.experts.{e}", role) for e in range(256) for role in ("gate", "up", "down")]
        names = [(f"{expert}.{role}_proj.weight", role) for expert, role in experts]
        names += [(f"{stem}self_attn.{role}_proj.weight", role) for role in "qkvo"]
        for i, (name, role) in enumerate(names):
            place, share = f"model.layers.{layer}", 0.01 + 0.0001 * layer + 1e-6 * i
            made.append(
                dataclasses.replace(
                    model, name=name, role=role, place=place, shape=(2048, 7168), sigma=sigma, relative_norm=share
                )
            )
    return Survey("base", "ft", tuple(made), ())
