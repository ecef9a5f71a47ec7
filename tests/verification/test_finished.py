"""An output counts as finished only while every input that was read or copied is the one that it was made from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pome
from pome.verification import finished
from pome.verification.finished import find_finished
from support.checkpoints import HIDDEN, INNER, llama_pair

SPEC = pome.EditSpec()


def put_side_files(folder: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "spk_dict.pt"):
        (folder / name).write_text("{}")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, ft = llama_pair(tmp_path)
    put_side_files(ft)
    pome.edit(base, ft, tmp_path / "out")
    return base, ft, tmp_path / "out"


def is_finished(made: tuple[Path, Path, Path]) -> bool:
    base, ft, out = made
    return find_finished(out, base, ft, SPEC, card=False) is not None


def flip(path: Path) -> None:
    """Another content of the same size, under the old time: as `cp -p` of an older save leaves it."""
    info = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns - 10**12))


def test_unchanged_inputs_are_finished_without_being_read(
    made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> tuple[int, str]:
        raise AssertionError(f"{path} was hashed")

    monkeypatch.setattr(finished, "hash_file", refuse)
    assert is_finished(made)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "spk_dict.pt"]
)
def test_any_file_of_ft_with_another_content_is_noticed(made: tuple[Path, Path, Path], name: str) -> None:
    flip(made[1] / name)
    assert not is_finished(made)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_any_file_of_base_that_was_read_is_noticed(made: tuple[Path, Path, Path], name: str) -> None:
    flip(made[0] / name)
    assert not is_finished(made)


@pytest.mark.parametrize(
    "change",
    [
        lambda ft: (ft / "added_tokens.json").write_text("{}"),
        lambda ft: (ft / "tokenizer.json").unlink(),
        lambda ft: (ft / "tokenizer.json").rename(ft / "vocab.json"),
    ],
    ids=["added", "removed", "renamed"],
)
def test_side_files_that_came_or_went_are_noticed(
    made: tuple[Path, Path, Path], change: Callable[[Path], object]
) -> None:
    change(made[1])
    assert not is_finished(made)


def test_another_folder_in_the_place_of_ft_is_noticed_although_its_files_are_older(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, ft, _ = made
    shutil.copytree(ft, tmp_path / "other")
    flip(tmp_path / "other/model.safetensors")
    ft.rename(tmp_path / "gone")
    (tmp_path / "other").rename(ft)
    assert not is_finished(made)


def test_the_same_bytes_in_new_files_are_still_finished(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, ft, _ = made
    shutil.copytree(ft, tmp_path / "copy")
    shutil.rmtree(ft)
    (tmp_path / "copy").rename(ft)
    assert is_finished(made)


def test_a_manifest_without_a_record_of_the_files_times_is_held_to_their_hashes(made: tuple[Path, Path, Path]) -> None:
    path = made[2] / "pome_manifest.json"
    manifest = pome.Manifest.from_json(path.read_bytes(), "")
    timing = {key: value for key, value in manifest.timing.items() if key.endswith("seconds")}
    path.write_text(dataclasses.replace(manifest, timing=timing).sealed().to_json())
    assert is_finished(made)
    flip(made[1] / "tokenizer.json")
    assert not is_finished(made)


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_a_changed_adapter_is_noticed(tmp_path: Path, form: str, name: str) -> None:
    base, _ = llama_pair(tmp_path)
    lora = tmp_path / "lora"
    lora.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["up_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    (lora / "tokenizer.json").write_text("{}")
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.randn(4, HIDDEN), f"{module}.lora_B.weight": torch.randn(INNER, 4)}
    save_file(factors, lora / "adapter_model.safetensors")
    spec = pome.EditSpec(out_format=form)
    pome.edit(base, lora, tmp_path / "out", spec)
    assert find_finished(tmp_path / "out", base, lora, spec, card=False)
    if name == "adapter_config.json":
        (lora / name).write_text(json.dumps({**config, "lora_alpha": 4}))
    else:
        flip(lora / name)
    assert not find_finished(tmp_path / "out", base, lora, spec, card=False)
