"""Copies of an input's files in the staging folder: the output before its first edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pome.checkpoint.header import Header
from pome.checkpoint.sidefiles import SideFile
from pome.checkpoint.source import Checkpoint
from pome.output.progress import Progress, advance_bytes
from pome.output.staging import Staging, update_index

CONFIG = "config.json"
# Floating-point dtypes by width; of two with one width neither holds the other.
FLOATS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


@dataclass(frozen=True)
class Template:
    """The files that an output begins as.

    weights: FT, or BASE where FT is an adapter that is merged into it. layouts: the new header, as bytes and as a
    table, of every weight file in which a tensor changes its dtype. side_files: files copied beside the weights.
    config: the text of a `config.json` that must say something else than the copied one, or None.
    """

    weights: Checkpoint
    layouts: Mapping[str, tuple[bytes, Header]]
    side_files: Sequence[SideFile]
    config: bytes | None = None


def make_config(weights: Checkpoint, edited_dtype: str) -> bytes | None:
    """The text of `config.json` for an output, or None where the copied one is right.

    Dequantized weights are declared no more. A dtype that is declared and cannot hold that of the edited tensors
    (`float32`, or `keep`) becomes the narrowest that can: a model that is loaded in the declared dtype, as transformers
    does by default, would lose the edit otherwise.
    """
    config = dict(weights.config or {})
    if weights.dequantized:
        config.pop("quantization_config", None)
    if edited_dtype in FLOATS:
        config = _widen_declared(config, edited_dtype)
    return None if config == (weights.config or {}) else (json.dumps(config, indent=2) + "\n").encode()


def _widen_declared(config: Mapping[str, Any], edited: str) -> dict[str, Any]:
    """A config with every declared dtype, also those of parts of the model, wide enough for `edited`."""
    widened = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = _widen_declared(value, edited)
        elif key in ("dtype", "torch_dtype") and isinstance(value, str):
            declared = value.removeprefix("torch.")
            if declared in FLOATS and not _holds(declared, edited):
                value = edited if _holds(edited, declared) else "float32"
        widened[key] = value
    return widened


def _holds(wide: str, narrow: str) -> bool:
    """Whether every value of one dtype is one of the other."""
    return wide == narrow or FLOATS[wide] > FLOATS[narrow]


def describe_config(weights: Checkpoint, edited_dtype: str, has_config: bool) -> list[str]:
    """Notices of how an output must be loaded whose edited tensors have another dtype than the others."""
    if has_config and make_config(weights, edited_dtype) != make_config(weights, ""):
        return [
            f"OUT/{CONFIG}: the dtype it declares is changed to hold {edited_dtype}, since a model that is loaded in a "
            "narrower one loses part of the edit"
        ]
    declared = {str((weights.config or {}).get(key)).removeprefix("torch.") for key in ("dtype", "torch_dtype")}
    if edited_dtype != "float32" or declared & {"float32", "float64"}:
        return []
    return ["OUT: no config.json declares its dtype; load it with dtype=torch.float32, or part of the edit is lost"]


def count_space(template: Template, staging: Staging) -> tuple[int, Path | None]:
    """Bytes still to be copied, and a file to try sharing with (None where nothing can be shared)."""
    layouts = template.layouts
    sizes = {name: file.header.file_size for name, file in template.weights.files.items()}
    sizes |= {name: header.file_size for name, (_, header) in layouts.items()}
    sizes |= {file.name: file.size for file in template.side_files}
    shared = None if layouts else next(iter(template.weights.files.values())).file.path
    return sum(size for name, size in sizes.items() if name not in staging.copied), shared


def copy_files(template: Template, staging: Staging, progress: Progress) -> None:
    """Fill the staging folder with a template's files.

    They are cloned as they are, or laid out anew where a dtype changes. Raises PomeError.
    """
    layouts, source = template.layouts, template.weights
    total = sum(file.header.file_size for file in source.files.values())
    advance = advance_bytes(progress, "copy")
    progress.start("copy", total + sum(file.size for file in template.side_files))
    for name, weights in source.files.items():
        if source.dequantized and not weights.header.tensors:
            continue  # a shard of scales alone, which no index would name
        if name in layouts:
            raw, header = layouts[name]
            staging.lay_out(name, weights.file, weights.header, raw, header, advance)
        elif weights.file.path is None:
            staging.write_file(name, weights.file, advance)
        else:
            staging.copy_file(name, weights.file.path, advance)
    for file in template.side_files:
        if file.name == CONFIG and template.config is not None:
            staging.put_file(file.name, template.config)
        else:
            staging.copy_file(file.name, file.path, advance)
    if source.index is not None and source.folder is not None:
        index = source.folder / source.index
        if layouts or source.dequantized:
            headers = {name: weights.header for name, weights in source.files.items()}
            headers |= {name: header for name, (_, header) in layouts.items()}
            size = sum(header.file_size - header.data_start for header in headers.values())
            added = {name: file for file, h in headers.items() for name in h.tensors if name not in source.tensors}
            staging.put_file(source.index, update_index(index.read_bytes(), size, source.dequantized, added))
        else:
            staging.copy_file(source.index, index, advance)
    progress.finish("copy")
