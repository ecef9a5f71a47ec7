"""Small checkpoints on disk, and independent ways to look at them; nothing here uses the package."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pome

INDEX = "model.safetensors.index.json"
ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INNER = 16, 40
LLAMA = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint folder: one file, or `shards` files (tensors dealt out in turn) and their index."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: tensors[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names[i::shards], file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        # Not the layout that any library writes: the index must be kept as it is, not written anew.
        text = json.dumps({"weight_map": weight_map, "metadata": {"total_size": total, "note": "kept"}}, indent=3)
        (folder / INDEX).write_text(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_llama(layers: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a Llama with random weights."""
    torch.manual_seed(seed)
    shapes = {"model.embed_tokens": (24, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (24, HIDDEN)}
    for i in range(layers):
        mlp = f"model.layers.{i}.mlp."
        shapes |= {mlp + "gate_proj": (INNER, HIDDEN), mlp + "up_proj": (INNER, HIDDEN)}
        shapes |= {mlp + "down_proj": (HIDDEN, INNER), f"model.layers.{i}.self_attn.q_proj": (HIDDEN, HIDDEN)}
    return {f"{name}.weight": (torch.randn(shape) * 0.05).to(dtype) for name, shape in shapes.items()}


def perturb(tensors: Mapping[str, Tensor], amount: float = 0.005, seed: int = 1) -> dict[str, Tensor]:
    """The same tensors after a training step of Gaussian noise, in their own dtypes."""
    torch.manual_seed(seed)
    return {name: (t.double() + amount * torch.randn(t.shape).double()).to(t.dtype) for name, t in tensors.items()}


def llama_pair(folder: Path, *, layers: int = 2, shards: int = 1, dtype: torch.dtype = torch.float32) -> list[Path]:
    """[BASE, FT], two folders in `folder`, of a small Llama."""
    base = random_llama(layers, dtype=dtype)
    return [
        write_checkpoint(folder / name, tensors, shards=shards, config=LLAMA)
        for name, tensors in (("base", base), ("ft", perturb(base)))
    ]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, by the reference library."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def read_ranges(file: Path) -> dict[str, tuple[int, int]]:
    """Name -> the bytes (start, end) of each tensor in a file, straight from the format's definition."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return {name: tuple(8 + size + at for at in entry["data_offsets"]) for name, entry in header.items()}


def assert_only_edited(ft: Path, out: Path, edited: Iterable[str], also: Iterable[str] = ()) -> None:
    """Every byte of every file of the folder FT stands in OUT, but for the ranges of `edited`, which all differ.

    `also` names files of FT that OUT is allowed not to have.
    """
    left = set(edited)
    files = {str(path.relative_to(ft)) for path in ft.rglob("*") if path.is_file()} - set(also)
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert made == files | {"pome_manifest.json"}
    for name in files:
        before, after = bytearray((ft / name).read_bytes()), bytearray((out / name).read_bytes())
        assert len(before) == len(after)
        if name.endswith(".safetensors"):
            for tensor, (start, end) in read_ranges(ft / name).items():
                if tensor in left:
                    left.remove(tensor)
                    assert before[start:end] != after[start:end], f"{tensor} was not edited"
                    before[start:end] = after[start:end] = b"\0" * (end - start)
        assert before == after, f"{name} differs outside the edited ranges"
    assert not left


def hash_tree(folder: Path) -> dict[str, str]:
    """Every path below a folder -> the SHA-256 of its bytes (folders: a word)."""
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an output without what may differ between two runs."""
    manifest = json.loads((out / "pome_manifest.json").read_bytes())
    assert manifest.pop("created")
    assert manifest.pop("timing")
    return manifest


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python on the package of this tree, in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=environment(), **options
    )


def environment() -> dict[str, str]:
    """The environment of a child process: this tree's package, output of a fixed width."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"}


def count_ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers of their common 16-bit dtype lie between the entries of two tensors."""

    def number(t: Tensor) -> Tensor:  # sign and magnitude -> a line of integers
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    assert a.dtype == b.dtype and a.dtype.itemsize == 2
    return (number(a) - number(b)).abs()


class StopAfter(pome.Progress):
    """Ctrl-C after so many calls that tell of edited units."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def advance(self, task: str, amount: int, nbytes: int = 0, note: str = "", work: float = 0.0) -> None:
        self.left -= task == "edit" and amount > 0
        if not self.left:
            raise KeyboardInterrupt
