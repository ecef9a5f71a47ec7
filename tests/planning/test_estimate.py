"""The estimate: operations held to torch's own count, sums over units, and time that only rates give."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import pome
from pome.editing.session import open_pair
from pome.kernel import ladder
from pome.kernel.equalize import Recipe, equalize, equalize_product
from pome.kernel.rank import RankRule
from pome.planning import flops
from pome.planning.devices import Device
from pome.planning.estimate import Files, Tally, estimate_plan, list_tasks
from pome.planning.flops import EIGH, ROUTES, find_route
from pome.planning.rates import Rates, measure_size
from pome.planning.units import Plan
from support.checkpoints import llama_pair
from support.units import UP, make_unit

CPU = Device("a processor, 2 cores", True, 2)
FILES = Files(1000, 3000)
SPEC = pome.EditSpec()
# In place, torch counts nothing by itself.
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, *rest, out_shape=None, **options: 2 * a[0] * a[1] * b[1]}


def count_products(D: torch.Tensor, k: int) -> tuple[float, str]:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        solver = equalize(D, rank=k, rank_rule="fixed").solver
    return float(counter.get_total_flops()), solver


@pytest.mark.parametrize("k", [100, 300])
@pytest.mark.parametrize(
    ("m", "n", "dtype", "route", "decomposition"),
    [
        (1500, 700, torch.float32, "deflated-float32", EIGH * 700**3),
        (900, 600, torch.float64, "gram-float64", EIGH * 600**3),
    ],
)
def test_products_are_as_many_as_torch_counts(
    m: int, n: int, k: int, dtype: torch.dtype, route: str, decomposition: float
) -> None:
    """Of a flat spectrum, whose work does not depend on the data; a tenth is what lies beside the large products."""
    torch.manual_seed(0)
    counted, solver = count_products(torch.randn(m, n, dtype=dtype), k)
    assert solver == route
    assert ROUTES[route](m, n, k) - decomposition == pytest.approx(counted, rel=0.1)


def test_products_of_an_adapter_are_as_many_as_torch_counts() -> None:
    torch.manual_seed(0)
    b, a = torch.randn(1500, 16), torch.randn(16, 700)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        assert equalize_product(b, a, Recipe(RankRule("ratio", 0.5))).k == 8
    assert ROUTES["factors"](1500, 700, 8) - 8 * (1500 + 700) * 16**2 == pytest.approx(
        counter.get_total_flops(), rel=0.25
    )


def test_a_merge_is_as_many_operations_as_torch_counts() -> None:
    """W + s B A: torch counts the product, and 2 m n are the scale and the sum."""
    m, n, rank = 300, 200, 16
    with FlopCounterMode(display=False) as counter:
        torch.randn(m, rank) @ torch.randn(rank, n)
    assert ROUTES["merge"](m, n, rank // 2) == counter.get_total_flops() + 2 * m * n


SIDES = st.integers(1, 5000)


@given(SIDES, SIDES, SIDES, st.sampled_from(list(ROUTES)))
def test_operations_are_products_of_two_and_of_three_sides(a: int, b: int, k: int, route: str) -> None:
    """a t^3 + b t^2 of a matrix and a k that are t times as large, and in each side more for more."""
    m, n = max(a, b), min(a, b)
    one, two, four = (ROUTES[route](t * m, t * n, t * k) for t in (1, 2, 4))
    cubic = (two - 4 * one) / 4
    assert 0 < cubic <= one and four - 16 * one == pytest.approx(48 * cubic)
    assert one < ROUTES[route](m + 1, n, k) and one < ROUTES[route](m, n + 1, k) and one <= ROUTES[route](m, n, k + 1)


@given(SIDES)
def test_a_gram_matrix_is_decomposed_once_and_by_equivalence_twice(n: int) -> None:
    """By tridiagonal form, divide and conquer, and back-transformation: (4 + 8 + 6) n^3 / 3, in LAPACK's own count."""
    alone = {route: count(0, n, n) for route, count in ROUTES.items()}
    assert alone["gram-float64"] == alone["deflated-float32"] == pytest.approx((4 + 8 + 6) * n**3 / 3)
    assert alone["equivalence"] == 2 * alone["gram-float64"]
    assert alone["svd-float64"] == 20 * n**3  # the second term of Golub and Van Loan's 6 m n^2 + 20 n^3 of an R-SVD
    assert alone["thin"] == alone["merge"] == 0


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((1600, 700), ("BF16", "BF16", "BF16")), ((1600, 700), ("BF16", "F64", "BF16")), ((700, 1600), ("F32",) * 3),
        ((600, 400), ("BF16", "BF16", "BF16")), ((2000, 95), ("F32",) * 3), ((300, 96), ("F32",) * 3),
    ],
)  # fmt: skip
def test_the_route_is_the_solver_of_the_edit(shape: tuple[int, int], dtypes: tuple[str, str, str]) -> None:
    from pome.editing.unit import TORCH_DTYPES, patch_unit, to_bytes

    unit = make_unit(shape, dtypes)
    torch.manual_seed(0)
    base = torch.randn(shape, dtype=torch.float64) * 0.02
    ft = base + 1e-2 * torch.randn(shape, dtype=torch.float64)
    data = [to_bytes(side.to(TORCH_DTYPES[dtype])) for side, dtype in ((ft, unit.dtype), (base, unit.base_dtype))]
    (record,) = patch_unit(unit, *data, SPEC, "cpu").tensors
    (task,) = list_tasks(unit, SPEC)
    assert task == (record.solver, max(shape), min(shape), record.k)


def test_k_is_that_of_the_options_and_half_where_the_data_decide() -> None:
    unit = make_unit((500, 200))

    def find_k(**options: object) -> int:
        ((_, m, n, k),) = list_tasks(unit, pome.EditSpec.from_mapping(options))
        assert (m, n) == (500, 200)
        return k

    assert find_k(rank_ratio=0.25) == 50 and find_k(rank=7) == 7 and find_k(rank=900) == 200
    assert find_k(energy=0.9) == find_k(rank_rule="noise-floor") == 100
    assert find_k(overrides=[{"match": "w", "rank": 3}]) == 3
    ((route, *_, k),) = list_tasks(make_unit((3000, 2000)), pome.EditSpec(rank_ratio=0.25))
    assert (route, k) == ("deflated-float32", 500)


def test_sums_are_over_all_units_and_time_is_operations_over_rates() -> None:
    large, small = make_unit((2048, 1024)), make_unit((64, 32))
    plan = Plan((large, large, small), (), 9, {})
    size = measure_size(2048, 1024)
    rates = Rates(
        "today", 2.0, copy_bytes=500.0, hash_bytes=1000.0,
        routes={"deflated-float32": ((size, 1e9),), "svd-float64": ((10.0, 1e6),)},
    )  # fmt: skip
    cost = estimate_plan(plan, SPEC, FILES, CPU, rates, planning_seconds=0.5)
    flops = 2 * ROUTES["deflated-float32"](2048, 1024, 512)
    assert cost.routes["deflated-float32"].flops == flops and cost.routes["deflated-float32"].matrices == 2
    assert cost.edit_seconds == pytest.approx(flops / 1e9 + ROUTES["svd-float64"](64, 32, 16) / 1e6)
    assert (cost.start_seconds, cost.copy_seconds, cost.hash_seconds) == (3.0, 2.0, 3.0)
    assert cost.seconds == pytest.approx(8.0 + (cost.edit_seconds or 0.0))
    assert (cost.bytes_read, cost.bytes_written) == (plan.bytes_read, plan.bytes_written)
    assert (cost.unit_memory, cost.memory) == (large.workspace, plan.expect_memory(2))
    assert cost.unmeasured == [] and cost.to_json()["seconds"] == cost.seconds


@pytest.mark.parametrize(
    ("known", "missing"),
    [
        (None, ["route deflated-float32", "start", "copies", "hashes"]),
        (Rates("x", 1.0, 1.0, 1.0, {"svd-float64": ((9.0, 9.0),)}), ["route deflated-float32"]),
        (Rates("x", None, 1.0, None, {"deflated-float32": ((9.0, 9.0),)}), ["start", "hashes"]),
    ],
)
def test_an_estimate_without_a_measured_rate_has_no_time(known: Rates | None, missing: list[str]) -> None:
    cost = estimate_plan(Plan((make_unit((2048, 1024)),), (), 9, {}), SPEC, FILES, CPU, known)
    assert cost.seconds is None and cost.unmeasured == missing
    assert cost.routes["deflated-float32"].flops > 0


def test_the_rates_that_a_run_leaves_give_its_time_again() -> None:
    tally, units = Tally(SPEC), [make_unit((2048, 1024)), make_unit((2048, 1024)), make_unit((3000, 96))]
    for unit, seconds in zip(units, (4.0, 5.0, 3.0), strict=True):
        tally.add(unit, seconds)
    points = tally.find_points(wall=6.0)  # two workers
    rates = Rates("x", 1.0, 1.0, 1.0, points)
    cost = estimate_plan(Plan(tuple(units), (), 9, {}), SPEC, FILES, CPU, rates)
    assert cost.edit_seconds == pytest.approx(6.0)
    brief = Tally(SPEC)
    brief.add(units[0], 0.1)
    assert brief.find_points(wall=0.1) == {}


@pytest.mark.parametrize(
    ("dora", "routes"),
    [(False, {"factors": 2, "merge": 2}), (True, {"svd-float64": 2, "merge": 4})],  # a DoRA is no product of factors
)
def test_a_merge_counts_where_an_adapter_changes_more_than_is_edited(
    dora: bool, routes: dict[str, int], tmp_path: Path
) -> None:
    from support.adapters import make_pair

    pair = make_pair(tmp_path, "llama", r=4, target_modules=["up_proj", "q_proj"], use_dora=dora)
    with open_pair(pair.base, pair.adapter, SPEC) as opened:
        tasks = [task for unit in opened.plan.units for task in list_tasks(unit, SPEC)]
    assert Counter(task[0] for task in tasks) == routes
    assert {task[3] for task in tasks if task[0] != "svd-float64"} == {2}


def test_files_are_all_that_is_copied_and_hashed(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    (ft / "tokenizer.json").write_text("{}")
    with open_pair(base, ft, SPEC) as opened:
        files = opened.count_files()
        manifest = pome.edit(base, ft, tmp_path / "out")
    out = sum(file.stat().st_size for file in (tmp_path / "out").iterdir() if file.name != "pome_manifest.json")
    sides = [sum(file.bytes for file in side.files.values()) for side in (manifest.base, manifest.fine_tuned)]
    assert files == Files(out, out + sum(sides))


def test_a_route_is_told_by_the_unit_and_the_options() -> None:
    unit = dataclasses.replace(make_unit((500, 400)), parts=(UP,))
    assert find_route(unit, 500, 400, SPEC) == "gram-float64"
    assert find_route(unit, 5000, 4000, SPEC) == "deflated-float32"
    assert find_route(unit, 5000, 4000, pome.EditSpec(method="equivalence")) == "equivalence"
    assert find_route(unit, 5000, 4000, pome.EditSpec(rank=32)) == "thin"
    assert find_route(unit, 5000, 4000, pome.EditSpec(rank=1000)) == "deflated-float32"


def test_the_limits_of_the_routes_are_the_kernel_s() -> None:
    assert (flops.SMALL, flops.THIN, flops.SHARE) == (ladder.SMALL, ladder.THIN, ladder.SHARE)
