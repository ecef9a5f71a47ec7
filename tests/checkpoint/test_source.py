"""What is a checkpoint: files and folders in every layout, and what is refused with the next step."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pome import CheckpointError
from pome.checkpoint.source import open_checkpoint
from support.checkpoints import INDEX, LLAMA, llama_pair, random_llama, read_ranges, read_tensors, write_checkpoint

SMALL = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}


def refuse(path: Path) -> str:
    """The one-line message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).close()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 1
    return message


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_the_reference_library_reads_it(tmp_path: Path, shards: int) -> None:
    tensors = random_llama(dtype=torch.bfloat16)
    folder = write_checkpoint(tmp_path / "model", tensors, shards=shards, config=LLAMA)
    checkpoint = open_checkpoint(folder)
    try:
        assert checkpoint.config == LLAMA
        assert checkpoint.index == (INDEX if shards > 1 else None)
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, expected in read_tensors(folder).items():
            file, entry = checkpoint.tensors[name]
            assert (entry.start, entry.end) == read_ranges(folder / file)[name]
            assert entry.shape == tuple(expected.shape)
            data = checkpoint.read(name, entry.start, entry.nbytes)
            assert bytes(data) == expected.view(torch.uint8).numpy().tobytes()
    finally:
        checkpoint.close()


def test_a_lone_file_takes_the_config_beside_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", SMALL, config=LLAMA)
    checkpoint = open_checkpoint(folder / "model.safetensors")
    checkpoint.close()
    assert (checkpoint.config, checkpoint.folder, set(checkpoint.tensors)) == (LLAMA, None, {"a", "b"})


def test_a_folder_with_one_file_of_another_name(tmp_path: Path) -> None:
    tmp_path.joinpath("m").mkdir()
    save_file(SMALL, tmp_path / "m/weights.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m")
    checkpoint.close()
    assert list(checkpoint.files) == ["weights.safetensors"]


def test_shards_need_no_index_when_their_names_say_that_all_are_here(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2)
    (folder / INDEX).unlink()
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    assert len(checkpoint.tensors) == len(random_llama())
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 shards are here and there is no index" in refuse(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = refuse(folder)
    assert "model-00002-of-00003.safetensors: missing" in message
    assert "1 of 3 files are missing" in message


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama())
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - cut)
    message = refuse(folder)
    assert "model.safetensors" in message and "truncated" in message


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "a\\b.safetensors"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (folder / INDEX).write_text(json.dumps(index))
    assert str(folder / INDEX) in refuse(folder)


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for i in (1, 2):
        save_file(SMALL, folder / f"model-0000{i}-of-00002.safetensors")
    assert "also stands in" in refuse(folder)


def test_pickles_are_refused_with_how_to_convert(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save(SMALL, folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        message = refuse(path)
        assert "pytorch_model.bin" in message
        assert "save_pretrained" in message and "save_file" in message


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refuse(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors file" in refuse(tmp_path / "empty")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    assert "not a .safetensors file" in refuse(tmp_path / "text.txt")


def test_an_index_as_a_path_is_refused_and_its_folder_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2)
    assert "index of a checkpoint; give its folder" in refuse(folder / INDEX)


def test_two_files_without_an_index_are_refused(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("x", "y"):
        save_file(SMALL, tmp_path / f"two/{name}.safetensors")
    assert "give one file by its path" in refuse(tmp_path / "two")


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in refuse(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("where", ["itself", "shard", "config.json"])
def test_a_dangling_link_is_named_with_what_it_leads_to(tmp_path: Path, where: str) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=2, config=LLAMA)
    path = {"itself": tmp_path / "n.safetensors", "config.json": folder / "config.json"}.get(
        where, folder / "model-00001-of-00002.safetensors"
    )
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "blobs/gone")
    message = refuse(path if where == "itself" else folder)
    assert path.name in message and "a link to" in message and "blobs/gone, which is not there" in message
    assert "permissions" not in message


@pytest.mark.parametrize("side", ["org", "org/name"])
def test_a_folder_without_weights_that_hides_a_hub_id_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(side)
    assert ("hides the Hub repository of its name, which org/name@main" in str(caught.value)) == (side == "org/name")


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    assert "loop.safetensors: a link that leads to itself" in refuse(tmp_path / "loop.safetensors")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' + "[" * 100_000])
def test_a_broken_config_is_named(tmp_path: Path, text: str) -> None:
    folder = write_checkpoint(tmp_path / "m", SMALL)
    (folder / "config.json").write_text(text)
    assert "config.json: not" in refuse(folder)


def test_a_file_that_changes_while_open_is_noticed(tmp_path: Path) -> None:
    folder, _ = llama_pair(tmp_path)
    file = folder / "model.safetensors"
    checkpoint = open_checkpoint(folder)
    try:
        checkpoint.check_unchanged()
        raw = bytearray(file.read_bytes())
        (size,) = struct.unpack("<Q", raw[:8])
        raw[8 + size] ^= 1
        info = file.stat()
        file.write_bytes(raw)
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns + 1_000_000))
        with pytest.raises(CheckpointError, match="changed while being read"):
            checkpoint.check_unchanged()
        name, (_, entry) = next(iter(checkpoint.tensors.items()))
        os.truncate(file, entry.start + 1)
        with pytest.raises(CheckpointError, match=f"tensor {name}.*file ends"):
            checkpoint.read(name, entry.start, entry.nbytes)
    finally:
        checkpoint.close()


def test_a_refusal_leaves_no_file_open(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_llama(), shards=3)
    os.truncate(folder / "model-00003-of-00003.safetensors", 300)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        refuse(folder)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert before == after
