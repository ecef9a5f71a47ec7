"""Open a checkpoint and read byte ranges of its tensors: names, shapes, dtypes and offsets first, bytes on demand.

A checkpoint is a folder with `model.safetensors`, one other `.safetensors` file, or shards with their index; or one
`.safetensors` file. Ranges are read with `pread`: no mmap (slow on network disks, fills the page cache) and never a
whole shard in memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pome.checkpoint.header import Header, TensorEntry, parse_index, read_header
from pome.errors import CheckpointError, printable

INDEX_SUFFIX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON_BYTES = 256 << 20
CONVERT = (
    "pickled weights are never unpickled; convert them once with transformers: "
    "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True), "
    "or torch.load(FILE, weights_only=True) and safetensors.torch.save_file"
)


@dataclass(frozen=True)
class WeightFile:
    """One `.safetensors` file, open for reading: its header and the identity it had when it was opened."""

    name: str
    path: Path
    header: Header
    fd: int
    identity: tuple[int, int, int, int]  # device, inode, bytes, mtime in ns


@dataclass(frozen=True)
class Checkpoint:
    """One side of the edit. `tensors` maps each name to the name of its file and its entry there."""

    source: str  # as the user gave it
    folder: Path | None  # None for a lone file
    files: dict[str, WeightFile]
    tensors: dict[str, tuple[str, TensorEntry]]
    config: dict[str, Any] | None
    index: str | None
    revision: str | None = None
    unused: dict[str, str] = field(default_factory=dict)  # weight files beside the checkpoint, and why they are not it

    def read(self, name: str, start: int, nbytes: int) -> bytearray:
        """`nbytes` bytes of a tensor's file from absolute offset `start`; CheckpointError if they cannot all be had."""
        file = self.files[self.tensors[name][0]]
        buffer = bytearray(nbytes)
        view = memoryview(buffer)
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(file.fd, [view[done : done + (1 << 30)]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{file.path}: tensor {printable(name)}: read error at byte {start + done}: {error.strerror}; "
                    "check the disk, then run the same command again"
                ) from None
            if got == 0:
                raise CheckpointError(
                    f"{file.path}: tensor {printable(name)}: the file ends {nbytes - done} bytes before the tensor does; "
                    "it changed while being read"
                )
            done += got
        return buffer

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a weight file is no longer what was opened."""
        for file in self.files.values():
            try:
                now = identify(os.fstat(file.fd)), identify(os.stat(file.path))
            except OSError as error:
                raise CheckpointError(f"{file.path}: went away while being read: {error.strerror}") from None
            if now != (file.identity, file.identity):
                raise CheckpointError(
                    f"{file.path}: changed while being read; wait until nothing writes there, then run the same "
                    "command again with --fresh"
                )

    def close(self) -> None:
        for file in self.files.values():
            os.close(file.fd)


def identify(info: os.stat_result) -> tuple[int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder or a `.safetensors` file: read headers, index and config, check that they agree; no tensor data."""
    text = os.fspath(source)
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            return _open_folder(text, path)
        if path.exists() or path.is_symlink():
            return _open_file(text, path)
    except OSError as error:
        raise CheckpointError(f"{printable(text)}: cannot be opened: {error.strerror or error}") from None
    raise CheckpointError(
        f"{printable(text)}: no such file or folder; give a folder with .safetensors files or one .safetensors file"
    )


def _open_file(source: str, path: Path) -> Checkpoint:
    if path.suffix in PICKLED:
        raise CheckpointError(f"{path}: {CONVERT}")
    if path.name.endswith(INDEX_SUFFIX):
        raise CheckpointError(f"{path}: this is the index of a checkpoint; give its folder {path.parent}")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: not a .safetensors file; give a checkpoint folder or one .safetensors file")
    beside = path.parent / "config.json"
    config = read_json(beside) if beside.is_file() else None
    return _gather(source, None, [path], config, None, {})


def _open_folder(source: str, folder: Path) -> Checkpoint:
    names = sorted(entry.name for entry in os.scandir(folder))
    found = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if "adapter_config.json" in names and "config.json" not in names:
        raise CheckpointError(
            f"{folder}: holds a PEFT adapter (adapter_config.json), not full weights; merge it first: "
            "PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(NEW_DIR)"
        )
    found = [name for name in found if not name.startswith("adapter_model")]
    weight_map: dict[str, str] | None = None
    index = None
    # The order is that of transformers: the plain name, then the index, then whatever single reading is left.
    if "model.safetensors" in found:
        chosen = ["model.safetensors"]
    elif indexes:
        index = "model" + INDEX_SUFFIX if "model" + INDEX_SUFFIX in indexes else indexes[0]
        if index != "model" + INDEX_SUFFIX and len(indexes) > 1:
            raise CheckpointError(f"{folder}: holds several indexes ({', '.join(indexes)}); keep one")
        weight_map = parse_index(_read_bytes(folder / index), str(folder / index))
        chosen = sorted(set(weight_map.values()))
    else:
        chosen = _choose_without_index(folder, found, names)
    absent = [name for name in chosen if name not in names]
    if absent:
        raise CheckpointError(
            f"{folder / absent[0]}: missing, but {index} names it ({len(absent)} of {len(chosen)} files are missing); "
            "copy or download the checkpoint again"
        )
    unused = {
        name: "weights outside the checkpoint that its index or model.safetensors names"
        for name in [*found, *indexes]
        if name not in chosen and name != index
    }
    config = read_json(folder / "config.json") if "config.json" in names else None
    checkpoint = _gather(source, folder, [folder / name for name in chosen], config, index, unused)
    if weight_map is not None:
        _compare_with_index(checkpoint, weight_map, folder / str(index))
    return checkpoint


def _choose_without_index(folder: Path, found: list[str], names: list[str]) -> list[str]:
    if len(found) == 1 and not SHARD.fullmatch(found[0]):
        return found
    if found:
        shards = [SHARD.fullmatch(name) for name in found]
        parts = [m for m in shards if m]
        if len(parts) == len(found) and len({(m["stem"], m["total"]) for m in parts}) == 1:
            total = int(parts[0]["total"])
            if sorted(int(m["number"]) for m in parts) == list(range(1, total + 1)):
                return found
            raise CheckpointError(
                f"{folder}: {len(found)} of {total} shards are here and there is no index; copy the checkpoint again"
            )
        raise CheckpointError(
            f"{folder}: holds {len(found)} .safetensors files ({', '.join(map(printable, found[:3]))}, ...) and no "
            "model.safetensors.index.json that says which belong together; give one file by its path"
        )
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise CheckpointError(f"{folder / printable(pickled[0])}: {CONVERT}")
    raise CheckpointError(f"{folder}: holds no .safetensors file; is this the folder of a saved model?")


def _gather(
    source: str,
    folder: Path | None,
    paths: list[Path],
    config: dict[str, Any] | None,
    index: str | None,
    unused: dict[str, str],
) -> Checkpoint:
    files: dict[str, WeightFile] = {}
    tensors: dict[str, tuple[str, TensorEntry]] = {}
    try:
        for path in paths:
            file = _open_weights(path)
            files[path.name] = file
            for name, entry in file.header.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {printable(name)} also stands in {tensors[name][0]}; one name, one tensor"
                    )
                tensors[name] = (path.name, entry)
    except BaseException:
        for file in files.values():
            os.close(file.fd)
        raise
    return Checkpoint(source, folder, files, tensors, config, index, unused=unused)


def _open_weights(path: Path) -> WeightFile:
    # O_NONBLOCK: opening a FIFO in place of a file must fail, not wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        return WeightFile(path.name, path, read_header(fd, str(path)), fd, identify(info))
    except BaseException:
        os.close(fd)
        raise


def _compare_with_index(checkpoint: Checkpoint, weight_map: dict[str, str], where: Path) -> None:
    for name, file in weight_map.items():
        if name not in checkpoint.tensors or checkpoint.tensors[name][0] != file:
            raise CheckpointError(
                f"{where}: says that {printable(name)} is in {printable(file)}, but it is not there; "
                "copy or download the checkpoint again"
            )
    extra = next((name for name in checkpoint.tensors if name not in weight_map), None)
    if extra is not None:
        raise CheckpointError(
            f"{where}: does not name {printable(extra)}, which stands in {checkpoint.tensors[extra][0]}; "
            "copy or download the checkpoint again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file beside the weights. Raises CheckpointError if it is anything else."""
    try:
        value = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(str(error))
        raise CheckpointError(f"{path}: not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _read_bytes(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if info.st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {info.st_size} bytes of JSON; over the limit of {MAX_JSON_BYTES}")
        return file.read()
