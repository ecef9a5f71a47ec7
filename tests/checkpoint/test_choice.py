"""Which weight files of a folder are the checkpoint, what is said of the others, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pome
from pome import CheckpointError
from pome.checkpoint.source import Checkpoint, open_checkpoint
from pome.editing.session import open_pair
from support.checkpoints import INDEX, LLAMA, llama_pair, perturb, random_llama, read_tensors, write_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def see(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    checkpoint.close()
    return checkpoint


def write_index(folder: Path, **changed: str | None) -> None:
    """Change entries of a folder's index; None takes one out."""
    index = json.loads((folder / INDEX).read_text())
    merged = {**index["weight_map"], **changed}
    index["weight_map"] = {name: file for name, file in merged.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


# A second set of weights -------------------------------------------------------------------------------------------


def test_a_whole_model_file_beside_its_shards_is_taken_and_the_shards_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2, config=LLAMA)
    save_file(random_llama(), folder / "model.safetensors")
    found = see(folder)
    assert list(found.files) == ["model.safetensors"]
    assert {INDEX, *SHARDS} <= found.unused.keys()
    (notice,) = found.notices
    assert "takes model.safetensors" in notice and SHARDS[0] in notice


def test_a_model_file_that_lacks_tensors_of_the_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2)
    save_file({UP: random_llama()[UP]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="that model.safetensors lacks"):
        open_checkpoint(folder)


def test_a_stale_index_of_fewer_layers_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(1), shards=2)
    save_file(random_llama(3), folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="model-00001-of-00001.safetensors: holds .* lacks"):
        open_checkpoint(folder)


def test_an_older_sharding_of_the_same_tensors_is_named_and_left_aside(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2)
    save_file(random_llama(), folder / "model-00001-of-00001.safetensors")
    found = see(folder)
    assert sorted(found.files) == SHARDS
    assert "model-00001-of-00001.safetensors" in found.unused and "model-00001-of-00001" in found.notices[0]


def test_a_tied_head_alone_does_not_make_a_second_set_of_weights(tmp_path: Path) -> None:
    tensors = random_llama()
    folder = write_checkpoint(tmp_path / "m", tensors, shards=2, config={**LLAMA, "tie_word_embeddings": True})
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    assert list(see(folder).files) == ["model.safetensors"]


@pytest.mark.parametrize(("age", "count"), [(60, 1), (-60, 0)])
def test_a_newer_bin_beside_safetensors_is_named(tmp_path: Path, age: int, count: int) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama())
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    time = (folder / "model.safetensors").stat().st_mtime + age
    os.utime(folder / "pytorch_model.bin", (time, time))
    notices = see(folder).notices
    assert len(notices) == count and all("pytorch_model.bin is newer" in notice for notice in notices)


def test_the_choice_is_told_by_a_dry_run_and_by_the_manifest(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    save_file(read_tensors(ft), ft / "model-00001-of-00001.safetensors")
    with open_pair(base, ft, pome.EditSpec()) as opened:
        (said,) = opened.to_json()["notices"]
        assert "model-00001-of-00001.safetensors" in opened.to_json()["not_copied"]
    manifest = pome.edit(base, ft, tmp_path / "out")
    assert manifest.notices == (said,) and "takes model.safetensors" in said
    assert pome.verify(tmp_path / "out", base, ft).ok


@pytest.mark.parametrize("name", ["value_head.safetensors", "projector.safetensors", "weights/extra.safetensors"])
def test_files_of_other_tensors_belong_to_the_model(tmp_path: Path, name: str) -> None:
    base, ft = llama_pair(tmp_path)
    (ft / name).parent.mkdir(exist_ok=True)
    save_file({"v_head.summary.weight": torch.ones(1, 16)}, ft / name)
    manifest = pome.edit(base, ft, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (ft / name).read_bytes()
    assert manifest.notices == () and name not in manifest.not_copied
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok


def test_shards_without_an_index_are_found_beside_a_value_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2)
    (folder / INDEX).unlink()
    save_file({"v_head.weight": torch.ones(2, 2)}, folder / "value_head.safetensors")
    assert sorted(see(folder).files) == SHARDS


# An index that disagrees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mtp.fc.weight": SHARDS[1]}, "names mtp.fc.weight in"),  # no file holds it
        ({"model.norm.weight": SHARDS[0]}, "names model.norm.weight in"),  # another file holds it
        ({"lm_head.weight": None}, "does not name lm_head.weight"),
    ],
)
@pytest.mark.parametrize("side", ["base", "ft"])
def test_an_index_that_is_wrong_about_other_tensors_is_a_notice(
    tmp_path: Path, changed: dict[str, str | None], said: str, side: str
) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    place = json.loads((tmp_path / side / INDEX).read_text())["weight_map"].get("model.norm.weight")
    if "model.norm.weight" in changed:
        changed = {"model.norm.weight": SHARDS[1 - SHARDS.index(place)]}
    write_index(tmp_path / side, **changed)
    manifest = pome.edit(base, ft, tmp_path / "out")
    assert said in manifest.notices[0] and INDEX in manifest.notices[0]
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok


@pytest.mark.parametrize(
    "changed",
    [
        {"model.layers.9.mlp.up_proj.weight": SHARDS[0]},  # a selected matrix that is nowhere
        {UP: None},
        {UP: "other"},
    ],
)
@pytest.mark.parametrize("side", ["base", "ft"])
def test_an_index_that_is_wrong_about_a_selected_tensor_is_refused(
    tmp_path: Path, changed: dict[str, str | None], side: str
) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    if changed.get(UP):
        place = json.loads((tmp_path / side / INDEX).read_text())["weight_map"][UP]
        changed = {UP: SHARDS[1 - SHARDS.index(place)]}
    write_index(tmp_path / side, **changed)
    with pytest.raises(CheckpointError, match="and it is selected"):
        pome.edit(base, ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["./{}", "sub/{}", "sub/./deep//{}"])
def test_an_index_may_name_files_in_and_below_its_folder(tmp_path: Path, form: str) -> None:
    base, ft = llama_pair(tmp_path, shards=2)
    index = json.loads((ft / INDEX).read_text())
    for name in SHARDS:
        path = ft / form.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        (ft / name).rename(path)
    index["weight_map"] = {name: form.format(file) for name, file in index["weight_map"].items()}
    (ft / INDEX).write_text(json.dumps(index))
    out = tmp_path / "out"
    pome.edit(base, ft, out)
    pome.edit(base, write_checkpoint(tmp_path / "flat", perturb(random_llama())), tmp_path / "plain")
    made = {n: t for f in out.rglob("*.safetensors") for n, t in read_tensors(f.parent).items()}
    for name, tensor in read_tensors(tmp_path / "plain").items():
        assert torch.equal(made[name], tensor)
    assert (out / INDEX).read_bytes() == (ft / INDEX).read_bytes()
    assert pome.verify(out, base, ft, full=True).ok


def test_a_folder_that_is_a_link_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2)
    (tmp_path / "elsewhere").mkdir()
    for name in SHARDS:
        (folder / name).rename(tmp_path / "elsewhere" / name)
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"sub/{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        open_checkpoint(folder)


# An adapter beside whole weights -----------------------------------------------------------------------------------


def put_adapter(folder: Path, weights: str = "adapter_model.safetensors") -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    if weights.endswith(".bin"):
        (folder / weights).write_bytes(b"pickle")
    else:
        save_file({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 16)}, folder / weights)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_a_merged_model_is_left_out_and_named(tmp_path: Path, shards: int, weights: str) -> None:
    base, ft = llama_pair(tmp_path, shards=shards)
    put_adapter(ft, weights)
    manifest = pome.edit(base, ft, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    assert {"adapter_config.json", weights} <= manifest.not_copied.keys()
    assert "neither applied nor copied" in manifest.notices[0]
    assert pome.verify(tmp_path / "out", base, ft, full=True).ok


def test_an_adapter_beside_base_is_not_applied_and_that_is_said(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    pome.edit(base, ft, tmp_path / "plain")
    put_adapter(base)
    manifest = pome.edit(base, ft, tmp_path / "out")
    assert "neither applied nor copied" in manifest.notices[0]
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_value_head_beside_an_adapter_does_not_make_it_a_whole_model(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    put_adapter(folder)
    save_file({"v_head.summary.weight": torch.ones(1, 16)}, folder / "value_head.safetensors")
    assert see(folder).adapter_config is not None


# Where nothing can be chosen ---------------------------------------------------------------------------------------


def test_a_folder_whose_weights_lie_below_names_the_folders(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder"):
        write_checkpoint(tmp_path / "m" / name, random_llama())
    with pytest.raises(CheckpointError, match="m/text_encoder, .*m/unet"):
        open_checkpoint(tmp_path / "m")
