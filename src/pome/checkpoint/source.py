"""Checkpoints, opened lazily: names, shapes, dtypes and offsets of tensors first, bytes on demand.

A checkpoint is a folder (on disk or a Hub repository) with `model.safetensors`, one other `.safetensors` file, or
shards with their index; or one `.safetensors` file. A PEFT adapter is opened as well: its file, and its config apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pome.checkpoint.choice import (
    CONVERT,
    INDEX_SUFFIX,
    NO_WEIGHTS,
    choose_weights,
    describe_misplaced,
    find_misplaced,
    is_adapter,
    judge_rest,
)
from pome.checkpoint.files import Listing, LocalFile, LocalListing, read_json, read_range
from pome.checkpoint.fp8 import DequantizedFile, Stored, find_scaled, list_gone
from pome.checkpoint.hub import is_repository, list_repository
from pome.checkpoint.leftovers import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED
from pome.checkpoint.weights import Tensors, WeightFile, close_all, gather
from pome.errors import CheckpointError, HubError, printable

# Sources beyond this machine: what their names look like, and what lists their files (with True: all, in a folder).
SOURCES: tuple[tuple[Callable[[str], bool], Callable[[str, bool], Listing]], ...] = ((is_repository, list_repository),)


@dataclass(frozen=True)
class Checkpoint:
    """One side of the edit. `tensors` maps each name to the name of its file and its entry there."""

    source: str  # as the user gave it
    folder: Path | None  # None for a lone file and for what is read from the Hub
    files: dict[str, WeightFile]
    tensors: Tensors
    config: Mapping[str, Any] | None
    index: str | None
    revision: str | None = None  # the Hub commit; None for what does not come from the Hub
    unused: dict[str, str] = field(default_factory=dict)  # files beside the checkpoint that are not it, and why
    notices: tuple[str, ...] = ()  # what a user should know of how it was read
    misplaced: Mapping[str, str] = field(default_factory=dict)  # tensors of which the index is wrong, and what it says
    adapter_beside: bool = False  # whether a PEFT adapter lies beside whole weights
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


@dataclass(frozen=True)
class Location:
    """Paths of the weight files of an open checkpoint, by which another process can open them."""

    source: str
    paths: dict[str, Path]  # by their names
    config: Mapping[str, Any] | None
    dequantize: bool

    def open(self) -> Checkpoint:
        """The checkpoint, for reading its tensors. Raises CheckpointError."""
        try:
            files, tensors = gather((name, LocalFile(path)) for name, path in self.paths.items())
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {_explain(error, Path(str(error.filename)))}") from None
        checkpoint = Checkpoint(self.source, None, files, tensors, self.config, None)
        return _see_dequantized(checkpoint) if self.dequantize else checkpoint


def find_location(checkpoint: Checkpoint, dequantize: bool) -> Location:
    """Paths of a checkpoint's files; one that was read from the Hub in parts is downloaded first."""
    if any(weights.file.stored is None for weights in checkpoint.files.values()):
        name = checkpoint.source.partition("@")[0]
        with contextlib.closing(open_checkpoint(f"{name}@{checkpoint.revision}", whole=True)) as whole:
            return find_location(whole, dequantize)
    paths = {name: Path(os.path.abspath(str(weights.file.stored))) for name, weights in checkpoint.files.items()}
    return Location(checkpoint.source, paths, checkpoint.config, dequantize)


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
    gone = {other for name in scaled for other in list_gone(name)} & checkpoint.tensors.keys()
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
            return _open_folder(text, path)
        if path.exists() or path.is_symlink():
            return _open_file(text, path)
        for matches, list_files in SOURCES:
            if isinstance(source, str) and matches(text):
                checkpoint = _open_listing(text, _list_remote(text, whole, list_files))
                # A side that is only read has no folder, even where the cache has it: its record must be the same in
                # both cases.
                return checkpoint if whole else dataclasses.replace(checkpoint, folder=None, is_local=False)
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else text
        raise CheckpointError(f"{printable(where, 1000)}: {_explain(error, Path(where))}") from None
    raise CheckpointError(
        f"{printable(text)}: no such file or folder; give a folder with .safetensors files, one .safetensors file or "
        "a Hub id such as org/name"
    )


def read_beside(checkpoint: Checkpoint, name: str) -> bytes | None:
    """A small file beside the weights of a folder or a repository; None where it has none. Raises CheckpointError."""
    listing: Listing
    if checkpoint.folder is not None:
        listing = LocalListing(checkpoint.folder)
    elif checkpoint.on_hub:
        text = f"{checkpoint.source.partition('@')[0]}@{checkpoint.revision}"
        listing = next(list_files for matches, list_files in SOURCES if matches(text))(text, False)
    else:
        return None
    return listing.read(name) if listing.holds(name) else None


def _list_remote(text: str, whole: bool, list_files: Callable[[str, bool], Listing]) -> Listing:
    try:
        return list_files(text, whole)
    except HubError as error:
        if "neither a local file" in str(error):
            raise
        reason = str(error).removeprefix(f"{printable(text)}: ")
        raise HubError(f"{printable(text)}: no such file or folder here, and as a Hub id: {reason}") from None


def _open_folder(text: str, path: Path) -> Checkpoint:
    try:
        return _open_listing(text, LocalListing(path))
    except CheckpointError as error:
        if not is_repository(text) or NO_WEIGHTS not in str(error):
            raise
        raise CheckpointError(
            f"{error}; the folder hides the Hub repository of its name, which {printable(text)}@main would be"
        ) from None


def _explain(error: OSError, path: Path) -> str:
    """Why a file cannot be opened, and what to do."""
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"a link to {printable(os.readlink(path), 1000)}, which is not there; mend the link or download it again"
    if error.errno == errno.ELOOP:
        return "a link that leads to itself; mend the link"
    steps = {
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
        errno.ENOENT: "it went away; check the path",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
    }
    step = steps.get(error.errno or 0, "check the disk")
    return f"cannot be opened: {error.strerror or error}; {step}, then run the same command again"


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
    files, tensors = gather([(path.name, LocalFile(path))])
    return Checkpoint(source, None, files, tensors, config, None)


def _open_listing(source: str, listing: Listing) -> Checkpoint:
    names, label = listing.names, listing.label
    if is_adapter(names):
        return _open_adapter(source, listing)
    choice = choose_weights(listing)
    config = read_json(listing, "config.json") if "config.json" in names else None
    files, tensors = gather((name, listing.open(name)) for name in choice.names)
    try:
        unused, notices = judge_rest(listing, choice, tensors, config)
        misplaced = find_misplaced(tensors, choice.weight_map) if choice.weight_map is not None else {}
    except BaseException:
        close_all(files)
        raise
    if misplaced:
        notices.append(describe_misplaced(f"{label}/{choice.index}", misplaced))
    return Checkpoint(
        source, listing.folder, files, tensors, config, choice.index, listing.revision,
        unused={**unused, **listing.left_out},
        notices=tuple(notices),
        misplaced=misplaced,
        adapter_beside=ADAPTER_CONFIG in names,
    )  # fmt: skip


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
    files, tensors = gather([(ADAPTER_WEIGHTS, listing.open(ADAPTER_WEIGHTS))])
    return Checkpoint(
        source, listing.folder, files, tensors, None, None, listing.revision,
        unused=dict(listing.left_out),
        adapter_config=config,
    )  # fmt: skip
