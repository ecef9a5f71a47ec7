"""`pome verify` finds what was changed: bytes, files, numbers of the manifest, and edits that are not these inputs'."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import pome
from pome import EditSpec, PomeError, edit, verify
from pome.manifest import Manifest
from support.checkpoints import LLAMA, llama_pair, perturb, random_llama, read_ranges, read_tensors, write_checkpoint

FLIPS = 100
MANIFEST = "pome_manifest.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, ft and out: two shards in bfloat16, which an edit of so small a delta loses much to."""
    folder = tmp_path_factory.mktemp("made")
    base, ft = llama_pair(folder, shards=2, dtype=torch.bfloat16)
    (ft / "tokenizer.json").write_text('{"a": 1}')
    edit(base, ft, folder / "out", EditSpec(layers=("up", "down")))
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the output, in another place."""
    return Path(shutil.copytree(made / "out", tmp_path / "moved"))


def is_found(out: Path, *inputs: Path, full: bool = False) -> bool:
    """Whether verification refuses an output, by a difference or by one error."""
    try:
        return not verify(out, *inputs, full=full).ok
    except PomeError as error:
        assert "\n" not in str(error)
        return True


def reseal(out: Path, raw: dict[str, Any] | None = None) -> None:
    """Make the manifest fit what lies there: hashes of all files, and its own checksum."""
    raw = raw if raw is not None else json.loads((out / MANIFEST).read_bytes())
    for name in raw["files"]:
        content = (out / name).read_bytes()
        raw["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sealed = Manifest.from_json(json.dumps(raw), "test").sealed()
    (out / MANIFEST).write_text(sealed.to_json())


def test_an_intact_output_passes_also_after_it_was_moved(made: Path, out: Path) -> None:
    for _ in range(2):
        verdict = verify(out, made / "base", made / "ft", full=True)
        assert verdict.ok, verdict.differences
        assert (verdict.files, verdict.edits) == (5, 4)
        reseal(out)


def test_one_flipped_bit_anywhere_is_found(out: Path) -> None:
    rng = Random(3)
    files = sorted(path for path in out.iterdir())
    headers = [path for path in files if path.suffix == ".safetensors"]
    for i in range(FLIPS):
        path = rng.choice(headers if i % 4 == 0 else files)
        content = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(content[:8], "little") if i % 4 == 0 else len(content)
        at, bit = rng.randrange(end), 1 << rng.randrange(8)
        content[at] ^= bit
        path.write_bytes(content)
        assert is_found(out), f"bit {bit} of byte {at} of {path.name}"
        content[at] ^= bit
        path.write_bytes(content)
    assert not is_found(out)


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("bit", [0, 6])
def test_a_flipped_bit_names_its_tensor_beside_the_wrong_hash(made: Path, out: Path, tensor: str, bit: int) -> None:
    path = next(path for path in out.glob("*.safetensors") if tensor in read_ranges(path))
    content = bytearray(path.read_bytes())
    start, end = read_ranges(path)[tensor]
    content[(start + end) // 2] ^= 1 << bit
    path.write_bytes(content)
    found = verify(out, made / "base", made / "ft").differences
    assert [(item.file, item.tensor) for item in found] == [(path.name, None), (path.name, tensor)]
    assert "SHA-256" in found[0].what
    without_base = [item.tensor for item in verify(out, ft=made / "ft").differences]
    assert without_base == [None] if "up_proj" in tensor else [None, tensor]


@pytest.mark.parametrize("sealed", [False, True])
def test_files_that_were_changed_are_found(made: Path, out: Path, sealed: bool) -> None:
    """Even where somebody made the manifest fit, the inputs tell."""
    inputs = (made / "base", made / "ft") if sealed else ()
    shards = sorted(out.glob("*.safetensors"))
    original = {path: path.read_bytes() for path in out.iterdir()}

    def expect() -> None:
        if sealed:
            reseal(out)
        assert is_found(out, *inputs, full=True)
        for path, content in original.items():
            path.write_bytes(content)

    shards[0].write_bytes(original[shards[1]])
    shards[1].write_bytes(original[shards[0]])
    expect()
    (out / "tokenizer.json").write_text('{"a": 2}')
    expect()
    header = original[shards[0]].replace(b'{"format":"pt"}', b'{"format":"tp"}')
    assert header != original[shards[0]]
    shards[0].write_bytes(header)
    expect()
    start, end = read_ranges(shards[0])["model.embed_tokens.weight"]
    shards[0].write_bytes(original[shards[0]][: end - 1] + b"\x11" + original[shards[0]][end:])
    expect()


def test_files_that_came_or_went_are_found(out: Path) -> None:
    for name in sorted(path.name for path in out.iterdir()):
        (out / name).rename(out.parent / "away")
        assert is_found(out), name
        (out.parent / "away").rename(out / name)
    for name in ("extra.safetensors", "pytorch_model.bin", "code/model.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
        assert is_found(out), name
        (out / name).unlink()
    assert not is_found(out)


@pytest.mark.parametrize("name", [".gitpayload.py", ".cached.bin", ".github/run.py", "linked"])
def test_only_files_of_git_and_the_hub_may_lie_beside_an_output(out: Path, name: str) -> None:
    (out / ".cache/huggingface").mkdir(parents=True)
    (out / ".cache/huggingface/x.lock").write_text("")
    (out / ".gitattributes").write_text("")
    assert not is_found(out)
    if name == "linked":
        (out / name).symlink_to("/etc")
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    assert is_found(out)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json", "evil.py"])
def test_files_that_came_or_went_are_found_however_well_sealed(made: Path, out: Path, name: str) -> None:
    """Also where the manifest says of an added file that FT has it."""
    raw = json.loads((out / MANIFEST).read_bytes())
    if name == "evil.py":
        (out / name).write_text("evil")
        raw["files"][name] = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
        raw["fine_tuned"]["files"][name] = raw["files"][name]
    else:
        (out / name).unlink()
        del raw["files"][name]
    reseal(out, raw)
    assert is_found(out, made / "base", made / "ft")


@pytest.mark.parametrize("name", ["tokenizer.json", MANIFEST, "model-00001-of-00002.safetensors"])
def test_a_fifo_or_device_in_the_place_of_a_file_is_found_without_waiting(out: Path, name: str) -> None:
    for replacement in ("fifo", "device", "folder", "loop"):
        (out / name).unlink()
        if replacement == "fifo":
            os.mkfifo(out / name)
        elif replacement == "folder":
            (out / name).mkdir()
        else:
            (out / name).symlink_to("/dev/zero" if replacement == "device" else name)
        assert is_found(out), replacement
        (out / name).rmdir() if replacement == "folder" else (out / name).unlink()
        (out / name).write_bytes(b"")


def list_numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON document the numbers are."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from list_numbers(item, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def change_at(document: Any, path: tuple[Any, ...], change: Any) -> Any:
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = change(inner[path[-1]])
    return changed


def raise_number(number: float) -> float:
    return number + 1 if isinstance(number, int) else number * 1.1 + 0.001


def test_every_number_of_the_manifest_that_was_edited_is_found(made: Path, out: Path) -> None:
    """Without the checksum all of them; with it those that say what was done to a tensor and what lies there."""
    raw = json.loads((out / MANIFEST).read_bytes())
    paths = list(list_numbers(raw))
    assert len(paths) > 4 * 15
    told = 0
    for path in paths:
        changed = change_at(raw, path, raise_number)
        (out / MANIFEST).write_text(json.dumps(changed, indent=1) + "\n")
        assert is_found(out), path
        if path[0] in ("tensors", "files"):
            told += 1
            (out / MANIFEST).write_text(Manifest.from_json(json.dumps(changed), "test").sealed().to_json())
            assert is_found(out, made / "base", made / "ft", full=True), path
    assert told >= 4 * 15


OTHER_EDITS = {
    "another beta": {"beta": 1.03},
    "another k": {"rank": 5},
    "another rule for alpha": {"scale": "mean"},
    "another power": {"power": 0.2},
}


def test_another_matrix_of_the_same_objective_and_norm_is_found(tmp_path: Path) -> None:
    """<D, E> and norm(E) as those of the edit, and no singular value as it should be."""
    base, ft = llama_pair(tmp_path)
    out = tmp_path / "out"
    edit(base, ft, out)
    W, W_ft, W_out = (read_tensors(folder)[UP].double() for folder in (base, ft, out))
    D, E = W_ft - W, W_out - W
    along = (D * E).sum() / D.square().sum() * D
    N = torch.randn(D.shape, dtype=torch.float64)
    N -= (N * D).sum() / D.square().sum() * D
    forged = (W + along + N * ((E.norm() ** 2 - along.norm() ** 2).sqrt() / N.norm())).float()
    assert float((forged - W_out).norm()) > 0.5 * float(E.norm())
    start, end = read_ranges(out / "model.safetensors")[UP]
    content = bytearray((out / "model.safetensors").read_bytes())
    content[start:end] = forged.numpy().tobytes()
    (out / "model.safetensors").write_bytes(content)
    reseal(out)
    assert [item.tensor for item in verify(out, base, ft, full=True).differences] == [UP]


def test_another_basis_of_a_cluster_at_the_cut_passes(tmp_path: Path) -> None:
    """Where every direction is as good as any other, those that another machine keeps are right as well."""
    base = random_llama(1)
    name = UP.replace("1", "0")
    turned = torch.linalg.qr(torch.randn(40, 16, dtype=torch.float64)).Q.contiguous()
    write_checkpoint(tmp_path / "base", base | {name: torch.zeros(40, 16)}, config=LLAMA)
    write_checkpoint(tmp_path / "ft", base | {name: (0.01 * turned).float()}, config=LLAMA)
    edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    record = json.loads((tmp_path / "out" / MANIFEST).read_bytes())["tensors"][0]
    assert record["k"] == 8 and record["sigma_k"] - record["sigma_next"] < 1e-6 * record["sigma_k"]
    tensors = read_tensors(tmp_path / "out")
    other = turned @ torch.diag(torch.tensor([0.0, 1.0] * 8).double())
    save_file(tensors | {name: (record["alpha"] * other).float()}, tmp_path / "out/model.safetensors", {"format": "pt"})
    reseal(tmp_path / "out")
    assert verify(tmp_path / "out", tmp_path / "base", tmp_path / "ft", full=True).ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_zero_delta_in_another_dtype_needs_no_base_to_be_proved(tmp_path: Path, dtype: str) -> None:
    tensors = random_llama(2, dtype=torch.float32 if dtype != "float32" else torch.bfloat16)
    write_checkpoint(tmp_path / "base", tensors, config=LLAMA)
    ft = perturb(tensors) | {UP: tensors[UP]}
    write_checkpoint(tmp_path / "ft", ft, config=LLAMA)
    out = tmp_path / "out"
    assert [item.name for item in edit(tmp_path / "base", tmp_path / "ft", out, EditSpec(dtype=dtype)).kept] == [UP]
    assert verify(out, None, tmp_path / "ft").ok
    stored = read_tensors(out)
    save_file(stored | {UP: stored[UP] * 2}, out / "model.safetensors", {"format": "pt"})
    reseal(out)
    assert [item.tensor for item in verify(out, None, tmp_path / "ft").differences] == [UP]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [*OTHER_EDITS, "FT's own bytes", "BASE's bytes", "one row less"])
def test_other_bytes_in_the_place_of_an_edit_are_found_however_well_sealed(
    tmp_path: Path, which: str, dtype: torch.dtype
) -> None:
    base, ft = llama_pair(tmp_path, dtype=dtype)
    out = tmp_path / "out"
    edit(base, ft, out)
    file = "model.safetensors"
    start, end = read_ranges(out / file)[UP]
    content = bytearray((out / file).read_bytes())
    if which in OTHER_EDITS:
        edit(base, ft, tmp_path / "other", EditSpec(**OTHER_EDITS[which]))
        content[start:end] = (tmp_path / "other" / file).read_bytes()[start:end]
    elif which == "one row less":
        content[start : start + (end - start) // 40] = (base / file).read_bytes()[start : start + (end - start) // 40]
    else:
        content[start:end] = ((ft if "FT" in which else base) / file).read_bytes()[start:end]
    assert content != (out / file).read_bytes()
    (out / file).write_bytes(content)
    reseal(out)
    assert not is_found(out)
    verdict = verify(out, base, ft, full=True)
    assert [item.tensor for item in verdict.differences] == [UP]


def test_the_same_edit_rounded_differently_passes(tmp_path: Path) -> None:
    """What another machine may make of it: each entry of the edit off by one part in 10,000, then stored."""
    base, ft = llama_pair(tmp_path, dtype=torch.bfloat16)
    out = tmp_path / "out"
    edit(base, ft, out)
    edit(base, ft, tmp_path / "near", EditSpec(beta=1.0001))
    shutil.copy(tmp_path / "near/model.safetensors", out)
    reseal(out)
    verdict = verify(out, base, ft, full=True)
    assert verdict.ok, verdict.differences


VALUES = st.sampled_from(
    [None, True, -1, 2**70, 1.5, "", "x", [], {}, [[]], {"a": {}}, "\x1b[2J", float("1e400"), [1, 2], "../../etc"]
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_manifest_of_any_shape_is_a_verdict_or_one_error(made: Path, data: st.DataObject) -> None:
    out = made / "fuzzed"
    if not out.exists():
        shutil.copytree(made / "out", out)
    raw = json.loads((made / "out" / MANIFEST).read_bytes())
    inner: Any = raw
    while True:
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))))
        if isinstance(inner[key], dict | list) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
        elif data.draw(st.booleans()):
            inner[key] = data.draw(VALUES)
            break
        else:
            del inner[key]
            break
    text = json.dumps(raw)
    with contextlib.suppress(PomeError):
        text = Manifest.from_json(text, "test").sealed().to_json()
    (out / MANIFEST).write_text(text)
    try:
        pome.verify(out, made / "base", made / "ft")
    except PomeError as error:
        assert str(error).isprintable()
