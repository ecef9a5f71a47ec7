"""Prove an output: its files are those of its manifest, its other bytes are FT's, its edits are the method's."""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pome.checkpoint.clone import hash_file
from pome.checkpoint.files import File, read_range
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.checkpoint.source import ADAPTER_WEIGHTS, Checkpoint, open_checkpoint
from pome.errors import SpecError, VerificationError, printable
from pome.manifest import CHECKSUM, FileRecord, Manifest, SideRecord, TensorRecord, read_manifest
from pome.plan import make_plan
from pome.spec import EditSpec
from pome.units import Plan, Unit

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 4  # units recomputed without `full`
CHUNK = 8 << 20
MODEL_CARD = "README.md"  # which a run may write in the place of FT's
# What a Hub or git leaves beside an output that was uploaded and fetched again.
STRANGERS = (".git", ".cache", ".gitattributes", ".gitignore")
# Another device or number of threads may round differently. Numbers of the spectrum then agree to this, and an edit
# agrees entry by entry or, where its cut lies in a cluster, reaches the certificate's bound all the same.
NUMBERS_AGREE = 1e-3
EDITS_AGREE = 1e-3
OBJECTIVE_BOUND = 1e-4
MERGES_AGREE = 1e-6
ROUNDINGS_AGREE = 0.05  # another rounding of some entries; what is lost to it is the root of a sum over all
# Numbers that are next to 0 or 1 by themselves, and differ by what the certificate leaves open.
RESIDUES_AGREE = {"objective": 1e-4, "orthogonality": 1e-4, "rounding": 1e-5}

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the manifest says."""

    file: str
    tensor: str | None
    what: str


@dataclass(frozen=True)
class Verdict:
    """What was checked, and every difference found."""

    differences: tuple[Difference, ...]
    files: int  # hashed against the manifest
    bytes_compared: int  # of OUT with FT, outside the edited matrices
    edits: int  # matrices recomputed from BASE and FT

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
    """Check an output against its manifest; with FT also its untouched bytes, with BASE and FT also its edits.

    Of the edits a sample is recomputed, or all of them when `full`. Raises PomeError when something cannot be read at
    all; whatever can be read and differs is a Difference.
    """
    if base is not None and ft is None:
        raise VerificationError("--base needs --ft: an edit is recomputed from both")
    folder = _find_folder(out)
    manifest = read_manifest(folder / MANIFEST_NAME)
    found = list(_check_manifest(folder, manifest))
    found += _check_files(folder, manifest.files, advance)
    compared = edits = 0
    if ft is not None and not found:
        # With a file missing or changed the rest cannot be told apart from it; what differs is already said.
        compared, edits = _check_against_inputs(str(folder), base, ft, manifest, full, found, advance)
    return Verdict(tuple(found), len(manifest.files), compared, edits)


def _find_folder(out: str | os.PathLike[str]) -> Path:
    path = Path(os.fspath(out)).expanduser()
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
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
    for name in sorted(present - files.keys() - {MANIFEST_NAME}):
        if not name.startswith(STRANGERS):
            yield Difference(name, None, "the manifest does not name it")
    for name, record in files.items():
        if name not in present:
            yield Difference(name, None, "missing")
            continue
        try:
            info = os.stat(folder / name)
            if not stat.S_ISREG(info.st_mode):  # a device would be read for ever
                yield Difference(name, None, "not a regular file")
            elif info.st_size != record.bytes:
                yield Difference(name, None, f"{info.st_size} bytes, the manifest says {record.bytes}")
            elif (sha256 := hash_file(folder / name, advance)[1]) != record.sha256:
                yield Difference(name, None, f"SHA-256 {sha256}, the manifest says {printable(record.sha256)}")
        except OSError as error:
            yield Difference(name, None, f"cannot be read: {error.strerror}")


def _check_against_inputs(
    out: str,
    base: str | os.PathLike[str] | None,
    ft: str | os.PathLike[str],
    manifest: Manifest,
    full: bool,
    found: list[Difference],
    advance: Advance,
) -> tuple[int, int]:
    sides: list[Checkpoint] = []
    try:
        for source, record in ((out, None), (ft, manifest.fine_tuned), (base, manifest.base)):
            if source is not None:
                dequantize = record is not None and bool(manifest.spec.get("dequantize"))
                sides.append(open_checkpoint(source, dequantize=dequantize))
                if record is not None:
                    found += _check_input(sides[-1], record, advance)
        if found:
            return 0, 0
        made, tuned = sides[:2]
        if tuned.adapter_config is not None:
            if base is None:
                raise VerificationError(
                    f"{printable(os.fspath(ft))}: an adapter; give --base too, whose bytes the output has elsewhere"
                )
            plan = make_plan(sides[2], tuned, _read_spec(manifest))
            if manifest.spec["out_format"] == "adapter":
                return _check_adapter(made, tuned, plan, manifest, full, found, advance)
            touched = {unit.name for unit in plan.units}
            compared = _compare_untouched(made, sides[2], touched, found, advance)
            return compared, _recompute(made, tuned, sides[2], plan, manifest, full, found, advance)
        found += _compare_rest(made, tuned, manifest, advance)
        if base is None:
            return _compare_untouched(made, tuned, {record.name for record in manifest.tensors}, found, advance), 0
        plan = make_plan(sides[2], tuned, _read_spec(manifest))
        edited = {unit.name for unit in plan.units}
        compared = _compare_untouched(made, tuned, edited, found, advance)
        compared += _compare_other_rows(made, tuned, plan, found)
        return compared, _recompute(made, tuned, sides[2], plan, manifest, full, found, advance)
    finally:
        for side in sides:
            side.close()


def _read_spec(manifest: Manifest) -> EditSpec:
    try:
        return EditSpec(**manifest.spec)
    except (TypeError, SpecError) as error:
        raise VerificationError(f"{MANIFEST_NAME}: its spec is not one of pome: {printable(str(error))}") from None


def _compare_rest(
    made: Checkpoint, tuned: Checkpoint, manifest: Manifest, advance: Advance
) -> Iterator[Difference]:
    """Everything that is no tensor is FT's too: headers, index and side files; but for a model card."""
    kept = manifest.spec.get("dtype") == "keep"
    for name, weights in made.files.items():
        theirs = tuned.files.get(name)
        if theirs is None:
            continue  # its tensors are reported one by one
        if kept:
            size = weights.header.data_start
            same = theirs.header.data_start == size and _same_bytes(weights.file, 0, theirs.file, 0, size)
        else:
            same = weights.header.metadata == theirs.header.metadata
        if not same:
            yield Difference(name, None, "its header is not FT's")
    for name, record in manifest.files.items():
        if name in made.files or name == MODEL_CARD or (name == tuned.index and not kept):
            continue
        if tuned.dequantized and name in (tuned.index, "config.json"):
            continue  # written anew, without the scales and without the word of them
        theirs_now = manifest.fine_tuned.files.get(name)
        if theirs_now is not None and tuned.folder is not None and (tuned.folder / name).is_file():
            theirs_now = FileRecord(*hash_file(tuned.folder / name, advance))
        if theirs_now is None:
            yield Difference(name, None, "FT has no such file")
        elif theirs_now != record:
            yield Difference(name, None, "its bytes are not FT's")


def _check_input(side: Checkpoint, record: SideRecord, advance: Advance) -> Iterator[Difference]:
    """An input given for comparison is the one that the manifest was made from."""
    for name, weights in side.files.items():
        file = weights.file
        sha256 = file.sha256 or (hash_file(file.stored, advance)[1] if file.stored else None)
        known = record.files.get(name)
        if known is None or sha256 != known.sha256:
            yield Difference(
                weights.file.where, None, f"not the file of {printable(record.source)} that the output was made from"
            )


def _compare_untouched(
    made: Checkpoint, tuned: Checkpoint, edited: set[str], found: list[Difference], advance: Advance
) -> int:
    """Every tensor outside `edited` has FT's place, dtype, shape and bytes; the number of bytes compared."""
    compared = 0
    for name, (file, entry) in tuned.tensors.items():
        if name not in made.tensors or made.tensors[name][0] != file:
            found.append(Difference(file, name, "missing, or in another file than in FT"))
            continue
        mine = made.tensors[name][1]
        if mine.shape != entry.shape or (name not in edited and mine.dtype != entry.dtype):
            stored = f"{mine.dtype} {list(mine.shape)}, in FT {entry.dtype} {list(entry.shape)}"
            found.append(Difference(file, name, stored))
        elif name not in edited:
            compared += entry.nbytes
            if not _same_bytes(made.files[file].file, mine.start, tuned.files[file].file, entry.start, entry.nbytes):
                found.append(Difference(file, name, "its bytes are not FT's, and it was not edited"))
            advance(entry.nbytes)
    for name in made.tensors.keys() - tuned.tensors.keys():
        found.append(Difference(made.tensors[name][0], name, "FT has no such tensor"))
    return compared


def _compare_other_rows(made: Checkpoint, tuned: Checkpoint, plan: Plan, found: list[Difference]) -> int:
    """The rows of resized embeddings that BASE does not have are FT's; the number of bytes compared."""
    compared = 0
    for unit in plan.units:
        rest = tuned.tensors[unit.name][1].end - unit.start - unit.nbytes
        if unit.expert is not None or rest == 0:
            continue
        ends = unit.out_start + unit.out_nbytes, unit.start + unit.nbytes
        compared += rest
        if not _same_bytes(made.files[unit.file].file, ends[0], tuned.files[unit.file].file, ends[1], rest):
            found.append(Difference(unit.file, unit.name, "its rows beyond BASE's are not FT's"))
    return compared


def _same_bytes(a: File, a_start: int, b: File, b_start: int, nbytes: int) -> bool:
    for at in range(0, nbytes, CHUNK):
        count = min(CHUNK, nbytes - at)
        if read_range(a, a_start + at, count, "tensor") != read_range(b, b_start + at, count, "tensor"):
            return False
    return True


def _recompute(
    made: Checkpoint,
    tuned: Checkpoint,
    base: Checkpoint,
    plan: Plan,
    manifest: Manifest,
    full: bool,
    found: list[Difference],
    advance: Advance,
) -> int:
    """Edit a sample of the units again and compare bytes and records; the number of matrices recomputed."""
    from pome.merge import make_patch, read_unit, see_ft

    records = {(record.name, record.part): record for record in manifest.tensors}
    found += _check_plan(plan, manifest)
    if found:
        return 0
    spec = dataclasses.replace(_read_spec(manifest), device="cpu")
    count = 0
    for unit in _choose(plan.units, full):
        data = read_unit(unit, tuned, base)
        original = see_ft(unit, data)
        out_bytes = made.read(unit.name, unit.out_start, unit.out_nbytes)
        patch = make_patch(unit, data, spec, "cpu")
        expected = patch.data if patch.data is not None else bytearray(original)
        for fresh in patch.tensors:
            count += 1
            what = _compare_records(records.get((fresh.name, fresh.part)), fresh)
            if what:
                found.append(Difference(MANIFEST_NAME, fresh.name, f"{fresh.part or 'record'}: {what}"))
        if out_bytes != expected:
            what = _judge(unit, out_bytes, expected, original, data[1], {r.part: r for r in patch.tensors})
            if what:
                found.append(Difference(unit.file, unit.name, what))
        advance(unit.nbytes)
    return count


def _check_plan(plan: Plan, manifest: Manifest) -> Iterator[Difference]:
    """What the manifest says was edited, kept and merged is what these inputs plan."""
    records = {(record.name, record.part) for record in manifest.tensors}
    kept = {(item.name, item.part) for item in manifest.kept}
    planned = {(unit.name, unit.label(part)) for unit, part in plan.matrices()}
    for name, part in sorted(records - planned, key=str):
        yield Difference(MANIFEST_NAME, name, f"{part or 'the matrix'} is not one that these inputs select")
    for name, part in sorted(planned - records - kept, key=str):
        yield Difference(MANIFEST_NAME, name, f"{part or 'the matrix'} was selected, but has no record")
    for name in sorted(set(manifest.merged) ^ set(plan.merged)):
        yield Difference(MANIFEST_NAME, name, "is merged by these inputs, or by the manifest, but not by both")


def _check_adapter(
    made: Checkpoint,
    tuned: Checkpoint,
    plan: Plan,
    manifest: Manifest,
    full: bool,
    found: list[Difference],
    advance: Advance,
) -> tuple[int, int]:
    """An edited adapter against the one that it was made from: (bytes compared, matrices recomputed)."""
    from pome.adapt import agree, edit_loras

    lows = {change.low.a: change.low for unit in plan.units if (change := unit.change) and change.low}
    edited = {name for low in lows.values() for name in (low.a, low.b)}
    rest = [
        dataclasses.replace(side, tensors={name: at for name, at in side.tensors.items() if name not in edited})
        for side in (made, tuned)
    ]
    compared = _compare_untouched(rest[0], rest[1], set(), found, advance)
    found += [Difference(ADAPTER_WEIGHTS, name, "missing") for name in sorted(edited - made.tensors.keys())]
    found += _check_plan(plan, manifest)
    if found:
        return compared, 0
    records = {(record.name, record.part): record for record in manifest.tensors}
    chosen = list(lows)[:: 1 if full else max(1, math.ceil(len(lows) / SAMPLE))]
    units = tuple(unit for unit in plan.units if unit.change and unit.change.low and unit.change.low.a in chosen)
    count = 0
    for lora in edit_loras(dataclasses.replace(plan, units=units), tuned, _read_spec(manifest), "cpu"):
        for fresh in lora.tensors:
            count += 1
            what = _compare_records(records.get((fresh.name, fresh.part)), fresh)
            if what:
                found.append(Difference(MANIFEST_NAME, fresh.name, f"{fresh.part or 'record'}: {what}"))
        room = sum((EDITS_AGREE + 2 * record.rounding) * record.edit_norm for record in lora.tensors)
        if not agree(lora, made, room):
            found.append(Difference(ADAPTER_WEIGHTS, lora.low.a, "is not the edit of these inputs"))
        advance(sum(unit.nbytes for unit in lora.units))
    return compared, count


def _choose(units: tuple[Unit, ...], full: bool) -> list[Unit]:
    """All units, or a few spread over the model: the same ones each time."""
    step = 1 if full else max(1, math.ceil(len(units) / SAMPLE))
    return list(units[::step])


def _compare_records(recorded: TensorRecord | None, fresh: TensorRecord) -> str | None:
    """What a record says otherwise than a recomputation, or None."""
    if recorded is None:
        return "has no record, though its delta is not zero"
    for field in ("file", "role", "shape", "dtype", "rank", "k"):
        if getattr(recorded, field) != getattr(fresh, field):
            return f"{field} {getattr(recorded, field)}, recomputed {getattr(fresh, field)}"
    for field in ("alpha", "beta", "sigma_max", "sigma_k", "noise_floor", "delta_norm", "edit_norm", "energy_kept"):
        a, b = getattr(recorded, field), getattr(fresh, field)
        if not math.isclose(a, b, rel_tol=NUMBERS_AGREE):
            return f"{field} {a}, recomputed {b}"
    if not math.isclose(recorded.sigma_next, fresh.sigma_next, rel_tol=NUMBERS_AGREE, abs_tol=1e-6 * fresh.sigma_max):
        return f"sigma_next {recorded.sigma_next}, recomputed {fresh.sigma_next}"
    for field, slack in RESIDUES_AGREE.items():
        a, b = getattr(recorded, field), getattr(fresh, field)
        if not abs(a - b) <= slack + ROUNDINGS_AGREE * abs(b) * (field == "rounding"):
            return f"{field} {a}, recomputed {b}"
    return None


def _judge(
    unit: Unit,
    out_bytes: bytearray,
    expected: bytearray,
    ft_bytes: bytes,
    base_bytes: bytearray,
    records: dict[str | None, TensorRecord],
) -> str | None:
    """Whether bytes other than those recomputed here are still the edit: what is wrong, or None."""
    import torch

    from pome.patch import TORCH_DTYPES, put_view, take

    def load(data: bytes | bytearray, dtype: str) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype]).reshape(unit.shape)

    out, fresh = load(out_bytes, unit.out_dtype), load(expected, unit.out_dtype)
    ft, base = load(ft_bytes, unit.dtype), load(base_bytes, unit.base_dtype)
    rest = fresh.clone()
    for part in unit.parts:
        put_view(rest, part).copy_(put_view(out, part))
    if not torch.equal(rest.view(torch.uint8), out.view(torch.uint8)):
        # Merged entries are products and sums, which another machine may round to the neighbouring value.
        ulps = 2 * torch.finfo(out.dtype).eps * rest.double().abs() + MERGES_AGREE * base.double().abs()
        if unit.change is None or not bool(((rest.double() - out.double()).abs() <= ulps).all()):
            return "entries outside the edited matrices are not FT's"
    for part in unit.parts:
        record = records.get(unit.label(part))
        E, again = take(out, part).double(), take(fresh, part).double()
        if record is None:
            return "differs from FT, though its delta is zero"
        # Edits that differ by d are stored differently in d / ulp of the entries, and there by one ulp: a square of
        # d * ulp each. The root of the sum over ulp^2 is sqrt(12) times what the rounding lost.
        room = math.sqrt(EDITS_AGREE**2 + 4 * EDITS_AGREE * record.rounding) * record.edit_norm
        if float((E - again).norm()) <= room:
            continue
        W_base = take(base, part).double()
        D = take(ft, part).double() - W_base
        objective = float((D * (E - W_base)).sum()) / float((D * (again - W_base)).sum())
        norm = float((E - W_base).norm()) / float((again - W_base).norm())
        # What is lost to rounding points anywhere, and so adds to either one part in the root of the entries.
        noise = OBJECTIVE_BOUND + 8 * record.rounding * (1 + record.rounding) / math.sqrt(E.numel())
        if abs(objective - 1) > noise or abs(norm - 1) > noise:
            which = record.part or "the matrix"
            return f"{which} is not the edit of these inputs (objective {objective:.6f}, norm {norm:.6f} of the edit's)"
    return None

