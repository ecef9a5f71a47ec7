"""Checkpoints, opened lazily: names, shapes, dtypes and offsets of tensors first, bytes on demand.

A checkpoint is a folder (on disk or a Hub repository) with `model.safetensors`, one other `.safetensors` file, or
shards with their index; or one `.safetensors` file. A PEFT adapter is opened as well: its file, and its config apart.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pome.checkpoint.files import File, Listing, LocalFile, LocalListing, read_header, read_json, read_range
from pome.checkpoint.fp8 import SUFFIX, DequantizedFile, Stored, find_scaled
from pome.checkpoint.header import Header, TensorEntry, parse_index
from pome.checkpoint.hub import PICKLED, is_repository, list_repository
from pome.errors import CheckpointError, printable

INDEX_SUFFIX = ".safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})\.safetensors")
CONVERT = (
    "pickled weights are never unpickled; convert them once with transformers: "
    "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True), "
    "or torch.load(FILE, weights_only=True) and safetensors.torch.save_file"
)


# Sources beyond this machine: what their names look like, and what lists their files (with True: all, in a folder).
SOURCES: tuple[tuple[Callable[[str], bool], Callable[[str, bool], Listing]], ...] = ((is_repository, list_repository),)


@dataclass(frozen=True)
class WeightFile:
    """One `.safetensors` file of a checkpoint, open, with its header."""

    name: str
    file: File
    header: Header


@dataclass(frozen=True)
class Checkpoint:
    """One side of the edit. `tensors` maps each name to the name of its file and its entry there."""

    source: str  # as the user gave it
    folder: Path | None  # None for a lone file and for what is read from the Hub
    files: dict[str, WeightFile]
    tensors: dict[str, tuple[str, TensorEntry]]
    config: Mapping[str, Any] | None
    index: str | None
    revision: str | None = None  # the Hub commit; None for what does not come from the Hub
    unused: dict[str, str] = field(default_factory=dict)  # files beside the checkpoint that are not it, and why
    adapter_config: Mapping[str, Any] | None = None  # of a PEFT adapter, which has no weights of its own
    dequantized: frozenset[str] = frozenset()  # tensors that stand in the files and are not seen: scales of fp8 weights
    is_local: bool = True  # whether its files lie on this machine, as a folder, a file or a downloaded snapshot

    @property
    def on_hub(self) -> bool:
        """Whether it was given as a Hub repository, wherever its bytes are read."""
        return self.revision is not None

    def read(self, name: str, start: int, nbytes: int) -> bytearray:
        """`nbytes` bytes of a tensor's file from absolute offset `start`; CheckpointError if they cannot all be had."""
        return read_range(self.files[self.tensors[name][0]].file, start, nbytes, f"tensor {printable(name)}")

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self.files[self.tensors[name][0]].file.where}: tensor {printable(name)}"

    @property
    def companions(self) -> list[Path]:
        """The files on this machine that say what the weights are: configs and index."""
        if not self.is_local:
            return []
        here = self.folder or Path(os.path.expanduser(self.source)).parent
        said = {"config.json": self.config, ADAPTER_CONFIG: self.adapter_config, self.index: self.index}
        return [here / name for name, there in said.items() if name and there is not None]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a weight file is no longer what was opened."""
        for weights in self.files.values():
            weights.file.check_unchanged()

    def close(self) -> None:
        for weights in self.files.values():
            weights.file.close()


def open_checkpoint(source: str | os.PathLike[str], *, whole: bool = False, dequantize: bool = False) -> Checkpoint:
    """Open a folder, a `.safetensors` file or a Hub repository: headers, index and config, no tensor data.

    Of a repository only what is read is downloaded, unless `whole`: then all its files are, as FT's must be. With
    `dequantize`, fp8 weights with block scales are seen as bfloat16.
    """
    checkpoint = _open(source, whole)
    if not dequantize:
        return checkpoint
    try:
        return _see_dequantized(checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _see_dequantized(checkpoint: Checkpoint) -> Checkpoint:
    stored = {n: Stored(checkpoint.files[file].file, entry) for n, (file, entry) in checkpoint.tensors.items()}
    scaled = find_scaled(stored, checkpoint.config)
    gone = {name + SUFFIX for name in scaled}
    files = dict(checkpoint.files)
    for name, weights in checkpoint.files.items():
        if not weights.header.tensors.keys().isdisjoint(scaled.keys() | gone):
            file = DequantizedFile(weights.file, weights.header, scaled, gone)
            files[name] = WeightFile(name, file, file.header)
    tensors = {n: (f, files[f].header.tensors[n]) for n, (f, _) in checkpoint.tensors.items() if n not in gone}
    return dataclasses.replace(checkpoint, files=files, tensors=tensors, dequantized=frozenset(gone))


def _open(source: str | os.PathLike[str], whole: bool) -> Checkpoint:
    text = os.fspath(source)
    path = Path(os.path.expanduser(text))
    try:
        if path.is_dir():
            return _open_listing(text, LocalListing(path))
        if path.exists() or path.is_symlink():
            return _open_file(text, path)
        for matches, list_files in SOURCES:
            if isinstance(source, str) and matches(text):
                checkpoint = _open_listing(text, list_files(text, whole))
                # A side that is only read has no folder, even where the cache has it: what is recorded of it must not
                # tell the two apart.
                return checkpoint if whole else dataclasses.replace(checkpoint, folder=None, is_local=False)
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else text
        raise CheckpointError(
            f"{printable(where, 1000)}: cannot be opened: {error.strerror or error}; check its permissions and the "
            "disk, then run the same command again"
        ) from None
    raise CheckpointError(
        f"{printable(text)}: no such file or folder; give a folder with .safetensors files, one .safetensors file or "
        "a Hub id such as org/name"
    )


def _open_file(source: str, path: Path) -> Checkpoint:
    if path.suffix in PICKLED:
        raise CheckpointError(f"{path}: {CONVERT}")
    if path.name.endswith(INDEX_SUFFIX):
        raise CheckpointError(f"{path}: this is the index of a checkpoint; give its folder {path.parent}")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: not a .safetensors file; give a checkpoint folder or one .safetensors file")
    if path.name == ADAPTER_WEIGHTS and (path.parent / ADAPTER_CONFIG).is_file():
        return _open_adapter(source, LocalListing(path.parent))
    beside = path.parent / "config.json"
    config = read_json(LocalListing(path.parent), beside.name) if beside.is_file() else None
    files, tensors = _gather([(path.name, LocalFile(path))])
    return Checkpoint(source, None, files, tensors, config, None)


def _open_listing(source: str, listing: Listing) -> Checkpoint:
    names, label = listing.names, listing.label
    if ADAPTER_CONFIG in names and not any(
        name.endswith(".safetensors") and not name.startswith("adapter_model") for name in names
    ):
        return _open_adapter(source, listing)
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_model")]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if ADAPTER_CONFIG in names and "config.json" not in names:
        raise CheckpointError(
            f"{label}: holds the config of a PEFT adapter beside weights that are not an adapter's; keep one of the two"
        )
    weight_map: dict[str, str] | None = None
    index = None
    # The order is that of transformers: the plain name, then the index, then whatever single reading is left.
    if "model.safetensors" in found:
        chosen = ["model.safetensors"]
    elif indexes:
        index = "model" + INDEX_SUFFIX if "model" + INDEX_SUFFIX in indexes else indexes[0]
        if index != "model" + INDEX_SUFFIX and len(indexes) > 1:
            raise CheckpointError(f"{label}: holds several indexes ({', '.join(map(printable, indexes))}); keep one")
        weight_map = parse_index(listing.read(index), f"{label}/{index}")
        chosen = sorted(set(weight_map.values()))
    else:
        chosen = _choose_without_index(label, found, names)
    absent = [name for name in chosen if name not in names]
    if absent:
        raise CheckpointError(
            f"{label}/{printable(absent[0])}: missing, but {index} names it ({len(absent)} of {len(chosen)} files are "
            "missing); copy or download the checkpoint again"
        )
    unused = {
        name: "weights outside the checkpoint that its index or model.safetensors names"
        for name in [*found, *indexes]
        if name not in chosen and name != index
    } | dict(listing.left_out)
    config = read_json(listing, "config.json") if "config.json" in names else None
    files, tensors = _gather((name, listing.open(name)) for name in chosen)
    if weight_map is not None:
        try:
            _compare_with_index(tensors, weight_map, f"{label}/{index}")
        except BaseException:
            _close_all(files)
            raise
    return Checkpoint(source, listing.folder, files, tensors, config, index, listing.revision, unused)


def _open_adapter(source: str, listing: Listing) -> Checkpoint:
    if ADAPTER_WEIGHTS not in listing.names:
        where = f"{listing.label}/{ADAPTER_CONFIG}"
        if "adapter_model.bin" in listing.names:
            raise CheckpointError(
                f"{listing.label}/adapter_model.bin: pickled weights are never unpickled; convert them once: "
                f"torch.load(FILE, weights_only=True) and safetensors.torch.save_file to {ADAPTER_WEIGHTS}"
            )
        raise CheckpointError(f"{where}: has no {ADAPTER_WEIGHTS} beside it; save or download the adapter again")
    config = read_json(listing, ADAPTER_CONFIG)
    files, tensors = _gather([(ADAPTER_WEIGHTS, listing.open(ADAPTER_WEIGHTS))])
    unused = dict(listing.left_out)
    return Checkpoint(source, listing.folder, files, tensors, None, None, listing.revision, unused, config)


def _choose_without_index(label: str, found: list[str], names: list[str]) -> list[str]:
    if len(found) == 1 and not SHARD.fullmatch(found[0]):
        return found
    if found:
        parts = [m for m in map(SHARD.fullmatch, found) if m]
        if len(parts) == len(found) and len({(m["stem"], m["total"]) for m in parts}) == 1:
            total = int(parts[0]["total"])
            if sorted(int(m["number"]) for m in parts) == list(range(1, total + 1)):
                return found
            raise CheckpointError(
                f"{label}: {len(found)} of {total} shards are here and there is no index; copy the checkpoint again"
            )
        raise CheckpointError(
            f"{label}: holds {len(found)} .safetensors files ({', '.join(map(printable, found[:3]))}, ...) and no "
            "model.safetensors.index.json that says which belong together; give one file by its path"
        )
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise CheckpointError(f"{label}/{printable(pickled[0])}: {CONVERT}")
    raise CheckpointError(f"{label}: holds no .safetensors file; is this the folder of a saved model?")


Gathered = tuple[dict[str, WeightFile], dict[str, tuple[str, TensorEntry]]]


def _gather(opened: Iterable[tuple[str, File]]) -> Gathered:
    """Read the headers of freshly opened files and unite their tables; on an error all of them are closed again."""
    files: dict[str, WeightFile] = {}
    tensors: dict[str, tuple[str, TensorEntry]] = {}
    try:
        for name, file in opened:
            try:
                files[name] = WeightFile(name, file, read_header(file))
            except BaseException:
                file.close()
                raise
            for tensor, entry in files[name].header.tensors.items():
                if tensor in tensors:
                    raise CheckpointError(
                        f"{file.where}: tensor {printable(tensor)} also stands in {tensors[tensor][0]}; remove one"
                    )
                tensors[tensor] = (name, entry)
    except BaseException:
        _close_all(files)
        raise
    return files, tensors


def _close_all(files: dict[str, WeightFile]) -> None:
    for weights in files.values():
        weights.file.close()


def _compare_with_index(tensors: dict[str, tuple[str, TensorEntry]], weight_map: dict[str, str], where: str) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name][0] != file:
            raise CheckpointError(
                f"{where}: says that {printable(name)} is in {printable(file)}, but it is not there; "
                "copy or download the checkpoint again"
            )
    extra = next((name for name in tensors if name not in weight_map), None)
    if extra is not None:
        raise CheckpointError(
            f"{where}: does not name {printable(extra)}, which stands in {tensors[extra][0]}; "
            "copy or download the checkpoint again"
        )
