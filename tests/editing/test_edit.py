"""The numbers of `pome.edit`, from files to files, held to a float64 SVD by definition."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import pome
from pome import EditSpec, NumericalError
from pome.editing.unit import measure_norm
from pome.manifest import FileRecord
from support.checkpoints import (
    LLAMA,
    assert_only_edited,
    count_ulps,
    llama_pair,
    perturb,
    random_llama,
    read_manifest,
    read_ranges,
    read_tensors,
    write_checkpoint,
)
from support.reference import plant, reference_edit

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SHAPES = [(48, 32), (32, 48), (40, 40), (1, 24), (24, 1), (1, 1), (130, 7), (200, 120)]


def up(i: int) -> str:
    return f"model.layers.{i}.mlp.up_proj.weight"


def make_deltas() -> list[Tensor]:
    """Float64 deltas of every shape, full, of deficient rank and of rank one, their gaps wide enough to cut at."""
    deltas = []
    for i, (m, n) in enumerate(SHAPES):
        r = min(m, n)
        full = 0.9 ** torch.arange(r, dtype=torch.float64)
        for sigma in (full, torch.where(torch.arange(r) < (r + 1) // 2, full, 0), torch.eye(r)[0].double()):
            deltas.append(plant(0.05 * sigma, m, n, seed=i, dtype=torch.float64))
    return deltas


def write_pair(folder: Path, deltas: list[Tensor], base_dtype: torch.dtype, ft_dtype: torch.dtype) -> list[Path]:
    torch.manual_seed(5)
    base = {up(i): (torch.randn(d.shape) * 0.1).to(base_dtype) for i, d in enumerate(deltas)}
    ft = {name: (w.double() + d).to(ft_dtype) for (name, w), d in zip(base.items(), deltas, strict=True)}
    return [write_checkpoint(folder / "base", base), write_checkpoint(folder / "ft", ft)]


def edit_by_definition(ft: Tensor, base: Tensor, **options: float) -> Tensor:
    """The edited weight, float64, of the weights as they are stored."""
    return base.double() + reference_edit(ft.double() - base.double(), **options).value


def assert_within_ulps(out: Tensor, wanted: Tensor) -> None:
    """At least 99.9 % of the entries within one unit in the last place of the rounded reference, all within two."""
    apart = count_ulps(out, wanted.to(out.dtype))
    assert int(apart.max()) <= 2
    assert float((apart <= 1).double().mean()) >= 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_outputs_are_the_rounded_reference(tmp_path: Path, dtype: torch.dtype) -> None:
    base, ft = write_pair(tmp_path, make_deltas(), dtype, dtype)
    pome.edit(base, ft, tmp_path / "out", EditSpec(beta=1.3))
    W_base, W_ft, W = (read_tensors(folder) for folder in (base, ft, tmp_path / "out"))
    changed = 0
    for name, w in W.items():
        assert w.dtype == dtype
        wanted = edit_by_definition(W_ft[name], W_base[name], beta=1.3)
        assert_within_ulps(w, wanted)
        changed += int(count_ulps(w, W_ft[name]).max()) > 2
    assert changed > len(W) / 2  # the tolerance would not pass what was never edited
    assert_only_edited(ft, tmp_path / "out", W)


def test_float32_outputs_hold_the_reference_edit(tmp_path: Path) -> None:
    base, ft = write_pair(tmp_path, make_deltas(), torch.float32, torch.float32)
    manifest = pome.edit(base, ft, tmp_path / "out")
    W_base, W_ft, W = (read_tensors(folder) for folder in (base, ft, tmp_path / "out"))
    compared = 0
    for record in manifest.tensors:
        name = record.name
        wanted = reference_edit(W_ft[name].double() - W_base[name].double())
        assert (record.rank, record.k) == (wanted.rank, wanted.k)
        s = [*wanted.sigma.tolist(), 0.0]
        if s[record.k - 1] - s[record.k] > 1e-3 * s[record.k - 1]:
            compared += 1
            edit = W[name].double() - W_base[name].double()
            # 1e-4 as promised; what float32 storage of the sum loses is some 1e-6 of an edit of this size.
            assert float((edit - wanted.value).norm() / wanted.value.norm()) <= 1e-4
    # The delta of a stored pair is of full rank, its lower half being rounding noise: where the cut lies in it, the
    # certificate decides.
    assert compared >= 2 * len(SHAPES)
    assert all(abs(1 - record.objective) <= 1e-5 for record in manifest.tensors)
    assert all(record.orthogonality <= 1e-5 for record in manifest.tensors)


@settings(deadline=None, max_examples=15)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    base_dtype=st.sampled_from(["F32", "F16", "BF16", "F64"]),
    ft_dtype=st.sampled_from(["F32", "F16", "BF16"]),
    ratio=st.floats(0.05, 1.0),
    beta=st.floats(0.25, 3.0),
    seed=st.integers(0, 2**16),
)
def test_any_pair_of_dtypes_and_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    m: int, n: int, base_dtype: str, ft_dtype: str, ratio: float, beta: float, seed: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("pair")
    sigma = 0.3 * 0.85 ** torch.arange(min(m, n), dtype=torch.float64)
    delta = plant(sigma, m, n, seed, torch.float64)
    base, ft = write_pair(folder, [delta], DTYPES[base_dtype], DTYPES[ft_dtype])
    spec = EditSpec(rank_ratio=ratio, beta=beta, allow_other_base=True)  # one entry may turn its sign
    (record,) = pome.edit(base, ft, folder / "out", spec).tensors
    W_base, W_ft, W = (read_tensors(side)[up(0)] for side in (base, ft, folder / "out"))
    wanted = reference_edit(W_ft.double() - W_base.double(), rank_ratio=ratio, beta=beta)
    assert (record.rank, record.k, record.dtype) == (wanted.rank, wanted.k, ft_dtype)
    s = [*wanted.sigma.tolist(), 0.0]
    if s[record.k - 1] - s[record.k] <= 1e-3 * s[record.k - 1]:
        return
    exact = W_base.double() + wanted.value
    # Half a unit in the last place is the rounding itself; 1e-4 of the edit is what float32 work is promised.
    half_ulp = torch.finfo(W.dtype).eps * exact.abs() + torch.finfo(W.dtype).smallest_normal
    assert bool(((W.double() - exact).abs() <= half_ulp + 1e-4 * wanted.value.abs().max()).all())


def test_every_number_of_the_manifest_is_what_it_says(tmp_path: Path) -> None:
    delta = plant(torch.linspace(2.0, 0.5, 24), 40, 24, dtype=torch.float64)
    base, ft = write_pair(tmp_path, [delta], torch.bfloat16, torch.bfloat16)
    (record,) = pome.edit(base, ft, tmp_path / "out", EditSpec(rank=6, beta=1.5)).tensors
    W_base, W_ft, W = (read_tensors(side)[up(0)].double() for side in (base, ft, tmp_path / "out"))
    D = W_ft - W_base
    wanted = reference_edit(D, k=6, beta=1.5)
    s = wanted.sigma
    told = [record.sigma_max, record.sigma_k, record.sigma_next, record.delta_norm, record.edit_norm, record.alpha]
    true = [*s[[0, 5, 6]].tolist(), float(D.norm()), float(wanted.value.norm()), 1.5 * float(D.norm()) / math.sqrt(6)]
    # 1e-5: the certificate's own bound on the float32 work.
    assert told == pytest.approx(true, rel=1e-5)
    assert record.energy_kept == pytest.approx(float(s[:6].square().sum() / s.square().sum()), rel=1e-5)
    assert record.rounding == pytest.approx(
        float((W - W_base - wanted.value).norm() / wanted.value.norm()), rel=1e-3
    )  # a norm of rounding errors, of which a few entries may round the other way
    assert (record.beta, record.shape, record.role, record.part, record.file) == (
        1.5, (40, 24), "up", None, "model.safetensors"
    )  # fmt: skip
    assert record.solver and record.warnings == ()


SCALES = {
    "frobenius": lambda D, s, k: float(D.norm()) / math.sqrt(k),
    "unit": lambda D, s, k: 1.0,
    "rms": lambda D, s, k: math.sqrt(D.shape[0] / D.shape[1]),
    "mean": lambda D, s, k: float(s[:k].mean()),
    "spectral": lambda D, s, k: float(s[0]),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("stored", ["out_in", "in_out"])
def test_every_scale_in_both_orientations(tmp_path: Path, scale: str, stored: str) -> None:
    torch.manual_seed(2)
    W = torch.randn(48, 12)  # fan_out x fan_in
    D = plant(torch.linspace(1.0, 0.3, 12), 48, 12)
    if stored == "out_in":
        name, config, sides = up(0), LLAMA | {"hidden_size": 12, "intermediate_size": 48}, [W, W + D]
    else:
        name, config, sides = "h.0.mlp.c_fc.weight", {"model_type": "gpt2", "n_embd": 12}, [W.T, (W + D).T]
    for folder, weight in zip(("base", "ft"), sides, strict=True):
        write_checkpoint(tmp_path / folder, {name: weight.contiguous()}, config=config)
    manifest = pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", EditSpec(scale=scale, rank=5))
    out = read_tensors(tmp_path / "out")[name]
    edit = (out if stored == "out_in" else out.T).double() - W.double()
    stored_D = (W + D).double() - W.double()
    wanted = reference_edit(stored_D, k=5)
    alpha = SCALES[scale](stored_D, wanted.sigma, 5)
    assert manifest.tensors[0].shape == (48, 12)
    assert manifest.tensors[0].alpha == pytest.approx(alpha, rel=1e-5)  # the certificate's bound
    P = wanted.value / wanted.value.norm() * math.sqrt(5)
    assert float((edit - alpha * P).norm() / (alpha * P).norm()) <= 1e-4  # as promised for float32


@pytest.mark.parametrize(
    ("options", "k"),
    [({"rank_ratio": 0.25}, 5), ({"rank_ratio": 0.01}, 1), ({"rank": 7}, 7), ({"rank": 999}, 20), ({"energy": 0.6}, 2)],
)
def test_every_way_to_choose_k_reaches_the_file(tmp_path: Path, options: dict[str, float], k: int) -> None:
    # squares 1/2, 1/4, ...: two directions hold three quarters, one holds half
    base, ft = write_pair(tmp_path, [plant(2.0 ** (-torch.arange(20) / 2), 30, 20)], torch.float32, torch.float32)
    (record,) = pome.edit(base, ft, tmp_path / "out", EditSpec.from_mapping(options)).tensors
    assert (record.rank, record.k) == (20, k)
    W_base, W = (read_tensors(side)[up(0)].double() for side in (base, tmp_path / "out"))
    s = torch.linalg.svdvals(W - W_base)
    assert int((s > 0.5 * record.alpha).sum()) == k  # the edit has k singular values, all of them alpha
    assert s[:k].tolist() == pytest.approx([record.alpha] * k, rel=1e-4)


def test_a_group_and_a_pattern_and_an_exclusion_edit_what_they_say(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    spec = EditSpec(layers=("ffn", r"re:layers\.1\.self_attn"), exclude=(r"layers\.0\..*gate",))
    manifest = pome.edit(base, ft, tmp_path / "out", spec)
    edited = {f"model.layers.{i}.mlp.{role}_proj.weight" for i in range(2) for role in ("gate", "up", "down")}
    edited = edited - {"model.layers.0.mlp.gate_proj.weight"} | {"model.layers.1.self_attn.q_proj.weight"}
    assert {record.name for record in manifest.tensors} == edited
    assert_only_edited(ft, tmp_path / "out", edited)


def test_a_zero_delta_is_kept_with_its_reason(tmp_path: Path) -> None:
    base = random_llama()
    ft = dict(base) | {up(1): base[up(1)] + 0.01 * torch.randn(base[up(1)].shape)}
    for folder, tensors in (("base", base), ("ft", ft)):
        write_checkpoint(tmp_path / folder, tensors, config=LLAMA)
    manifest = pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert [record.name for record in manifest.tensors] == [up(1)]
    assert [(kept.name, kept.part, kept.reason) for kept in manifest.kept] == [
        (up(0), None, "its delta is zero: FT equals BASE")
    ]
    assert_only_edited(tmp_path / "ft", tmp_path / "out", [up(1)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["base", "ft"])
def test_nan_or_infinity_names_tensor_and_side_and_leaves_nothing(tmp_path: Path, side: str, bad: float) -> None:
    base, ft = llama_pair(tmp_path)
    tensors = read_tensors(tmp_path / side)
    tensors[up(1)][3, 4] = bad
    save_file(tensors, tmp_path / side / "model.safetensors")
    with pytest.raises(NumericalError, match=rf"tensor {up(1)}: {side.upper()} holds NaN or infinity; .*exclude"):
        pome.edit(base, ft, tmp_path / "out")
    # Neither the other options that the message proposes nor mended weights could go on from here.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft"]
    pome.edit(base, ft, tmp_path / "out", EditSpec(exclude=(r"layers\.1\.",)))
    assert_only_edited(ft, tmp_path / "out", [up(0)])


def test_an_edit_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    base, ft = write_pair(tmp_path, [torch.full((4, 4), 100.0).double()], torch.float16, torch.float16)
    with pytest.raises(NumericalError, match=rf"tensor {up(0)}: .*overflows float16; .*dtype float32"):
        pome.edit(base, ft, tmp_path / "out", EditSpec(beta=1000, allow_other_base=True))
    pome.edit(base, ft, tmp_path / "out", EditSpec(beta=1000, dtype="float32", allow_other_base=True))
    assert bool(read_tensors(tmp_path / "out")[up(0)].isfinite().all())


@pytest.mark.parametrize("which", ["a half that was not selected", "a delta of zero"])
def test_a_narrower_dtype_that_overflows_an_unedited_entry_is_refused(tmp_path: Path, which: str) -> None:
    name = "model.layers.0.mlp.gate_up_proj.weight" if "half" in which else up(0)
    base = {name: torch.randn(8, 6), up(1): torch.randn(8, 6)}
    base[name][0, 0] = 1e6  # of the gate
    ft = {key: t + 0.01 * torch.randn(t.shape) * (key != name or "half" in which) for key, t in base.items()}
    folders = [write_checkpoint(tmp_path / side, t, config={"model_type": "phi3"}) for side, t in
               (("base", base), ("ft", ft))]  # fmt: skip
    with pytest.raises(NumericalError, match=rf"tensor {name}: its values overflow F16"):
        pome.edit(*folders, tmp_path / "out", EditSpec(dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_a_difference_out_of_range_names_the_tensor(tmp_path: Path) -> None:
    huge = [torch.full((4, 4), sign * 1.7e308, dtype=torch.float64) for sign in (1, -1)]
    folders = [write_checkpoint(tmp_path / side, {up(0): t}, config=LLAMA) for side, t in zip("ab", huge, strict=True)]
    with pytest.raises(NumericalError, match=rf"tensor {up(0)}: .*exclude"):
        pome.edit(*folders, tmp_path / "out")


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-25, 1.0, 1e25, 3e38])
def test_rounding_is_measured_where_squares_overflow_float32(size: float) -> None:
    """A share of 0 for an edit that vanished, or one that no JSON can hold, would pass for a good one."""
    lost = torch.randn(40, 30).clamp_(-1, 1) * size
    assert measure_norm(lost.clone()) == pytest.approx(float(lost.double().norm()), rel=1e-4)


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_another_dtype_changes_the_edited_tensors_and_nothing_else(tmp_path: Path, wanted: str, shards: int) -> None:
    dtype = getattr(torch, wanted)
    source = torch.bfloat16 if wanted == "float32" else torch.float32
    base, ft = llama_pair(tmp_path, shards=shards, dtype=source)
    pome.edit(base, ft, tmp_path / "out", EditSpec(dtype=wanted))
    W_base, W_ft, W = (read_tensors(folder) for folder in (base, ft, tmp_path / "out"))
    assert W.keys() == W_ft.keys()
    for name, w in W.items():
        if "up_proj" not in name:
            assert torch.equal(w, W_ft[name]) and w.dtype == source
        else:
            assert w.dtype == dtype
            exact = edit_by_definition(W_ft[name], W_base[name])
            if dtype == torch.float32:
                assert float((w - exact).norm() / exact.norm()) <= 1e-5  # 1e-4 of an edit of a tenth of the weight
            else:
                assert_within_ulps(w, exact)
    if shards > 1:
        text = (ft / "model.safetensors.index.json").read_text()
        before, after = json.loads(text), json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert after["weight_map"] == before["weight_map"]
        assert after["metadata"] == {"total_size": sum(w.nbytes for w in W.values()), "note": "kept"}
        for name, file in after["weight_map"].items():
            assert torch.equal(load_file(tmp_path / "out" / file)[name], W[name])


def test_a_dtype_that_is_the_tensors_own_changes_no_byte_more(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    pome.edit(base, ft, tmp_path / "out", EditSpec(dtype="float32"))
    assert_only_edited(ft, tmp_path / "out", [up(0), up(1)])


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("source", "wanted"), [("bfloat16", "float32"), ("float32", "float16"), ("float32", "bfloat16")]
)
def test_a_new_layout_is_the_one_that_safetensors_writes(tmp_path: Path, source: str, wanted: str, shards: int) -> None:
    """Also with an odd number of 16-bit items: every tensor begins at a multiple of its item's size."""
    dtype = getattr(torch, source)
    base = {"odd": torch.ones(3, dtype=dtype), **random_llama(dtype=dtype), "flags": torch.ones(3, dtype=torch.uint8)}
    tuned = {n: t if t.dtype == torch.uint8 else perturb({n: t})[n] for n, t in base.items()}
    paths = [write_checkpoint(tmp_path / n, t, shards=shards) for n, t in (("base", base), ("ft", tuned))]
    pome.edit(*paths, tmp_path / "out", EditSpec(dtype=wanted))
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        for name, (start, _) in read_ranges(path).items():
            assert start % tensors[name].element_size() == 0
        save_file(tensors, tmp_path / "reference.safetensors", {"format": "pt"})
        assert path.read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    assert pome.verify(tmp_path / "out", *paths, full=True).ok


@pytest.mark.parametrize(
    ("declared", "wanted", "said"),
    [
        ({"dtype": "bfloat16"}, "float32", {"dtype": "float32"}),
        ({"torch_dtype": "float16", "a": 1}, "float32", {"torch_dtype": "float32", "a": 1}),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "float32", {"text_config": {"torch_dtype": "float32"}}),
        ({"dtype": "bfloat16"}, "float16", {"dtype": "float32"}),  # of the two neither holds the other
        ({"dtype": "float32"}, "bfloat16", {"dtype": "float32"}),
        ({"dtype": "float64"}, "float32", {"dtype": "float64"}),
        ({"dtype": "auto"}, "float32", {"dtype": "auto"}),
    ],
)
def test_the_dtype_that_a_config_declares_holds_the_edit(
    tmp_path: Path, declared: dict[str, object], wanted: str, said: dict[str, object]
) -> None:
    source = torch.bfloat16 if wanted != "bfloat16" else torch.float32
    base, ft = llama_pair(tmp_path, dtype=source)
    for folder in (base, ft):
        (folder / "config.json").write_text(json.dumps({**LLAMA, **declared}))
    manifest = pome.edit(base, ft, tmp_path / "out", EditSpec(dtype=wanted))
    written = tmp_path / "out/config.json"
    assert json.loads(written.read_text()) == {**LLAMA, **said}
    if said == declared:
        assert written.read_bytes() == (ft / "config.json").read_bytes()
    else:
        assert any("dtype it declares" in notice for notice in manifest.notices)
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok
    assert pome.verify(tmp_path / "out", ft=ft).ok


def test_without_a_declared_dtype_the_notice_says_how_to_load(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, dtype=torch.bfloat16)
    manifest = pome.edit(base, ft, tmp_path / "out", EditSpec(dtype="float32"))
    assert "dtype=torch.float32" in manifest.notices[0]
    assert (tmp_path / "out/config.json").read_bytes() == (ft / "config.json").read_bytes()


def test_another_config_than_the_one_that_was_written_is_found(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, dtype=torch.bfloat16)
    for folder in (base, ft):
        (folder / "config.json").write_text(json.dumps({**LLAMA, "dtype": "bfloat16"}))
    manifest = pome.edit(base, ft, tmp_path / "out", EditSpec(dtype="float32"))
    path = tmp_path / "out/config.json"
    path.write_text(path.read_text().replace('"float32"', '"float64"'))
    record = FileRecord(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    sealed = dataclasses.replace(manifest, files={**manifest.files, "config.json": record}).sealed()
    (tmp_path / "out/pome_manifest.json").write_text(sealed.to_json())
    assert [item.file for item in pome.verify(tmp_path / "out", base, ft).differences] == ["config.json"]


def test_two_runs_give_the_same_bytes_and_the_same_manifest(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, shards=2, dtype=torch.bfloat16)
    for name in ("one", "two"):
        pome.edit(base, ft, tmp_path / name, EditSpec(layers=("ffn",)))
    assert read_manifest(tmp_path / "one") == read_manifest(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        if path.name != "pome_manifest.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_golden_bytes_of_a_small_output(tmp_path: Path) -> None:
    """The delta diag(3, 4) has norm 5 and one leading direction, so that the edit is diag(0, 5), to the last bit."""
    name = "layers.0.mlp.up_proj.weight"
    W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    write_checkpoint(tmp_path / "base", {name: W, "norm.weight": torch.tensor([7.0])})
    write_checkpoint(
        tmp_path / "ft", {name: W + torch.diag(torch.tensor([3.0, 4.0])), "norm.weight": torch.tensor([8.0])}
    )
    pome.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"layers.0.mlp.up_proj.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b'"norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[16,20]}}'
    )
    size = -(-len(header) // 8) * 8
    data = "0000803f 00000040 00004040 00001041 00000041"  # 1, 2, 3, 4 + 5; 8
    expected = size.to_bytes(8, "little") + header.ljust(size) + bytes.fromhex(data)
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected
