"""Measured rates are of the routes that the estimate asks for, and what they measure is an edit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import pome
from pome.editing import measurement
from pome.editing.lora_merge import make_patch
from pome.editing.measurement import (
    Probe,
    choose_probes,
    make_sample,
    measure_copy,
    measure_hash,
    measure_routes,
    time_units,
)
from pome.editing.session import open_pair
from pome.planning.estimate import list_tasks
from pome.planning.rates import measure_size
from support.adapters import make_pair
from support.checkpoints import llama_pair

SPEC = pome.EditSpec()


@pytest.mark.parametrize(
    ("probe", "route"),
    [
        (Probe(80, 40), "svd-float64"),
        (Probe(300, 100, "F32"), "gram-float64"),
        (Probe(1500, 800), "deflated-float32"),
        (Probe(300, 100, "BF16", 8), "factors"),
        (Probe(300, 100, "BF16", 8, edited=False), "merge"),
    ],
)
def test_a_sample_is_edited_by_the_route_that_is_told(probe: Probe, route: str) -> None:
    unit, data = make_sample(probe)
    ((told, m, n, _),) = list_tasks(unit, SPEC)
    assert (told, m, n) == (route, probe.m, probe.n)
    patch = make_patch(unit, data, SPEC, "cpu")
    assert patch.data is not None and len(patch.tensors) == probe.edited
    assert not probe.edited or route in (patch.tensors[0].solver, "deflated-float32")  # which may hand over


def test_rates_are_of_all_workers_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "ROUND_SECONDS", 0.05)
    monkeypatch.setattr(measurement, "time_units", lambda unit, data, devices, threads, count: 0.5 / len(devices))
    probe = Probe(300, 100)
    far = time.monotonic() + 60
    one, four = (measure_routes([probe], ["cpu"], cores, far)["gram-float64"] for cores in (1, 4))
    assert one[0][0] == four[0][0] == measure_size(300, 100) and four[0][1] == pytest.approx(4 * one[0][1])
    assert measure_routes([probe], ["cpu"], 1, time.monotonic() - 1) == {}


def test_timing_does_the_work_so_often_and_leaves_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    unit, data = make_sample(Probe(64, 32))
    kept = bytes(data[0]) if isinstance(data[0], bytearray) else b""
    assert 0.0 < time_units(unit, data, ["cpu"] * 2, 1, 6) < 60.0
    assert torch.get_num_threads() == before and data[0] == kept  # edited in place, but not the sample


def test_probes_are_the_costly_shapes_of_a_plan(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    with open_pair(base, ft, pome.EditSpec(layers=("ffn",))) as opened:
        assert choose_probes(opened.plan.units) == [Probe(40, 16, "F32")]
    pair = make_pair(tmp_path / "adapted", "llama", r=4, target_modules=["up_proj", "q_proj"])
    with open_pair(pair.base, pair.adapter, SPEC) as opened:
        found = choose_probes(opened.plan.units)
    assert {(probe.rank, probe.edited) for probe in found} == {(4, True), (4, False)}


def test_copies_and_hashes_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "FILE_BYTES", 1 << 20)
    assert measure_copy(str(tmp_path)) > 0 and list(tmp_path.iterdir()) == []
    assert measure_hash(1) > 0
