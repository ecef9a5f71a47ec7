"""The model card of an extracted adapter: what it holds of FT's update, what it does not, and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pome.errors import printable
from pome.manifest import LostRecord, Manifest, TensorRecord, show_median
from pome.output.card import assemble_card, describe_directions, link

CAUSAL = "AutoModelForCausalLM"
_NAMED = 5  # of what is lost, by reason
_BEST = {"power": 1.0, "scale": "unit", "beta": 1.0}  # the options that make it the best approximation


@dataclass(frozen=True)
class Energy:
    """Energy kept of some matrices: the share of the squared norm of their updates that is in the directions kept, over
    all of them, and the matrix that keeps the least."""

    records: Sequence[TensorRecord]
    kept: float
    least: TensorRecord


@dataclass(frozen=True)
class Lost:
    """Changes that an adapter does not hold for one reason, the largest first, and the norm of all of them."""

    reason: str
    records: Sequence[LostRecord]
    norm: float


def find_energy(record: TensorRecord) -> float:
    """Share of the squared norm that a LoRA keeps, which every record of an extraction has."""
    return record.energy_kept or 0.0


def sum_energy(records: Sequence[TensorRecord]) -> Energy:
    total = sum(record.delta_norm**2 for record in records)
    kept = sum(find_energy(record) * record.delta_norm**2 for record in records)
    return Energy(records, kept / total if total else 1.0, min(records, key=find_energy))


def sum_energy_by_role(manifest: Manifest) -> dict[str, Energy]:
    roles: dict[str, list[TensorRecord]] = {}
    for record in manifest.tensors:
        roles.setdefault(record.role, []).append(record)
    return {role: sum_energy(records) for role, records in roles.items()}


def group_lost(manifest: Manifest) -> list[Lost]:
    """What is lost by reason, the largest first."""
    groups: dict[str, list[LostRecord]] = {}
    for record in sorted(manifest.lost, key=lambda record: -record.norm):
        groups.setdefault(record.reason, []).append(record)
    found = (
        Lost(reason, records, float(sum(record.norm**2 for record in records) ** 0.5))
        for reason, records in groups.items()
    )
    return sorted(found, key=lambda lost: -lost.norm)


def make_extract_card(manifest: Manifest, ft_card: str | None, model_class: str | None) -> str:
    """The card's text, from the records of the extraction, the text of FT's own card, and the class that loads BASE."""
    model_class = model_class or CAUSAL
    sections = [_introduce(manifest), _describe_kept(manifest), _describe_lost(manifest)]
    sections.append(_tell_loading(manifest, model_class))
    metadata = {"pipeline_tag": "text-generation"} if model_class == CAUSAL else {}  # as PEFT says of its own
    return assemble_card(manifest, ft_card, sections, **metadata)


def _introduce(manifest: Manifest) -> str:
    ft = manifest.fine_tuned.repository
    title = f"The update of {ft.rpartition('/')[2] if ft else 'a fine-tuned model'} as a LoRA"
    ranks = sorted({record.k for record in manifest.tensors if record.k})
    ranked = f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    if manifest.spec["uniform_rank"] and len(ranks) > 1:
        ranked += f", filled up with zeros to {ranks[-1]},"
    count = len(manifest.tensors)
    what = "the update of 1 matrix" if count == 1 else f"the updates of {count} matrices"
    return (
        f"# {title}\n\nA PEFT LoRA{ranked} for {link(manifest.base, 'the pretrained model')}. It holds {what} of "
        f"{link(manifest.fine_tuned, 'the fine-tuned model')}, {_describe_update(manifest.spec)}. No data and no "
        "training were used."
    )


def _describe_update(spec: dict[str, Any]) -> str:
    options = (spec, *spec["overrides"])
    if all(given.get(key, best) == best for given in options for key, best in _BEST.items()):
        return "each as its best approximation of that rank (a truncated singular value decomposition)"
    return f"each {describe_directions(spec)}"


def _describe_kept(manifest: Manifest) -> str:
    lines = ["## What it holds", ""]
    if manifest.tensors:
        lines += ["| role | matrices | k | energy kept | least |", "| --- | --- | --- | --- | --- |"]
    for role, energy in sum_energy_by_role(manifest).items():
        k, least = show_median(energy.records, "k", ".0f"), find_energy(energy.least)
        lines.append(f"| {role} | {len(energy.records)} | {k} | {energy.kept:.3f} | {least:.3f} |")
    if manifest.tensors:
        said = f"{sum_energy(manifest.tensors).kept:.3f} over all of them; k is a median"
        lines += ["", f"Energy kept is the share of the squared norm of the updates: {said}."]
        lines.append("`pome_manifest.json` has every matrix and each file's hash.")
    else:
        lines.append("No LoRA: no selected matrix changed.")
    if manifest.saved:
        whole = "1 tensor of FT" if len(manifest.saved) == 1 else f"{len(manifest.saved)} tensors of FT"
        lines += [
            "",
            f"{whole}, neither approximated nor scaled (`modules_to_save`): {_join(map(_quote, manifest.saved))}.",
        ]
    return "\n".join(lines)


def _describe_lost(manifest: Manifest) -> str:
    lines = ["## What it does not hold", ""]
    if not manifest.lost:
        return "\n".join([*lines, "Nothing but what the ranks above leave out."])
    for lost in group_lost(manifest):
        count = "1 tensor" if len(lost.records) == 1 else f"{len(lost.records)} tensors"
        named = _join(f"{_quote(one.name)} {one.norm:.3g}, {one.share:.2g} of BASE's" for one in lost.records)
        lines.append(f"- {count} changed by a norm of {lost.norm:.3g}: {printable(lost.reason, 400)} ({named})")
    return "\n".join(lines)


def _join(items: Iterable[str]) -> str:
    """The first of some items, and how many more there are."""
    shown = list(items)
    more = f"; and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return "; ".join(shown[:_NAMED]) + more


def _quote(name: str) -> str:
    """A name that a stranger chose, as code that ends where it should."""
    return "`" + printable(name).replace("`", "'") + "`"


def _tell_loading(manifest: Manifest, model_class: str) -> str:
    base = manifest.base
    source = f'"{base.repository}", revision="{base.revision}"' if base.on_hub else '"BASE"'
    lines = [
        "from peft import PeftModel",
        f"from transformers import {model_class}",
        f"model = {model_class}.from_pretrained({source})",
        'model = PeftModel.from_pretrained(model, "OUT")',
    ]
    notices = (f"{notice}." for notice in manifest.notices if notice.startswith("OUT "))
    said = ["OUT is this repository, or a folder with its files. The tokenizer is the fine-tuned model's.", *notices]
    return "## Load it\n\n```python\n" + "\n".join(lines) + "\n```\n\n" + " ".join(said)
