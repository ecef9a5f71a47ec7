"""Units of a plan: their byte ranges, their labels, and what a plan says that the edit will read, write and hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pome.manifest import KeptRecord
from pome.planning.units import FLOAT64_ENTRIES, TORCH_BYTES, Plan, Unit, fan_out_in
from pome.roles.layout import Block, Part
from support.checkpoints import environment, perturb, write_checkpoint
from support.units import UP, make_unit


def work(*units: Unit) -> int:
    """The bytes that a plan expects on one core beyond those of torch itself."""
    return Plan(units, (), 9, {}).expect_memory(1) - TORCH_BYTES


def test_labels_name_expert_and_part() -> None:
    half = Part("up", "half=up", Block(0, 1, 40, 20, 20))
    assert make_unit().label(UP) is None
    assert make_unit().label(half) == "half=up"
    assert make_unit(expert=0).label(UP) == "expert=0"
    assert make_unit(expert=3).label(half) == "expert=3,half=up"


def test_shapes_are_those_of_the_map_and_not_of_the_storage() -> None:
    half = Part("up", "half=up", Block(1, 1, 16, 8, 8))
    assert fan_out_in(make_unit(), UP) == (40, 16)
    assert fan_out_in(make_unit(transposed=True), UP) == (16, 40)
    assert fan_out_in(make_unit(transposed=True, parts=(half,)), half) == (8, 40)


def test_totals_are_sums_over_units_whatever_their_dtypes() -> None:
    units = (make_unit((40, 16), ("BF16", "F32", "F64")), make_unit((10, 4), ("F32", "BF16", "BF16")))
    plan = Plan(units, (), 9, {})
    assert plan.bytes_read == 640 * (2 + 4) + 40 * (4 + 2)
    assert plan.bytes_written == 640 * 8 + 40 * 2


def test_of_an_adapter_only_base_is_read_unit_by_unit() -> None:
    units = (make_unit((40, 16), change=object()), make_unit((10, 4), ("BF16", "F32", "F32"), change=object()))
    assert Plan(units, (), 9, {}).bytes_read == 640 * 4 + 40 * 4


def test_the_document_has_a_row_for_each_matrix() -> None:
    halves = tuple(Part(role, f"half={role}", Block(0, 1, 40, at, 20)) for role, at in (("gate", 0), ("up", 20)))
    units = (make_unit(parts=halves, expert=1), make_unit(parts=()), make_unit((8, 4), ("BF16", "F32", "F64")))
    plan = Plan(units, (KeptRecord("k", "half=up", "why"),), 9, {})
    row = {"name": "w", "base": "b", "file": "f", "dtype": "F32"}
    assert plan.to_json() == {
        "edit": [
            row | {"part": "expert=1,half=gate", "role": "gate", "shape": [20, 16]},
            row | {"part": "expert=1,half=up", "role": "up", "shape": [20, 16]},
            row | {"part": None, "role": "up", "shape": [8, 4], "dtype": "F64"},
        ],
        "keep": [{"name": "k", "part": "half=up", "reason": "why"}],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory_bytes": plan.memory,
    }


# Peak beyond that of an edit of 8 x 8, in MiB, as `test_the_recorded_peaks_are_those_of_edits` measures it.
PEAKS = {
    ((1200, 1200), "F32"): 89,
    ((3000, 600), "F32"): 63,
    ((600, 3000), "F32"): 63,
    ((1200, 1200), "BF16"): 92,
    ((1200, 1200), "F64"): 103,
}


ALONE = 257  # the peak of an edit of 8 x 8 itself


def test_a_process_that_has_loaded_torch_fits_in_what_is_counted_for_it() -> None:
    assert ALONE <= TORCH_BYTES / 2**20 <= 1.5 * ALONE


@pytest.mark.parametrize(("shape", "dtype"), PEAKS)
def test_the_expected_memory_is_near_the_peak_of_an_edit(shape: tuple[int, int], dtype: str) -> None:
    """The formula is one of the worst route of the kernel; a unit may take another, and torch's own memory varies."""
    assert 0.75 * PEAKS[shape, dtype] < work(make_unit(shape, (dtype,) * 3)) / 2**20 < 1.4 * PEAKS[shape, dtype]


PEAK = """
import pathlib, re, resource, sys
import pome
pome.edit(*sys.argv[1:4])
status = pathlib.Path("/proc/self/status")
if status.exists():  # on Linux ru_maxrss begins with what the process that started this one had
    print(1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure_peak(folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """MiB that a process held at most which edited one matrix."""
    base = {"layers.0.mlp.up_proj.weight": torch.randn(shape).to(dtype)}
    sides = write_checkpoint(folder / "base", base), write_checkpoint(folder / "ft", perturb(base))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *sides, folder / "out"],
        env=environment(), check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(re.findall(r"\d+", done.stdout)[-1]) / 2**20


@pytest.mark.slow
def test_the_recorded_peaks_are_those_of_edits(tmp_path: Path) -> None:
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}
    alone = measure_peak(tmp_path / "small", (8, 8), torch.float32)
    assert alone == pytest.approx(ALONE, rel=0.25)
    for at, ((shape, dtype), peak) in enumerate(PEAKS.items()):
        assert measure_peak(tmp_path / str(at), shape, dtypes[dtype]) - alone == pytest.approx(peak, rel=0.25)


def test_the_expected_memory_grows_as_matrices_do() -> None:
    small = work(make_unit((300, 100)))
    assert work(make_unit((600, 200))) == 4 * small  # every term is a product of two sides
    assert work(make_unit((100, 300))) == work(make_unit((300, 100), transposed=True)) == small
    assert work(make_unit((600, 100))) < 2 * small < work(make_unit((300, 200)))  # the short side costs most
    assert work(make_unit((300, 100), ("BF16",) * 3)) < small
    both = {work(make_unit((300, 100), dtypes)) for dtypes in (("F64", "F32", "F32"), ("F32", "F64", "F64"))}
    assert len(both) == 1 and small < both.pop() < work(make_unit((300, 100), ("F64",) * 3)) < 2 * small


@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from(["F32", "BF16", "F64"]))
def test_each_row_of_the_long_side_takes_the_same_memory(n: int, more: int, dtype: str) -> None:
    a, b, c = (make_unit((n + more + i, n), (dtype,) * 3).workspace for i in range(3))
    assert a < b and c - b == b - a


def test_a_large_float64_matrix_takes_as_much_for_a_row_as_a_small_one() -> None:
    """Small matrices of every dtype are worked on in float64."""
    n = 512
    sizes = [make_unit((m, n), ("F64", "F32", "F32")).workspace for m in (600, 700, FLOAT64_ENTRIES // n + 600)]
    assert (sizes[2] - sizes[0]) * 100 == (sizes[1] - sizes[0]) * (FLOAT64_ENTRIES // n)


@given(st.integers(1, 300), st.integers(0, 300))
def test_the_method_equivalence_takes_the_more_memory_the_longer_and_the_wider_a_matrix_is(n: int, more: int) -> None:
    """Both weights, singular vectors and products in float64, seven matrices of 8 bytes an entry, and no less."""

    def expect(m: int, n: int) -> int:
        return Plan((make_unit((m, n)),), (), 9, {}, by_equivalence=True).expect_memory(1) - TORCH_BYTES

    a, b, c = (expect(n + more + i, n) for i in range(3))
    assert c - b == b - a >= 7 * 8 * n
    assert a == expect(n, n + more) >= 7 * 8 * n * (n + more)
    assert a > work(make_unit((n + more, n)))
    assert 4 * a == expect(2 * (n + more), 2 * n)


def test_the_largest_unit_alone_counts() -> None:
    large, small = make_unit((300, 100)), make_unit((30, 10))
    assert work(small, large, small) == work(large, large) == work(large) > work(small) > 0
    assert work() == 0


def test_a_merged_unit_takes_memory_for_the_change_the_sum_and_two_units() -> None:
    merged = make_unit((300, 100), parts=())
    assert work(merged) == 6 * merged.nbytes + 2 * merged.base_nbytes
    wide = make_unit((300, 100), ("BF16", "F32", "F32"), parts=())
    assert work(wide) == 6 * wide.nbytes + 2 * wide.base_nbytes
    assert work(merged, make_unit((8, 4))) == work(merged)
