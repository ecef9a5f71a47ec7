"""Open weight files of a checkpoint, and the table of all their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pome.checkpoint.files import File, read_header
from pome.checkpoint.header import Header, TensorEntry
from pome.errors import CheckpointError, printable


@dataclass(frozen=True)
class WeightFile:
    """One `.safetensors` file of a checkpoint, open, with its header."""

    name: str
    file: File
    header: Header


Tensors = dict[str, tuple[str, TensorEntry]]  # tensor name -> the name of its file, and its entry there


def gather(opened: Iterable[tuple[str, File]]) -> tuple[dict[str, WeightFile], Tensors]:
    """Read the headers of freshly opened files and unite their tables; on an error all of them are closed again."""
    files: dict[str, WeightFile] = {}
    tensors: Tensors = {}
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
        close_all(files)
        raise
    return files, tensors


def close_all(files: Mapping[str, WeightFile]) -> None:
    """Close every file of a checkpoint."""
    for weights in files.values():
        weights.file.close()
