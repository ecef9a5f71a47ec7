"""The Python interface: `pome.edit`, `pome.equalize`, the errors, the manifest and what is told along the way."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pome
from pome.cli.console import name_options
from pome.manifest import Manifest, read_manifest
from support.checkpoints import assert_only_edited, llama_pair
from support.reference import plant, reference_edit

UP = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]


def test_edit_takes_paths_and_texts_and_returns_what_it_wrote(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    manifest = pome.edit(str(base), ft, str(tmp_path / "out"), pome.EditSpec(beta=1.5))
    assert isinstance(manifest, pome.Manifest)
    assert read_manifest(tmp_path / "out/pome_manifest.json") == manifest
    assert [record.name for record in manifest.tensors] == UP
    assert {record.beta for record in manifest.tensors} == {1.5}
    assert_only_edited(ft, tmp_path / "out", UP)


def test_the_manifest_holds_what_the_contract_names(tmp_path: Path) -> None:
    pome.edit(*llama_pair(tmp_path), tmp_path / "out")
    raw = json.loads((tmp_path / "out/pome_manifest.json").read_bytes())
    assert raw.keys() >= {
        "format_version", "pome_version", "created", "base", "fine_tuned", "spec", "tensors", "kept", "files", "timing"
    }  # fmt: skip
    assert raw["tensors"][0].keys() == {
        "name", "part", "file", "role", "shape", "dtype", "method", "rank", "k", "alpha", "beta", "sigma_max",
        "sigma_k", "sigma_next", "noise_floor", "delta_norm", "edit_norm", "energy_kept", "departure", "spectral_drift",
            "distance", "rounding",
        "objective", "orthogonality", "power_residual", "solver", "warnings", "spectrum",
    }  # fmt: skip
    assert raw["timing"].keys() >= {"total_seconds", "kernel_seconds"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 99}, "format_version is 99"),
        ({"tensors": [{"name": "x"}]}, "not a manifest of pome"),
        ({"files": {"a": {}}}, "not a manifest of pome"),
        ({"more": 1}, "not a manifest of pome"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    manifest = pome.edit(*llama_pair(tmp_path), tmp_path / "out")
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    with pytest.raises(pome.VerificationError, match=f"^here: .*{said}"):
        Manifest.from_json(json.dumps(manifest.to_mapping() | change), "here")
    for text in ("", "[]", "{", "\xff"):
        with pytest.raises(pome.VerificationError, match="not a manifest"):
            Manifest.from_json(text, "here")
    with pytest.raises(pome.VerificationError, match="cannot be read"):
        read_manifest(tmp_path / "none.json")


def test_progress_is_told_in_bytes_and_units_that_add_up(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    totals: dict[str, int] = {}
    done: Counter[str] = Counter()
    notes: list[str] = []

    class Recorder(pome.Progress):
        def start(self, task: str, total: int, work: float = 0.0) -> None:
            totals[task] = total

        def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "", work: float = 0.0) -> None:
            done[task] += amount
            notes.append(note)

        def finish(self, task: str) -> None:
            assert done[task] == totals[task]

    manifest = pome.edit(base, ft, tmp_path / "out", progress=Recorder())
    assert list(totals) == ["copy", "edit", "hash"]
    assert totals["edit"] == 2
    assert totals["hash"] == sum(file.bytes for file in manifest.files.values())
    assert set(UP) <= set(notes)


def test_every_error_is_a_pome_error_with_a_status() -> None:
    errors = [getattr(pome, name) for name in pome.__all__ if name.endswith("Error")]
    assert len(errors) >= 10
    for error in errors:
        assert issubclass(error, pome.PomeError)
        assert error.exit_status == (2 if error is pome.SpecError else 1)
        assert error.__doc__


def test_the_interface_is_documented_and_has_the_promised_parameters() -> None:
    for name in pome.__all__:
        assert name == "__version__" or inspect.getdoc(getattr(pome, name))
    assert list(inspect.signature(pome.edit).parameters)[:5] == ["base", "ft", "out", "spec", "progress"]
    equalize = inspect.signature(pome.equalize).parameters
    defaults = {name: p.default for name, p in equalize.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    asked = {field.name: field.default for field in dataclasses.fields(pome.EditSpec)}
    for name in ("rank_ratio", "rank", "rank_rule", "energy", "scale", "beta", "power"):
        assert defaults[name] == asked[name]
    assert set(dir(pome)) >= set(pome.__all__)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(50, 30), (30, 50), (40, 40), (1, 20), (20, 1)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    rank=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_equalize_is_the_method_by_definition(shape: tuple[int, int], dtype: torch.dtype, rank: int, seed: int) -> None:
    # A gap of a tenth at every cut, so that the entries are determined whatever k is.
    delta = plant(0.9 ** torch.arange(min(shape)), *shape, seed=seed, dtype=dtype)
    edit = pome.equalize(delta, rank=rank, beta=1.25)
    wanted = reference_edit(delta, k=min(rank, edit.rank), beta=1.25)
    assert (edit.rank, edit.k, edit.beta) == (wanted.rank, min(rank, wanted.rank), 1.25)
    assert edit.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    s = [*wanted.sigma.tolist(), 0.0]
    if s[edit.k - 1] - s[edit.k] > 1e-3 * s[edit.k - 1]:
        # 1e-4 as promised for float32; rounding a 16-bit delta changes the delta, not how well it is solved.
        assert float((edit.value.double() - wanted.value).norm() / wanted.value.norm()) <= 1e-4
    assert edit.edit_norm == pytest.approx(1.25 * float(delta.double().norm()), rel=1e-5)  # alpha_0 keeps the norm
    assert edit.alpha == pytest.approx(edit.edit_norm / math.sqrt(edit.k), rel=1e-5)


@pytest.mark.parametrize(
    ("message", "argument"),
    [
        ("tensor a: leave it out with --exclude", "tensor a: leave it out with exclude"),
        ("pair by number (--allow-other-depth).", "pair by number (allow_other_depth)."),
        ("--dtype float32, or --out-format full", "dtype float32, or out_format full"),
        ("a/--exclude/b: no such file; x--y", "a/--exclude/b: no such file; x--y"),
        ("run `hf upload a . --create-pr` or --fresh", "run `hf upload a . --create-pr` or fresh"),
    ],
)
def test_an_error_names_arguments_in_python_and_options_on_the_command_line(message: str, argument: str) -> None:
    error = pome.PairingError(message)
    assert str(error) == argument
    assert name_options(error) == message
