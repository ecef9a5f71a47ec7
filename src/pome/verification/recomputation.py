"""Recomputation of an output's edits from BASE and FT, compared with its bytes and its manifest."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from pome.checkpoint.leftovers import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pome.checkpoint.sidefiles import MANIFEST_NAME
from pome.checkpoint.source import Checkpoint
from pome.config.spec import EditSpec
from pome.errors import CheckpointError
from pome.manifest import Manifest, TensorRecord
from pome.planning.split import count_cores
from pome.planning.units import STORED_NAMES, Plan, Unit
from pome.verification.comparison import Advance, Difference, compare_untouched

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 4  # units recomputed without `full`
# Another device or number of threads may round differently. Numbers of the spectrum then agree to this, and an edit
# agrees entry by entry or, where its cut lies in a cluster, reaches the certificate's bound all the same.
NUMBERS_AGREE = 1e-3
EDITS_AGREE = 1e-3
OBJECTIVE_BOUND = 1e-4
SQUARES_AGREE = 2e-7  # of the largest square: float32 squares leave that in doubt, whatever comes after them
MERGES_AGREE = 1e-6
SCALINGS_AGREE = 1e-12  # alpha is the scaling times the rank, which PEFT divides by the rank again
ROUNDINGS_AGREE = 0.05  # some entries may round differently; the loss to rounding is the root of a sum over all
DRIFTS_AGREE = 1e-9  # of the base's norm: where nothing drifted, rounding leaves about this
# Numbers that are near 0 or 1 in any edit, and may differ by what the certificate allows.
RESIDUES_AGREE = {"objective": 1e-4, "orthogonality": 1e-4, "power_residual": 1e-4, "rounding": 1e-5}


def recompute(
    made: Checkpoint,
    tuned: Checkpoint,
    base: Checkpoint,
    plan: Plan,
    manifest: Manifest,
    spec: EditSpec,
    full: bool,
    damaged: AbstractSet[str],
    found: list[Difference],
    advance: Advance,
) -> int:
    """Edit a sample of the units again, and all in `damaged` files, and compare bytes and records.

    Returns the number of matrices recomputed.
    """
    from pome.editing.lora_merge import make_patch, read_unit, see_ft
    from pome.editing.workers import use_threads

    found += _check_plan(plan, manifest)
    if found:
        return 0
    spec = dataclasses.replace(spec, device="cpu")
    count, cores = 0, count_cores()
    sample = {unit.key for unit in _choose(plan.units, full)}
    for unit in (unit for unit in plan.units if unit.key in sample or unit.file in damaged):
        data = read_unit(unit, tuned, base)
        original = see_ft(unit, data)
        out_bytes = made.read(unit.name, unit.out_start, unit.out_nbytes)
        with use_threads(unit.count_threads(cores)):  # as an edit on this machine does, for the same bits
            patch = make_patch(unit, data, spec, "cpu")
        expected = patch.data if patch.data is not None else bytearray(original)
        count += len(patch.tensors)
        found += _check_records(patch.tensors, manifest)
        if out_bytes != expected:
            power = spec.resolve(unit.name).power
            what = _judge(unit, out_bytes, expected, original, data[1], {r.part: r for r in patch.tensors}, power)
            if unit.file in damaged:  # one wrong bit may change no more than another rounding does
                what = what or "its bytes are not those of the edit as it is computed here"
            if what:
                found.append(Difference(unit.file, unit.name, what))
        advance(unit.nbytes)
    return count


def _check_plan(plan: Plan, manifest: Manifest) -> Iterator[Difference]:
    """Comparison of the matrices that the manifest lists as edited, kept and merged with the plan of these inputs."""
    records = {(record.name, record.part) for record in manifest.tensors}
    kept = {(item.name, item.part) for item in manifest.kept}
    planned = {(unit.name, unit.label(part)) for unit, part in plan.matrices()}
    for name, part in sorted(records - planned, key=str):
        yield Difference(MANIFEST_NAME, name, f"{part or 'the matrix'} is not one that these inputs select")
    for name, part in sorted(planned - records - kept, key=str):
        yield Difference(MANIFEST_NAME, name, f"{part or 'the matrix'} was selected, but has no record")
    for name in sorted(set(manifest.merged) ^ set(plan.merged)):
        yield Difference(MANIFEST_NAME, name, "is merged by these inputs, or by the manifest, but not by both")


def is_converted(made: Checkpoint, name: str, spec: EditSpec) -> bool:
    """Whether a tensor of an output has the dtype that `--dtype` asked for."""
    return name in made.tensors and made.tensors[name][1].dtype == STORED_NAMES.get(spec.dtype)


def compare_converted(made: Checkpoint, tuned: Checkpoint, names: Iterable[str]) -> Iterator[Difference]:
    """Tensors that were written in another dtype, and not edited, hold FT's values."""
    import torch

    from pome.editing.unit import TORCH_DTYPES, to_bytes

    for name in sorted(set(names) & tuned.tensors.keys()):
        (file, mine), (_, theirs) = made.tensors[name], tuned.tensors[name]
        if theirs.dtype not in TORCH_DTYPES or mine.shape != theirs.shape:
            continue  # the comparison of the tables says so
        values = torch.frombuffer(tuned.read(name, theirs.start, theirs.nbytes), dtype=TORCH_DTYPES[theirs.dtype])
        if made.read(name, mine.start, mine.nbytes) != to_bytes(values.to(TORCH_DTYPES[mine.dtype])):
            yield Difference(file, name, "its values are not FT's, and it was not edited")


def check_adapter(
    made: Checkpoint,
    tuned: Checkpoint,
    plan: Plan,
    manifest: Manifest,
    spec: EditSpec,
    full: bool,
    found: list[Difference],
    advance: Advance,
) -> tuple[int, int]:
    """An edited adapter against the one that it was made from: (bytes compared, matrices recomputed)."""
    from pome.editing.lora_rewrite import agree, edit_loras, group_by_lora

    groups = group_by_lora(plan.units)
    edited = {name for members in groups.values() for name in (members[0][1].a, members[0][1].b)}
    rest = [
        dataclasses.replace(side, tensors={name: at for name, at in side.tensors.items() if name not in edited})
        for side in (made, tuned)
    ]
    compared = compare_untouched(rest[0], rest[1], set(), found, advance)
    found += [Difference(ADAPTER_WEIGHTS, name, "missing") for name in sorted(edited - made.tensors.keys())]
    found += _check_plan(plan, manifest)
    if found:
        return compared, 0
    found += _check_config(made, tuned, plan)
    chosen = set(list(groups)[:: 1 if full else max(1, math.ceil(len(groups) / SAMPLE))])
    units = tuple(unit for unit in plan.units if unit.change and any(low.a in chosen for low in unit.change.lows))
    count = 0
    for lora in edit_loras(dataclasses.replace(plan, units=units), tuned, spec, "cpu"):
        if lora.low.a not in chosen:
            continue  # another LoRA of a unit that was chosen
        count += len(lora.tensors)
        found += _check_records(lora.tensors, manifest)
        tolerance = sum((EDITS_AGREE + 2 * record.rounding) * record.edit_norm for record in lora.tensors)
        if not agree(lora, made, tuned, tolerance):
            found.append(Difference(ADAPTER_WEIGHTS, lora.low.a, "is not the edit of these inputs"))
        advance(sum(unit.nbytes for unit in lora.units))
    return compared, count


def _check_config(made: Checkpoint, tuned: Checkpoint, plan: Plan) -> Iterator[Difference]:
    """An edited adapter's config is FT's but for ranks and alphas, and PEFT reads from it what the tensors are."""
    from pome.checkpoint.lora_config import LoraConfig
    from pome.editing.lora_rewrite import make_config

    ranks = [(low, made.tensors[low.a][1].shape[0] // low.experts) for low in plan.loras]
    if made.adapter_config != json.loads(make_config(LoraConfig(tuned), ranks)):
        yield Difference(ADAPTER_CONFIG, None, "is not FT's with the ranks and alphas of the edit")
    try:
        config = LoraConfig(made)
        for low, rank in ranks:
            loaded, scaling = config.resolve(low.key)
            if loaded != rank or not math.isclose(scaling, low.scaling, rel_tol=SCALINGS_AGREE):
                what = f"PEFT loads it with rank {loaded} and scaling {scaling:g}, it has {rank} and {low.scaling:g}"
                yield Difference(ADAPTER_CONFIG, low.a, what)
    except CheckpointError as error:
        yield Difference(ADAPTER_CONFIG, None, str(error))


def _choose(units: tuple[Unit, ...], full: bool) -> list[Unit]:
    """All units, or a few spread over the model: the same ones each time."""
    step = 1 if full else max(1, math.ceil(len(units) / SAMPLE))
    return list(units[::step])


def _check_records(tensors: Sequence[TensorRecord], manifest: Manifest) -> Iterator[Difference]:
    """Comparison of the records of these matrices with recomputed ones."""
    records = {(record.name, record.part): record for record in manifest.tensors}
    for fresh in tensors:
        what = compare_record(records.get((fresh.name, fresh.part)), fresh)
        if what:
            yield Difference(MANIFEST_NAME, fresh.name, f"{fresh.part or 'record'}: {what}")


def compare_record(recorded: TensorRecord | None, fresh: TensorRecord) -> str | None:
    """The first field in which a record differs from a recomputed one, in words; None if they agree."""
    if recorded is None:
        return "has no record, though its delta is not zero"
    # Another machine or release may leave a matrix to another route, and know its rank and whole spectrum, or not.
    is_other = (recorded.rank is None) != (fresh.rank is None)
    k = fresh.k or 0
    if is_other and not k <= (recorded.rank or k) <= min(fresh.shape):
        return f"rank {recorded.rank}, with k {k} of shape {fresh.shape}"
    for field in ("file", "role", "shape", "dtype", "method", *(() if is_other else ("rank",)), "k"):
        if getattr(recorded, field) != getattr(fresh, field):
            return f"{field} {getattr(recorded, field)}, recomputed {getattr(fresh, field)}"
    # Where W_ft leaves open which W_E is the nearest, another machine may find another: these are then judged by bytes.
    judged = ("edit_norm", "departure") if is_open(fresh) else ()
    s_1 = fresh.spectrum[0][1]
    near = {"rel_tol": NUMBERS_AGREE, "abs_tol": DRIFTS_AGREE * s_1 * (fresh.method == "equivalence")}
    squares = {"rel_tol": 2 * NUMBERS_AGREE, "abs_tol": SQUARES_AGREE * s_1**2}
    for fields, power, bounds in (
        (("alpha", "beta", "sigma_max", "noise_floor", "delta_norm", "energy_kept", "edit_norm", "distance"), 1, near),
        (("spectral_drift",), 1, {**near, "abs_tol": DRIFTS_AGREE}),
        (("departure",), 1, {**near, "abs_tol": NUMBERS_AGREE}),
        (("sigma_k",) if is_other else ("sigma_k", "sigma_next"), 2, squares),
    ):
        for field in (name for name in fields if name not in judged):
            a, b = getattr(recorded, field), getattr(fresh, field)
            if a is None or b is None:
                if a is not b:
                    return f"{field} {a}, recomputed {b}"
            elif not math.isclose(a**power, b**power, **bounds):
                return f"{field} {a}, recomputed {b}"
    theirs, mine = (dict(record.spectrum) for record in (recorded, fresh))
    if is_other:
        theirs, mine = ({i: s for i, s in points.items() if i <= k} for points in (theirs, mine))
        theirs, mine = ({i: points[i] for i in sorted(theirs.keys() & mine.keys())} for points in (theirs, mine))
    if list(theirs) != list(mine) or any(not math.isclose(s**2, mine[i] ** 2, **squares) for i, s in theirs.items()):
        return "spectrum is not the one recomputed"
    for field, slack in RESIDUES_AGREE.items():
        a, b = getattr(recorded, field), getattr(fresh, field)
        if a is None or b is None:  # an older release did not measure it
            continue
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
    power: float,
) -> str | None:
    """The fault of bytes that differ from those recomputed here, or None where they are still the edit."""
    import torch

    from pome.editing.unit import TORCH_DTYPES, put_view, take

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
        tolerance = math.sqrt(EDITS_AGREE**2 + 4 * EDITS_AGREE * record.rounding) * record.edit_norm
        if float((E - again).norm()) <= tolerance:
            continue
        W_base = take(base, part).double()
        W_ft = take(ft, part).double()
        if record.alpha is None:
            good = _is_nearest(E, W_base, W_ft, record, torch.finfo(ft.dtype).eps if unit.change else 0.0)
        else:
            sides = (E - W_base) / record.alpha, (again - W_base) / record.alpha
            good = _is_certified(*sides, W_ft - W_base, record, power)
        if not good:
            return f"{record.part or 'the matrix'} is not the edit of these inputs"
    return None


def _is_certified(P: Tensor, again: Tensor, D: Tensor, record: TensorRecord, power: float) -> bool:
    """Whether another P = U_k S_k^power V_k^T than the one recomputed solves the same problem, which only a cut in a
    cluster allows.

    Both hold what storage lost. That moves the singular values by no more than its norm (Mirsky), and points anywhere,
    so that it adds to the objective one part in the root of the entries.
    """
    import torch

    assert record.k is not None and record.sigma_k is not None and record.sigma_next is not None
    if record.sigma_k - record.sigma_next > EDITS_AGREE * record.sigma_k:
        return False
    s, wanted = find_values(P), torch.ones(record.k, dtype=torch.float64)
    if power:
        wanted = find_values(D)[: record.k] ** power
    s[: record.k] -= wanted
    if float(s.norm()) > (EDITS_AGREE + (1 + ROUNDINGS_AGREE) * record.rounding) * float(wanted.norm()):
        return False
    objective = float((D * P).sum()) / float((D * again).sum())
    return abs(objective - 1) <= OBJECTIVE_BOUND + 8 * record.rounding * (1 + record.rounding) / math.sqrt(P.numel())


def is_open(record: TensorRecord) -> bool:
    """Whether several matrices with the base's singular values are as near to the fine-tuned one, as a warning says."""
    return record.method == "equivalence" and bool(record.warnings)


def _is_nearest(E: Tensor, W_base: Tensor, W_ft: Tensor, record: TensorRecord, merged: float) -> bool:
    """Whether another edited weight than the one recomputed has the singular values of the base and is as near to W_ft,
    where more than one is.

    Storage moves the singular values and the distance by no more than the norm of what it loses (Mirsky); an adapter's
    W_ft is known to `merged` of its norm.
    """
    assert record.distance is not None
    if not is_open(record):
        return False
    W_E = W_base + (E - W_base) / record.beta
    tolerance = (EDITS_AGREE + (1 + ROUNDINGS_AGREE) * record.rounding) * record.edit_norm / record.beta
    moved = float((find_values(W_E) - find_values(W_base)).norm())
    distance, allowed = float((W_E - W_ft).norm()), tolerance + merged * float(W_ft.norm())
    return moved <= tolerance and abs(distance - record.distance) <= allowed


def find_values(A: Tensor) -> Tensor:
    """Singular values of A, descending, by squares in float64."""
    import torch

    squares: Tensor = torch.linalg.eigvalsh(A.mT @ A if A.shape[0] >= A.shape[1] else A @ A.mT)
    return squares.clamp_(min=0.0).sqrt_().flip(0)
