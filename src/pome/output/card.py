"""The model card (README.md) of an output: metadata for the Hub, what was edited, how to do it again.

It names repositories and commits, never paths of this machine, and depends on nothing but the manifest and FT's card.
"""

from __future__ import annotations

import re
import shlex
import statistics
from typing import Any

import yaml

from pome.checkpoint.leftovers import ADAPTER_WEIGHTS
from pome.checkpoint.source import Checkpoint, read_beside
from pome.config.conflicts import NUMBER_OF
from pome.config.extraction import ExtractSpec, find_spec_class
from pome.config.options import as_flag, find_options
from pome.config.yaml_text import compose
from pome.manifest import Manifest, SideRecord, TensorRecord, show_median

CARD_NAME = "README.md"
PAPER = "https://arxiv.org/abs/2510.06627"
POET = "https://arxiv.org/abs/2506.08001"
TAGS = ("pome", "model-editing")
LORA_TAGS = ("lora", "transformers")  # as PEFT tags an adapter that it saves
# Fields that stay true of the edited model. Results (`model-index`) do not: they were measured on FT.
_CARRIED = ("language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "datasets")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LOCAL_VALUE = re.compile(r"[/~.\\]|[A-Za-z]:\\|file:")
# Training scripts write where they ran: `/data/llama` by itself, or as a link to huggingface.co//data/llama.
_LOCAL_LINK = re.compile(r"\]\(https?://huggingface\.co/[/~.][^)\s]*\)")
_LOCAL_PATH = re.compile(r"(?<![\w/:<.~-])(?:file://|~|[A-Za-z]:)?[/\\](?:[\w.@+ -]*[\w.@+-][/\\])+([\w.@+-]*)")
_NOT_OPTIONS = ("device", "engine", "overrides")  # options of where it is computed, and those that only a file can give


def make_card(manifest: Manifest, ft_card: str | None) -> str:
    """The card of an edit, from its records and the text of FT's own card, if it has one."""
    return assemble_card(manifest, ft_card, [_introduce(manifest), _describe_edits(manifest)])


def read_ft_card(ft: Checkpoint) -> str | None:
    """The text of FT's own card, if it has one. Raises CheckpointError."""
    raw = read_beside(ft, CARD_NAME)
    return raw.decode("utf-8", "replace") if raw is not None else None


def assemble_card(manifest: Manifest, ft_card: str | None, sections: list[str], **metadata: Any) -> str:
    """A card's text: metadata, some sections, the command, and FT's card; `metadata` fills in what FT's card lacks."""
    from huggingface_hub import ModelCard

    theirs, body = _read_card(ft_card or "")
    sections = [*sections, _tell_command(manifest)]
    if body.strip():
        text = body.strip() if manifest.fine_tuned.on_hub else _hide_paths(body.strip())
        sections.append(f"## Card of the fine-tuned model\n\n{text}")
    text = "\n\n".join(sections)
    return str(ModelCard(f"---\n{_make_metadata(manifest, {**metadata, **theirs})}\n---\n\n{text}\n"))


def _read_card(text: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card and the text below it. Metadata that cannot be read is none."""
    from huggingface_hub import ModelCard

    text = text.replace("\r\n", "\n").lstrip("\ufeff")
    if not text.lstrip().startswith("---"):
        return {}, text
    try:
        compose(text.lstrip().removeprefix("---").partition("\n---")[0])
        card = ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}, text.lstrip().removeprefix("---").partition("\n---")[2].lstrip("-")
    return {key: value for key, value in vars(card.data).items() if value is not None}, card.text


def _make_metadata(manifest: Manifest, theirs: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    kept = {key: _drop_local(theirs[key]) for key in theirs if key in _CARRIED or key.startswith("extra_gated_")}
    tags = theirs.get("tags")
    tags = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    extracted = find_spec_class(manifest.spec) is ExtractSpec
    adapter = extracted or manifest.spec["out_format"] == "adapter"
    # An adapter's base is the model that it goes on, not the adapter that it was.
    sides = (manifest.base,) if adapter else (manifest.fine_tuned, manifest.base)
    parents = [side.repository for side in sides if side.repository][:1]
    parents = parents or _read_parents(theirs.get("base_model"))
    fields = {key: value for key, value in kept.items() if value not in (None, [], "")}
    if adapter:
        fields["library_name"] = "peft"
    elif _is_adapter(manifest) and fields.get("library_name") == "peft":
        del fields["library_name"]  # the adapter has become a whole model
    data = ModelCardData(
        base_model=parents or None,
        base_model_relation=("adapter" if adapter else "finetune") if parents else None,
        tags=list(dict.fromkeys([*tags, *(LORA_TAGS if extracted else ()), *TAGS])),
        ignore_metadata_errors=True,
        **fields,
    )
    return str(data.to_yaml())


def _read_parents(value: object) -> list[str]:
    """The Hub ids among what FT's card says it was made from."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and _HUB_ID.fullmatch(text)]


def _drop_local(value: Any) -> Any:
    if isinstance(value, list):
        return [item for item in map(_drop_local, value) if item is not None]
    return None if isinstance(value, str) and _LOCAL_VALUE.match(value) else value


def _is_adapter(manifest: Manifest) -> bool:
    """Whether FT was one."""
    return ADAPTER_WEIGHTS in manifest.fine_tuned.files


def _introduce(manifest: Manifest) -> str:
    ft = manifest.fine_tuned.repository
    title = f"{ft.rpartition('/')[2]}, edited by POME" if ft else "A model edited by POME"
    count = len(manifest.tensors)
    what = "the update of 1 matrix" if count == 1 else f"the updates of {count} matrices"
    rest = "Every other byte of the weights is the fine-tuned model's."
    if manifest.spec["out_format"] == "adapter":
        rest = "It is an adapter as before; its other modules are unchanged."
    elif _is_adapter(manifest):
        rest = "The adapter is merged: its other modules as PEFT merges them, every other byte is the base model's."
    used = "No data and no training were used."
    if manifest.sweep is not None:
        tried = sum(item["params"] is not None for item in manifest.sweep["candidates"])
        used = f"No training was used; the options are the best of {tried} by their scores (see the manifest)."
    return (
        f"# {title}\n\n{link(manifest.fine_tuned, 'The fine-tuned model')} with {what} since "
        f"{link(manifest.base, 'the pretrained model')} {_describe_weights(manifest)}. {used} {rest}"
    )


def _describe_weights(manifest: Manifest) -> str:
    """Sentences on the effect on each weight, or on the singular directions of its update."""
    spec = manifest.spec
    methods = {record.method for record in manifest.tensors} or {spec["method"]}
    matched = (
        f"edited by orthogonal equivalence (POET, [arXiv 2506.08001]({POET})): they have the singular values of the "
    )
    matched += "pretrained weights and the singular directions of the fine-tuned ones"
    if methods == {"equivalence"}:
        return matched
    if "equivalence" in methods:
        return f"edited, some {matched.removeprefix('edited ')}; the others {describe_directions(spec)}"
    return describe_directions(spec)


def describe_directions(spec: dict[str, Any]) -> str:
    """Sentences on the effect of POME on the singular directions of each update."""
    powers = {options["power"] for options in (spec, *spec["overrides"]) if "power" in options} or {0.0}
    by = f"by POME ([arXiv 2510.06627]({PAPER})): the leading singular directions of each update are kept and"
    if powers == {0.0}:
        return f"equalized {by} given one weight"
    return f"edited {by} weighted by their singular values to the power {' or '.join(f'{p:g}' for p in sorted(powers))}"


def link(side: SideRecord, otherwise: str) -> str:
    """A link to an input on the Hub, or a word for one on this machine."""
    if side.repository is None:
        return otherwise
    return f"[{side.repository}](https://huggingface.co/{side.repository}/tree/{side.revision})"


def _describe_edits(manifest: Manifest) -> str:
    by_role: dict[tuple[str, tuple[int, int]], list[TensorRecord]] = {}
    for record in manifest.tensors:
        by_role.setdefault((record.role, record.shape), []).append(record)
    lines = [
        "## What was edited",
        "",
        "| role | matrices | shape | rank | k | alpha | beta | energy kept | norm of edit / of update |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (role, (m, n)), records in by_role.items():
        columns = {"rank": ".0f", "k": ".0f", "alpha": ".4g", "beta": "g", "energy_kept": ".3f"}
        middle = " | ".join(show_median(records, key, form) for key, form in columns.items())
        ratio = statistics.median(record.edit_norm / record.delta_norm for record in records)
        lines.append(f"| {role} | {len(records)} | {m} x {n} | {middle} | {ratio:.3f} |")
    lines += ["", "Medians over the matrices of a row. `pome_manifest.json` has every matrix and each file's hash."]
    return "\n".join(lines)


def _tell_command(manifest: Manifest) -> str:
    sides = [manifest.base.name("BASE"), manifest.fine_tuned.name("FT")]
    overrides = manifest.spec["overrides"]
    verb = "extract" if find_spec_class(manifest.spec) is ExtractSpec else "edit"
    config = ["--config", f"{verb}.yaml"] if overrides else []
    command = shlex.join(["pome", verb, *sides, "OUT", *_list_options(manifest.spec), *config])
    check = shlex.join(["pome", "verify", "OUT", "--base", sides[0], "--ft", sides[1]])
    version = manifest.pome_version
    text = f"## Do it again\n\n```\npip install pome-edit=={version}\n{command}\n{check}\n```"
    if overrides:  # which no option of the command line can say
        text += f"\n\nwith `{verb}.yaml`:\n\n```yaml\n{yaml.safe_dump({'overrides': overrides}, sort_keys=False)}```"
    return text


def _list_options(spec: dict[str, Any]) -> list[str]:
    """The options of the command line that differ from their defaults, in the order of the spec."""
    known = find_options(find_spec_class(spec))
    options: list[str] = []
    for key, value in spec.items():
        default = known[key].default
        implied = key == "rank_rule" and value == "fixed"
        idle = key in NUMBER_OF.values() and key != NUMBER_OF.get(spec["rank_rule"])  # the command line refuses it
        same = (tuple(value) if isinstance(value, list) else value) == default
        if same or value is None or implied or idle or key in _NOT_OPTIONS:
            continue
        if isinstance(value, bool):
            options += [as_flag(key)]
        else:
            for item in value if isinstance(value, list) else [value]:
                options += [as_flag(key), str(item)]
    return options


def _hide_paths(text: str) -> str:
    """The text with the paths of a machine cut down to their last names."""
    return _LOCAL_PATH.sub(lambda match: match[1] or "...", _LOCAL_LINK.sub("]", text))
