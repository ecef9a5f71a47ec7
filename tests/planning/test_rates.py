"""Rates of devices: interpolation, the cache that runs leave, and files that are none."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pome.errors import SpecError
from pome.planning import devices, rates
from pome.planning.devices import Device, find_device, parse_device
from pome.planning.flops import ROUTES
from pome.planning.rates import Rates, find_rates, leave_rates, match_device, read_cache, read_table

POSITIVE = st.floats(1e-3, 1e18)
POINTS = st.lists(st.tuples(st.floats(1.0, 1e5), POSITIVE), min_size=1, max_size=6, unique_by=lambda point: point[0])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pome" / "rates.json"


@given(POINTS, st.floats(1.0, 1e5))
def test_a_rate_lies_between_those_of_the_sizes_around_it(points: list[tuple[float, float]], size: float) -> None:
    rate = Rates("x", routes={"r": tuple(points)}).find_rate("r", size)
    below = [r for s, r in sorted(points) if s <= size][-1:]
    above = [r for s, r in sorted(points) if s >= size][:1]
    near = (below or above) + (above or below)
    assert rate is not None and min(near) * (1 - 1e-9) <= rate <= max(near) * (1 + 1e-9)
    assert all(Rates("x", routes={"r": tuple(points)}).find_rate("r", s) == pytest.approx(r) for s, r in points)


def test_a_route_that_was_not_measured_has_no_rate() -> None:
    assert Rates("x").find_rate("r", 10.0) is None


def test_later_runs_replace_what_they_measured_again_and_keep_the_rest(cache: Path) -> None:
    leave_rates("d", Rates("monday", 3.0, 10.0, 20.0, {"r": ((100.0, 1.0), (500.0, 2.0)), "s": ((7.0, 7.0),)}))
    leave_rates("d", Rates("tuesday", None, None, 30.0, {"r": ((104.0, 9.0), (200.0, 3.0))}))
    leave_rates("e", Rates("tuesday"))
    assert read_cache() == {
        "d": Rates("tuesday", 3.0, 10.0, 30.0, {"r": ((104.0, 9.0), (200.0, 3.0), (500.0, 2.0)), "s": ((7.0, 7.0),)}),
        "e": Rates("tuesday"),
    }
    assert [path.name for path in cache.parent.iterdir()] == ["rates.json"]  # nothing half written is left


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2, "devices": {}}', '{"format": 1}', '{"format": 1, "devices": {"d": {}}}',
     '{"format": 1, "devices": {"d": {"measured": "x", "routes": {"r": [[1, -1]]}}}}',
     '{"format": 1, "devices": {"d": {"measured": "x", "routes": {"r": [[1, NaN]]}}}}',
     '{"format": 1, "devices": {"d": {"measured": "x", "routes": {}, "copy_bytes": "fast"}}}',
     '{"format": 1, "devices": {"d": {"measured": "x", "routes": {}, "other": 1}}}'],
)  # fmt: skip
def test_a_cache_that_is_none_counts_as_empty_and_is_written_anew(text: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    assert read_cache() == {}
    leave_rates("d", Rates("x"))
    assert read_cache() == {"d": Rates("x")}


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.write_text("a file in the place of the folder")
    leave_rates("d", Rates("x"))
    assert read_cache() == {} and stat.S_ISREG(cache.parent.stat().st_mode)


def test_the_table_is_one_of_devices_with_known_routes_and_yields_to_the_cache(cache: Path) -> None:
    table = read_table()
    assert table, "this release measured no device"
    for name, row in table.items():
        assert row.measured and row.startup_seconds and row.copy_bytes and row.hash_bytes
        assert set(row.routes) <= set(ROUTES)
        assert find_rates(name) == row
    name, row = next(iter(table.items()))
    leave_rates(name, Rates("today", routes={"gram-float64": ((100.0, 5.0),)}))
    found = find_rates(name)
    assert found is not None and found.measured == "today" and found.copy_bytes == row.copy_bytes
    assert found.find_rate("gram-float64", 100.0) == 5.0
    assert find_rates("another") is None


def test_a_device_is_meant_by_a_part_of_its_name(cache: Path) -> None:
    for name in ("NVIDIA A100-SXM4-80GB", "2 x NVIDIA A100-SXM4-80GB", "H100"):
        leave_rates(name, Rates("x"))
    assert match_device("h100") == "H100" and match_device("2 x") == "2 x NVIDIA A100-SXM4-80GB"
    assert match_device("nvidia a100-sxm4-80gb") == "NVIDIA A100-SXM4-80GB"
    assert match_device("B300") == "B300"
    with pytest.raises(SpecError, match="'a100' is in the names of 2 x NVIDIA A100-SXM4-80GB; NVIDIA A100") as error:
        match_device("a100")
    assert error.value.options == ("on",)


def put_cards(monkeypatch: pytest.MonkeyPatch, folder: Path, *models: str) -> None:
    for i, model in enumerate(models):
        (folder / f"0000:0{i}:00.0").mkdir(parents=True)
        (folder / f"0000:0{i}:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")
    monkeypatch.setattr(devices, "_CARDS", folder)


def test_devices_are_named_as_the_system_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: A Processor \n\nprocessor : 1\n")
    monkeypatch.setattr(devices, "_CPU", info)
    monkeypatch.setattr(devices, "_CARDS", tmp_path / "none")
    cpu = Device("A Processor (family 26, model 2), 2 cores", True, 2)
    assert find_device("auto") == find_device("cpu") == cpu == parse_device(cpu.name)
    put_cards(monkeypatch, tmp_path / "cards", "NVIDIA A", "NVIDIA A", "NVIDIA B")
    assert find_device("cpu") == cpu
    assert find_device("auto").name == find_device("cuda").name == "2 x NVIDIA A + NVIDIA B"
    assert find_device("cuda:2").name == "NVIDIA B" and not find_device("cuda:2").on_cpu
    assert parse_device("NVIDIA B") == Device("NVIDIA B", False, 1)
    for visible, name in (("1,2", "NVIDIA A + NVIDIA B"), ("GPU-abc", "NVIDIA A"), ("", cpu.name), ("-1", cpu.name)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_device("auto").name == name


def test_the_file_is_plain_json(cache: Path) -> None:
    leave_rates("d", Rates("x", 1.5, routes={"r": ((1.0, 2.0),)}))
    row = {"measured": "x", "startup_seconds": 1.5, "copy_bytes": None, "hash_bytes": None, "routes": {"r": [[1, 2]]}}
    assert json.loads(cache.read_text()) == {"format": rates.FORMAT, "devices": {"d": row}}
