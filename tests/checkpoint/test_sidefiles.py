"""Which files go along with the weights: of one checkpoint, and of a base with an adapter merged in."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pome.checkpoint.sidefiles import (
    SideFile,
    describe_repeats,
    describe_trained_beside,
    list_adapted_side_files,
    list_side_files,
)
from pome.checkpoint.source import open_checkpoint
from pome.errors import OutputError
from support.checkpoints import LLAMA, random_llama, write_checkpoint

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}


def write_files(folder: Path, names: Iterable[str]) -> None:
    """Files of as many bytes as their names have letters."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def write_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 16), f"{module}.lora_B.weight": torch.ones(40, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    return folder


def list_files(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """({name: path} of what is copied in its order, {name: reason} of what is not), each size that of the file."""
    checkpoint = open_checkpoint(folder)
    copied, skipped = list_side_files(checkpoint)
    checkpoint.close()
    assert all(file.size == file.path.stat().st_size for file in copied)
    return {file.name: file.path for file in copied}, skipped


def list_merged(base: Path, adapter: Path) -> tuple[dict[str, Path], dict[str, str]]:
    with ExitStack() as stack:
        sides = [open_checkpoint(side) for side in (base, adapter)]
        for side in sides:
            stack.callback(side.close)
        copied, skipped = list_adapted_side_files(*sides)
    assert len({file.name for file in copied}) == len(copied)
    return {file.name: file.path for file in copied}, skipped


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", random_llama(1), config=LLAMA)


def test_everything_that_is_no_weight_goes_along_folder_by_folder(model: Path) -> None:
    below = ["a/deep/er.txt", "a/one.py", "b/two.py"]
    write_files(model, [*below, "z.txt", "tokenizer.json", "checkpoint-x", "global_step", "optimizer.json"])
    copied, skipped = list_files(model)
    top = ["checkpoint-x", "config.json", "global_step", "optimizer.json", "tokenizer.json", "z.txt"]
    assert list(copied) == [*top, "a/one.py", "a/deep/er.txt", "b/two.py"]
    assert copied == {name: model / name for name in copied}
    assert skipped == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("optimizer.pt", "training state"),
        ("sub/scheduler.bin", "training state"),
        ("rng_state_3.pth", "training state"),
        ("scaler.pt", "training state"),
        ("training_args.bin", "training state"),
        ("trainer_state.json", "training state"),
        ("pytorch_model.bin", "weights in another format, which this edit does not change"),
        ("onnx/model.onnx", "weights in another format, which this edit does not change"),
        ("pome_manifest.json", "the manifest of an earlier edit"),
        ("sub/pome_manifest.json", "the manifest of an earlier edit"),
        (".git", "version control"),
    ],
)
def test_files_that_the_edit_would_make_untrue_are_not_copied(model: Path, name: str, reason: str) -> None:
    write_files(model, [name, "sub/kept.txt"])
    copied, skipped = list_files(model)
    assert skipped == {name: reason}
    assert list(copied) == ["config.json", "sub/kept.txt"]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("checkpoint-500", "training state"),
        ("global_step12", "training state"),
        ("sub/checkpoint-1", "training state"),
        (".git", "version control"),
        (".cache", "a download cache"),
    ],
)
def test_a_folder_that_stays_behind_is_named_once_and_not_entered(model: Path, folder: str, reason: str) -> None:
    write_files(model, [f"{folder}/config.json", f"{folder}/deep/optimizer.pt", "sub/kept.txt", "zoo/kept.txt"])
    copied, skipped = list_files(model)
    assert skipped == {f"{folder}/": reason}
    assert list(copied) == ["config.json", "sub/kept.txt", "zoo/kept.txt"]


@pytest.mark.parametrize("folder", ["checkpoint-500", "code"])
def test_a_link_to_a_folder_is_not_followed(model: Path, tmp_path: Path, folder: str) -> None:
    write_files(tmp_path / "elsewhere", ["secret.txt"])
    (model / folder).symlink_to(tmp_path / "elsewhere")
    copied, skipped = list_files(model)
    assert (list(copied), skipped) == (["config.json"], {f"{folder}/": "a symbolic link to a folder"})


def test_a_link_to_a_file_is_a_file_and_a_pipe_is_none(model: Path, tmp_path: Path) -> None:
    write_files(tmp_path, ["vocabulary"])
    (model / "vocab.txt").symlink_to(tmp_path / "vocabulary")
    os.mkfifo(model / "pipe")
    copied, skipped = list_files(model)
    assert (list(copied), skipped) == (["config.json", "vocab.txt"], {"pipe": "not a regular file"})


def test_a_link_to_nothing_is_an_error_that_names_it(model: Path) -> None:
    (model / "vocab.txt").symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"vocab\.txt: cannot be read: No such file.*; remove it or mend the link$"):
        list_files(model)


def test_a_folder_that_cannot_be_listed_is_an_error_that_names_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(model, ["sub/kept.txt"])
    checkpoint, scan = open_checkpoint(model), os.scandir

    def refuse(path: str | os.PathLike[str]) -> os._ScandirIterator[str]:
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OutputError, match=r"sub: cannot be listed: Permission denied$"):
        list_side_files(checkpoint)
    checkpoint.close()


def test_weights_beside_the_model_stay_behind_with_the_checkpoint_s_reason(model: Path) -> None:
    write_files(model, ["extra.safetensors"])
    checkpoint = open_checkpoint(model)
    copied, skipped = list_side_files(checkpoint)
    checkpoint.close()
    assert skipped == checkpoint.unused != {}
    assert skipped.keys() == {"extra.safetensors"}
    assert [file.name for file in copied] == ["config.json"]


def test_a_lone_file_has_nothing_beside_it(model: Path) -> None:
    write_files(model, ["tokenizer.json"])
    assert list_files(model / "model.safetensors") == ({}, {})


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
        "special_tokens_map.json", "added_tokens.json", "spiece.model", "qwen.tiktoken", "chat_template.jinja",
        "chat_template.json", "additional/tool_use.jinja",
    ],
)  # fmt: skip
def test_the_adapters_tokenizer_takes_the_place_of_bases(model: Path, tmp_path: Path, name: str) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    for folder in (model, adapter):
        write_files(folder, [name, "generation_config.json"])
    copied, skipped = list_merged(model, adapter)
    assert copied == {file: model / file for file in ("config.json", "generation_config.json")} | {name: adapter / name}
    assert skipped == {
        "adapter_config.json": "the adapter's config; its changes are in the weights",
        "generation_config.json": "of the adapter, and not its tokenizer",
    }


@pytest.mark.parametrize("name", ["README.md", "vocabulary.txt", "my_merges.txt.old", "model.py"])
def test_files_of_the_adapter_beside_its_tokenizer_are_not_copied(model: Path, tmp_path: Path, name: str) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    write_files(adapter, [name, "optimizer.pt"])
    write_files(model, ["trainer_state.json"])
    copied, skipped = list_merged(model, adapter)
    assert list(copied) == ["config.json"]
    assert skipped == {
        "adapter_config.json": "the adapter's config; its changes are in the weights",
        "optimizer.pt": "training state",
        "trainer_state.json": "training state",
        name: "of the adapter, and not its tokenizer",
    }


@pytest.mark.parametrize("inner", ["adapter", "runs/adapter"])
def test_an_adapter_inside_base_is_no_part_of_it(model: Path, inner: str) -> None:
    adapter = write_adapter(model / inner)
    write_files(model, [f"{inner}/tokenizer.json", f"{inner}/checkpoint-3/x", f"{inner}s/near.txt", "tokenizer.json"])
    copied, skipped = list_merged(model, adapter)
    assert copied == {
        "config.json": model / "config.json",
        "tokenizer.json": adapter / "tokenizer.json",
        f"{inner}s/near.txt": model / f"{inner}s/near.txt",
    }
    assert skipped == {
        "adapter_config.json": "the adapter's config; its changes are in the weights",
        "checkpoint-3/": "training state",
        f"{inner}/": "the folder of an input",
    }


def test_base_inside_an_adapter_is_no_part_of_it(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    base = write_checkpoint(adapter / "base", random_llama(1), config=LLAMA)
    write_files(base, ["tokenizer.json"])
    copied, skipped = list_merged(base, adapter)
    assert copied == {name: base / name for name in ("config.json", "tokenizer.json")}
    assert skipped == {
        "adapter_config.json": "the adapter's config; its changes are in the weights",
        "base/": "the folder of an input",
    }


@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_side_that_is_read_from_the_hub_has_no_files_here(model: Path, tmp_path: Path, without: int) -> None:
    """Only its weights are read; the files of the other side are all there is. 2: neither side lies here."""
    adapter = write_adapter(tmp_path / "adapter")
    write_files(adapter, ["tokenizer.json"])
    sides = [open_checkpoint(model), open_checkpoint(adapter)]
    seen = [dataclasses.replace(side, folder=None) if without in (at, 2) else side for at, side in enumerate(sides)]
    copied, _ = list_adapted_side_files(*seen)
    for side in sides:
        side.close()
    assert [file.name for file in copied] == [["tokenizer.json"], ["config.json"], []][without]


def test_files_in_folders_that_repeat_the_weights_are_told_with_their_sizes(model: Path) -> None:
    """What cannot be read, or holds other tensors, comes first: the one that does is found all the same."""
    write_files(model, ["a/broken.safetensors", "a/notes.txt"])
    tensors = random_llama(1)
    for name, held in {"b/other": {"x": torch.ones(2)}, "c/old": tensors | {"x": torch.ones(2)}}.items():
        (model / name).parent.mkdir()
        save_file(held, model / f"{name}.safetensors")
    checkpoint = open_checkpoint(model)
    copied, _ = list_side_files(checkpoint)
    (told,) = describe_repeats(checkpoint, [*copied, SideFile("top.safetensors", model / "c/old.safetensors", 1)])
    size = (model / "c/old.safetensors").stat().st_size
    said = f"c/old.safetensors: repeats {len(tensors)} tensors of the checkpoint in {size} bytes; it is copied as it is"
    assert told.startswith(f"{model}/{said}, not edited")
    checkpoint.close()


def test_trained_weights_beside_an_adapter_are_told_unless_the_adapter_is_on_the_hub(tmp_path: Path) -> None:
    adapter = open_checkpoint(write_adapter(tmp_path / "adapter"))
    beside = SideFile("mm_projector.bin", tmp_path / "adapter/mm_projector.bin", 3)
    elsewhere = SideFile("other.bin", tmp_path / "model/other.bin", 3)
    text = SideFile("notes.txt", tmp_path / "adapter/notes.txt", 3)
    (told,) = describe_trained_beside(adapter, [beside, elsewhere, text])
    assert told.startswith(f"{tmp_path}/adapter/mm_projector.bin: was trained beside the adapter")
    assert describe_trained_beside(dataclasses.replace(adapter, folder=None), [beside]) == []
    adapter.close()


def test_an_adapter_saved_into_its_base_leaves_only_itself_behind(model: Path) -> None:
    """PEFT would apply it once more if OUT had its config."""
    write_files(model, ["tokenizer.json", "README.md", "optimizer.pt"])
    write_adapter(model)
    copied, skipped = list_merged(model, model / "adapter_model.safetensors")
    assert copied == {name: model / name for name in ("README.md", "config.json", "tokenizer.json")}
    assert skipped == {
        "adapter_config.json": "the adapter's config; its changes are in the weights",
        "adapter_model.safetensors": "a PEFT adapter beside whole weights, which loaders would apply to the edited "
        "weights again",
        "optimizer.pt": "training state",
    }
