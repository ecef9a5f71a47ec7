"""Verification of an output: hashes of its files, bytes outside its edits, and its edits computed again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pome.checkpoint.hashing import hash_file
from pome.checkpoint.leftovers import ADAPTER_CONFIG
from pome.checkpoint.sidefiles import MANIFEST_NAME, list_adapted_side_files, list_side_files
from pome.checkpoint.source import Checkpoint, open_checkpoint
from pome.config.extraction import ExtractSpec, read_spec
from pome.config.spec import EditSpec
from pome.editing.session import plan_pair
from pome.editing.ties import find_copies, hold_same_bytes
from pome.errors import PomeError, SpecError, VerificationError, printable
from pome.manifest import CHECKSUM, FileRecord, Manifest, read_manifest
from pome.output.card import CARD_NAME
from pome.output.copying import CONFIG, make_config
from pome.verification.comparison import (
    Advance,
    Difference,
    check_input,
    compare_headers,
    compare_other_rows,
    compare_side_files,
    compare_untouched,
)
from pome.verification.extraction import check_extraction
from pome.verification.recomputation import check_adapter, compare_converted, is_converted, recompute

# Files that the Hub or git leaves beside an output that was uploaded and fetched again.
WRONG_HASH = "SHA-256"
STRANGERS = (".git", ".cache", ".gitattributes", ".gitignore")


@dataclass(frozen=True)
class Verdict:
    """Result of a verification.

    differences: everything that is wrong; empty for an intact output. files: how many were hashed.
    bytes_compared: bytes of OUT held against FT's, outside the edited matrices. edits: how many matrices were computed
    again from BASE and FT.
    """

    differences: tuple[Difference, ...]
    files: int
    bytes_compared: int
    edits: int

    @property
    def ok(self) -> bool:
        return not self.differences


def verify(
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    ft: str | os.PathLike[str] | None = None,
    *,
    full: bool = False,
    advance: Advance = lambda _: None,
) -> Verdict:
    """Check of an output against its manifest, and against the inputs that are given.

    The hashes of all files are compared with the manifest's. With `ft`, every byte outside the edited matrices is
    compared with FT's. With `base` and `ft`, edits are computed again and compared with the stored ones.

    Args:
        out: the folder that `edit` or `sweep` made, or a Hub repository to which it was uploaded.
        base: the pretrained checkpoint of that run, as in `edit`; needs `ft`.
        ft: the fine-tuned one, as in `edit`.
        full: compute every edit again, and not a sample of 4 units spread over the model.
        advance: is told of the number of bytes of each piece that was hashed or compared.

    Raises:
        VerificationError: no readable manifest, or `base` without `ft`.
        PomeError: an input that cannot be read at all. What can be read and differs is a Difference.
    """
    if base is not None and ft is None:
        raise VerificationError("--base needs --ft: an edit is recomputed from both")
    folder = _find_folder(out)
    manifest = read_manifest(folder / MANIFEST_NAME)
    found = list(_check_manifest(folder, manifest))
    found += _check_files(folder, manifest.files, advance)
    compared = edits = 0
    damaged = {item.file for item in found}
    if ft is not None and all(item.file.endswith(".safetensors") and WRONG_HASH in item.what for item in found):
        # The manifest is whole and every size is right: which tensors differ can be told.
        more: list[Difference] = []
        with contextlib.nullcontext() if not found else contextlib.suppress(PomeError):
            compared, edits = _check_against_inputs(str(folder), base, ft, manifest, full, damaged, more, advance)
        found += more
    return Verdict(tuple(found), len(manifest.files), compared, edits)


def _find_folder(out: str | os.PathLike[str]) -> Path:
    path = Path(os.path.expanduser(out))
    if path.is_dir():
        return path
    checkpoint = open_checkpoint(out, whole=True)
    checkpoint.close()
    if checkpoint.folder is None:
        raise VerificationError(f"{printable(str(path))}: not a folder; give the output that pome made")
    return checkpoint.folder


def _check_manifest(folder: Path, manifest: Manifest) -> Iterator[Difference]:
    """The manifest is as it was written, to the byte: its own checksum and its own form."""
    if (folder / MANIFEST_NAME).read_bytes() != manifest.to_json().encode():
        yield Difference(MANIFEST_NAME, None, "it is not in the form in which pome writes it; it was edited")
    if manifest.timing.get(CHECKSUM) != manifest.checksum():
        yield Difference(MANIFEST_NAME, None, "its checksum does not fit what it says; it was edited")


def _check_files(folder: Path, files: dict[str, FileRecord], advance: Advance) -> Iterator[Difference]:
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    for name in sorted(present - files.keys() - {MANIFEST_NAME}):
        if Path(name).parts[0] not in STRANGERS:
            yield Difference(name, None, "the manifest does not name it")
    for name, record in files.items():
        if name not in present:
            yield Difference(name, None, "missing")
            continue
        try:
            info = os.stat(folder / name)
            if not stat.S_ISREG(info.st_mode):  # reading a device would never end
                yield Difference(name, None, "not a regular file")
            elif info.st_size != record.bytes:
                yield Difference(name, None, f"{info.st_size} bytes, the manifest says {record.bytes}")
            elif (sha256 := hash_file(folder / name, advance)[1]) != record.sha256:
                yield Difference(name, None, f"{WRONG_HASH} {sha256}, the manifest says {printable(record.sha256)}")
        except OSError as error:
            yield Difference(name, None, f"cannot be read: {error.strerror}")


def _check_against_inputs(
    out: str,
    base: str | os.PathLike[str] | None,
    ft: str | os.PathLike[str],
    manifest: Manifest,
    full: bool,
    damaged: set[str],
    found: list[Difference],
    advance: Advance,
) -> tuple[int, int]:
    """(bytes compared, matrices recomputed); all matrices in `damaged` files are, whatever `full` says."""
    sides: list[Checkpoint] = []
    try:
        for source, record in ((out, None), (ft, manifest.fine_tuned), (base, manifest.base)):
            if source is not None:
                dequantize = record is not None and bool(manifest.spec.get("dequantize"))
                sides.append(open_checkpoint(source, dequantize=dequantize))
                if record is not None:
                    found += check_input(sides[-1], record, advance)
        if found:
            return 0, 0
        made, tuned = sides[:2]
        spec = _read_spec(manifest)
        if isinstance(spec, ExtractSpec):
            if base is None:
                raise VerificationError(f"{printable(os.fspath(ft))}: an extracted adapter; give --base too")
            planned = plan_pair(sides[2], tuned, dataclasses.replace(spec, allow_missing=True, allow_other_depth=True))
            full = full or bool(damaged)
            return check_extraction(made, sides[2], tuned, planned, manifest, spec, full, found, advance)
        adapted = tuned.adapter_config is not None
        if adapted and base is None:
            raise VerificationError(
                f"{printable(os.fspath(ft))}: an adapter; give --base too, whose bytes the output has elsewhere"
            )
        merged = adapted and spec.out_format == "full"
        template = sides[2] if merged else tuned
        added = made.tensors.keys() - template.tensors.keys()  # by an adapter, or tensors that nobody planned
        found += compare_headers(made, template, kept=spec.dtype == "keep" and merged == adapted and not added)
        beside = None
        if all(side.is_local for side in sides[1:]):
            side_files, _ = list_adapted_side_files(sides[2], tuned) if merged else list_side_files(tuned)
            beside = {file.name: file.path for file in side_files}
            if template.index is not None and template.folder is not None:
                beside[template.index] = template.folder / template.index
        recorded = {**(manifest.base.files if merged else {}), **manifest.fine_tuned.files}
        relaid = any(
            name in made.tensors and made.tensors[name][1].dtype != entry.dtype
            for name, (_, entry) in template.tensors.items()
        )
        config = make_config(template, spec.dtype if relaid else "")
        written = _list_written(made, template, spec)
        if config is not None and CONFIG in manifest.files:
            written.add(CONFIG)
            if (Path(out) / CONFIG).read_bytes() != config:
                found.append(Difference(CONFIG, None, "is not FT's with the dtype of the edit"))
        found += compare_side_files(manifest.files, beside, recorded, written, advance)
        if base is None:
            edited = {record.name for record in manifest.tensors}
            edited |= _check_copies(made, find_copies(tuned, sorted(edited)), found)
            # Selected, and of a zero delta: FT's values in the dtype that was asked for.
            converted = {item.name for item in manifest.kept if is_converted(made, item.name, spec)} - edited
            found += compare_converted(made, tuned, converted)
            return compare_untouched(made, tuned, edited | converted, found, advance), 0
        # Whether to go on was asked when the output was made.
        allowed = dataclasses.replace(spec, allow_missing=True, allow_other_depth=True)
        plan = plan_pair(sides[2], tuned, allowed)
        if adapted and not merged:
            return check_adapter(made, tuned, plan, manifest, spec, full or bool(damaged), found, advance)
        edited = {unit.name for unit in plan.units}
        copies = {unit.name: tuple(copy.name for copy in unit.copies) for unit in plan.units if unit.copies}
        edited |= _check_copies(made, copies, found)
        compared = compare_untouched(made, template, edited, found, advance)
        if not merged:
            compared += compare_other_rows(made, tuned, plan, found)
        return compared, recompute(made, tuned, sides[2], plan, manifest, spec, full, damaged, found, advance)
    finally:
        for side in sides:
            side.close()


def _check_copies(made: Checkpoint, copies: dict[str, tuple[str, ...]], found: list[Difference]) -> set[str]:
    """The names of all copies of tied weights; each must hold what was written to the first."""
    names = set()
    for first, others in copies.items():
        for other in others:
            names.add(other)
            if {first, other} <= made.tensors.keys() and not hold_same_bytes(made, first, other):
                found.append(Difference(made.tensors[other][0], other, f"is not {printable(first)}, stored again"))
    return names


def _list_written(made: Checkpoint, template: Checkpoint, spec: EditSpec) -> set[str]:
    """Files of an output that are no copies: weights, a model card, and files that a change of layout rewrites."""
    written = {*made.files, CARD_NAME}
    if made.adapter_config is not None:
        written.add(ADAPTER_CONFIG)
    added = made.tensors.keys() - template.tensors.keys()
    if template.index is not None and (spec.dtype != "keep" or template.dequantized or added):
        written.add(template.index)
    return written


def _read_spec(manifest: Manifest) -> EditSpec:
    try:
        return read_spec(manifest.spec)
    except (TypeError, SpecError) as error:
        raise VerificationError(f"{MANIFEST_NAME}: its spec is not one of pome: {printable(str(error))}") from None
