"""Copies of an input's files in the staging folder: what an output is before its first edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pome.checkpoint.header import Header
from pome.checkpoint.sidefiles import SideFile
from pome.checkpoint.source import Checkpoint
from pome.output.progress import Progress, advance_bytes
from pome.output.staging import Staging, update_index


@dataclass(frozen=True)
class Template:
    """The files that an output begins as.

    weights: FT, or BASE where FT is an adapter that is merged into it. layouts: the new header, as bytes and as a
    table, of every weight file in which a tensor changes its dtype. side_files: what is copied beside the weights.
    """

    weights: Checkpoint
    layouts: Mapping[str, tuple[bytes, Header]]
    side_files: Sequence[SideFile]


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
        if file.name == "config.json" and source.dequantized:
            config = {key: value for key, value in (source.config or {}).items() if key != "quantization_config"}
            staging.put_file(file.name, (json.dumps(config, indent=2) + "\n").encode())
        else:
            staging.copy_file(file.name, file.path, advance)
    if source.index is not None and source.folder is not None:
        index = source.folder / source.index
        if layouts or source.dequantized:
            headers = {name: weights.header for name, weights in source.files.items()}
            headers |= {name: header for name, (_, header) in layouts.items()}
            size = sum(header.file_size - header.data_start for header in headers.values())
            staging.put_file(source.index, update_index(index.read_bytes(), size, source.dequantized))
        else:
            staging.copy_file(source.index, index, advance)
    progress.finish("copy")
