"""Every feature of a PEFT LoRA on tiny models of many architectures: pome's two outputs held to PEFT's own merge."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pome
from pome import EditSpec, PomeError
from pome.roles.layout import Part
from pome.roles.roles import find_layout
from support.adapters import quietly
from support.checkpoints import read_tensors
from support.reference import reference_edit
from support.tiny_models import tiny_config, tiny_model

ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "falcon": "FalconForCausalLM",
    "bloom": "BloomForCausalLM",
    "opt": "OPTForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "jamba": "JambaForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "vit": "ViTForImageClassification",
}
LAYERS = ("ffn", "attention", "re:embed|wte|shared")
RANK = 4

Options = dict[str, Any]
Feature = Callable[[Any], "Options | None"]


@dataclass(frozen=True)
class Cell:
    """The result of one feature on one architecture: `right`, `full only`, `refused`, `wrong` or `-`."""

    architecture: str
    feature: str
    verdict: str
    why: str = ""


def list_linear(model: Any) -> dict[str, nn.Module]:
    """The linear modules inside the layers of a model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and re.search(r"\.\d+\.", name) and "router" not in name
    }


def leaves(model: Any) -> list[str]:
    """Endings that target the linear modules of every layer, and nothing outside of layers."""
    return sorted({re.split(r"\.\d+\.", name)[-1] for name in list_linear(model)})


def stacks(model: Any) -> list[str]:
    """Endings that target the stacked experts of every layer."""
    names = [name for name, weight in model.named_parameters() if weight.ndim == 3 and "experts" in name]
    return sorted({".".join(name.split(".")[-2:]) for name in names if name.endswith("_proj")})


def find_embedding(model: Any) -> str | None:
    """The ending of the input embedding's name."""
    with_name = {id(module): name for name, module in model.named_modules()}
    try:
        return with_name[id(model.get_input_embeddings())].split(".")[-1]
    except (KeyError, NotImplementedError):
        return None


def is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def find_head(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name.split(".")[-1] for name, module in model.named_modules() if module is head), None)


def with_patterns(model: Any, regular: bool) -> Options:
    names = [name for name, _ in list_linear(model).items()]
    first, last = names[0], names[-1]
    leaf = re.escape(re.split(r"\.\d+\.", last)[-1])
    keys = (rf".*\.{leaf}", rf"(.+\.)?{re.escape(first)}") if regular else (re.split(r"\.\d+\.", last)[-1], first)
    return {
        "target_modules": leaves(model),
        "rank_pattern": {keys[0]: 6, keys[1]: 2},
        "alpha_pattern": {keys[1]: 3, keys[0]: 11},
    }


def on_parameters(model: Any) -> Options:
    """Stacks of experts; where there are none, weights of linear modules by their own names."""
    if stacks(model):
        return {"target_modules": [], "target_parameters": stacks(model)}
    weights = [name for name, module in list_linear(model).items() if isinstance(module, nn.Linear)]
    return {"target_modules": [], "target_parameters": [f"{name}.weight" for name in weights[:3]]} if weights else None  # type: ignore[return-value]


def on_experts_as_linear(model: Any) -> Options | None:
    """What PEFT makes of the leaves of single experts, where it knows how transformers packs them."""
    kind = {"mixtral": ["w1", "w2", "w3"]}.get(model.config.model_type, ["gate_proj", "up_proj", "down_proj"])
    return {"target_modules": kind} if stacks(model) else None


def tied(model: Any, options: Options) -> Options | None:
    embedding = find_embedding(model)
    return {**options, "ensure_weight_tying": True} if embedding and is_tied(model) else None


FEATURES: dict[str, Feature] = {
    "plain": lambda m: {"target_modules": leaves(m)},
    "rslora": lambda m: {"target_modules": leaves(m), "use_rslora": True},
    "patterns": lambda m: with_patterns(m, regular=False),
    "regular expressions": lambda m: with_patterns(m, regular=True),
    "dora": lambda m: {"target_modules": leaves(m), "use_dora": True},
    "fan_in_fan_out": lambda m: {"target_modules": leaves(m), "fan_in_fan_out": True},
    "parameters": on_parameters,
    "parameters, rslora": lambda m: (
        {**on_parameters(m), "use_rslora": True, "alpha_pattern": {"down_proj": 5}} if stacks(m) else None
    ),
    "experts, new names": on_experts_as_linear,
    "experts, own keys": lambda m: {"target_modules": leaves(m)},
    "experts, own keys, patterns": lambda m: {"target_modules": leaves(m), "alpha_pattern": {"(down_proj|w2)": 9}},
    "whole head": lambda m: {"target_modules": leaves(m), "modules_to_save": [find_head(m)]} if find_head(m) else None,
    "whole embedding": lambda m: (
        {"target_modules": leaves(m), "modules_to_save": [find_embedding(m)]} if find_embedding(m) else None
    ),
    "embedding": lambda m: {"target_modules": [*leaves(m), find_embedding(m)]} if find_embedding(m) else None,
    "tokens": lambda m: (
        {"target_modules": leaves(m), "trainable_token_indices": [1, 7, 5]} if find_embedding(m) else None
    ),
    "tied whole": lambda m: tied(m, {"target_modules": leaves(m), "modules_to_save": [find_embedding(m)]}),
    "bias": lambda m: {"target_modules": leaves(m), "bias": "lora_only"},
    "all biases": lambda m: {"target_modules": leaves(m), "bias": "all"},
    "lora_bias": lambda m: {"target_modules": leaves(m), "lora_bias": True, "bias": "lora_only"},
    "layers_to_transform": lambda m: {"target_modules": leaves(m), "layers_to_transform": [1]},
    "exclude_modules": lambda m: {"target_modules": leaves(m), "exclude_modules": leaves(m)[:1]},
    "orthogonal": lambda m: {"target_modules": leaves(m), "init_lora_weights": "orthogonal"},
    "gaussian": lambda m: {"target_modules": leaves(m), "init_lora_weights": "gaussian"},
    "all-linear": lambda m: {"target_modules": "all-linear"},
    "classifier": lambda m: {"target_modules": leaves(m), "task_type": "SEQ_CLS"},
    "another vocabulary": lambda m: (
        {"target_modules": leaves(m), "modules_to_save": [find_embedding(m), find_head(m)]}
        if find_embedding(m) and find_head(m) and not is_tied(m)
        else None
    ),
}


def survey_cell(architecture: str, feature: str, folder: Path) -> Cell:
    """Make a base and an adapter with PEFT, edit it in both forms, and hold the outputs to PEFT's merge."""

    def cell(verdict: str, why: object = "") -> Cell:
        return Cell(architecture, feature, verdict, " ".join(str(why).split())[:200])

    shutil.rmtree(folder, ignore_errors=True)
    base, adapter = folder / "base", folder / "adapter"
    with quietly():
        model = tiny_model(ARCHITECTURES[architecture], tiny_config(architecture))
        kind = type(model)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.normal_(std=0.1)
        model.save_pretrained(base)
        try:
            if feature == "classifier":
                kind = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(model.config)]
                model = kind.from_pretrained(base)
            elif feature == "another vocabulary":
                model.resize_token_embeddings(103)
            options = FEATURES[feature](model)
            if options is None or not (options["target_modules"] or options.get("target_parameters")):
                return cell("-")
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=7, **options))
        except (ValueError, KeyError, TypeError, NotImplementedError, AttributeError) as error:
            return cell("-", f"PEFT: {error}")
        randomize(adapted)
        adapted.save_pretrained(adapter)
    if feature.startswith("experts, own keys") and not add_own_experts(base, adapter):
        return cell("-")
    try:
        full = pome.edit(base, adapter, folder / "full", EditSpec(layers=LAYERS))
    except PomeError as error:
        full = error
    try:
        made = pome.edit(base, adapter, folder / "made", EditSpec(layers=LAYERS, out_format="adapter"))
    except PomeError as error:
        made = error
    if isinstance(full, PomeError) and isinstance(made, PomeError):
        return cell("refused", full)
    said = ""
    try:
        merged = merge(kind, base, adapter, folder / "merged", feature)
    except Exception as error:  # PEFT cannot load what it wrote
        return cell("-", f"PEFT: {error}")
    if feature.startswith("experts, own keys") and not moves_experts(read_tensors(base), merged):
        return cell("-", "PEFT drops the LoRAs of single experts")
    if not isinstance(full, PomeError):
        said = compare_full(base, folder / "full", merged, full)
    if not said and not isinstance(made, PomeError):
        try:
            again = merge(kind, base, folder / "made", folder / "again", feature)
        except Exception as error:
            return cell("wrong", f"PEFT does not load the edited adapter: {error}")
        wanted = None if isinstance(full, PomeError) else read_tensors(folder / "full")
        said = compare_adapters(read_tensors(base), merged, again, wanted, made)
    if not said and not isinstance(made, PomeError):
        verdict = pome.verify(folder / "made", base, adapter)
        said = "" if verdict.ok else f"verify: {verdict.differences[0]}"
    if said:
        return cell("wrong", said)
    if isinstance(full, PomeError):
        return cell("adapter only", full)
    return cell("full only", made) if isinstance(made, PomeError) else cell("right")


def randomize(adapted: Any) -> None:
    """Random factors, and a random step of whatever else is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                step = torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.1
                weight.copy_(step if ".lora_" in name and "magnitude" not in name else weight + step)


def add_own_experts(base: Path, adapter: Path) -> bool:
    """Add LoRAs of single experts, as PEFT wrote them where transformers held experts one by one."""
    experts = {n: t for n, t in read_tensors(base).items() if re.search(r"\.experts\.\d+\.[^.]+\.weight$", n)}
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in experts.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora"
        tensors[f"{key}_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator) * 0.1
        tensors[f"{key}_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = sorted({*config["target_modules"], *(name.split(".")[-2] for name in experts)})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return bool(experts)


def moves_experts(base: dict[str, Tensor], merged: dict[str, Tensor]) -> bool:
    """Whether PEFT's merge changes the experts."""
    return any(not torch.equal(merged[name], tensor) for name, tensor in base.items() if ".experts." in name)


def merge(kind: Any, base: Path, adapter: Path, folder: Path, feature: str) -> dict[str, Tensor]:
    """The tensors of the model that PEFT merges, as transformers saves them."""
    with quietly():
        model = kind.from_pretrained(base, dtype=torch.float32)
        if feature == "another vocabulary":
            model.resize_token_embeddings(103)
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(folder)
    known, tensors = read_tensors(base), read_tensors(folder)
    # A model for a task may have the base as a module of its own.
    return {name.removeprefix("transformer.") if name not in known else name: t for name, t in tensors.items()}


def cut(tensor: Tensor, layout: Any, part: Part) -> Tensor:
    """The stored entries of a part, as one 2-D tensor."""
    if part.block is None:
        return tensor
    block = part.block
    split = tensor.unflatten(block.axis, (block.count, block.period)).narrow(block.axis + 1, block.start, block.size)
    return split.flatten(block.axis, block.axis + 1)


def compare_full(base: Path, out: Path, merged: dict[str, Tensor], manifest: Any) -> str:
    """What is wrong with a full output: edited matrices are W_base + the edit, all else is as PEFT merges it."""
    before, after = read_tensors(base), read_tensors(out)
    config = json.loads((base / "config.json").read_text())
    if missing := before.keys() - after.keys():
        return f"{min(missing)} is missing"
    rest = {name: tensor.clone() for name, tensor in after.items()}
    for record in manifest.tensors:
        layout = find_layout(record.name, tuple(before[record.name].shape), config)
        expert = re.match(r"expert=(\d+),?", record.part or "")
        label = (record.part or "").removeprefix(expert[0] if expert else "") or None
        sides = [tensors[record.name] for tensors in (before, merged, after, rest)]
        sides = [side[int(expert[1])] for side in sides] if expert and layout.stacked else sides
        label = record.part if expert and not layout.stacked else label
        part = next((part for part in layout.parts if part.label == label), Part(record.role))
        W, M, E = (cut(side, layout, part).double() for side in sides[:3])
        wanted = reference_edit(M - W, k=record.k).value
        # The delta of two float32 weights is known to 1e-7 of the weights, which are at most some times larger.
        if float((E - W - wanted).norm()) > 1e-3 * float(wanted.norm()):
            return f"{record.name} {record.part}: {float((E - W - wanted).norm() / wanted.norm()):.1e} off the edit"
        if record.solver == "factors" and record.k > RANK * 2:
            return f"{record.name}: k is {record.k}"
        mask = torch.ones_like(sides[3], dtype=torch.bool)
        if part.block is not None:
            b = part.block
            mask.unflatten(b.axis, (b.count, b.period)).narrow(b.axis + 1, b.start, b.size).fill_(False)
        else:
            mask.fill_(False)
        sides[3].copy_(torch.where(mask, sides[3], sides[1].to(sides[3].dtype)))
    for name, tensor in rest.items():
        if name not in merged and name in before and torch.equal(tensor, before[name]):
            continue  # the head that a classifier does not have
        if name not in merged:
            return f"{name} is not in PEFT's model"
        room = 1e-6 * float(merged[name].abs().max()) + 1e-9
        if tensor.shape != merged[name].shape or float((tensor - merged[name]).abs().max()) > room:
            return f"{name} is not as PEFT merges it"
    if lost := {n for n in merged.keys() - after.keys() if n in before}:
        return f"{min(lost)} is lost"
    return ""


def compare_adapters(
    base: dict[str, Tensor],
    merged: dict[str, Tensor],
    again: dict[str, Tensor],
    full: dict[str, Tensor] | None,
    manifest: Any,
) -> str:
    """What is wrong with an edited adapter: PEFT merges it to something else than the full output.

    Tensors that were not edited are to be as before. Where there is no full output, the edited deltas are to have the
    length that the manifest says.
    """
    edited = {record.name for record in manifest.tensors}
    for name, tensor in again.items():
        if name not in base and name not in (full or {}):
            continue  # made anew when the model was loaded
        # A tensor that the adapter holds whole is edited in the full form alone.
        wanted = (full or {}).get(name) if name in edited else merged[name]
        if wanted is None:
            change = float((tensor.double() - base[name].double()).norm())
            norms = [record.edit_norm for record in manifest.tensors if record.name == name]
            if len(norms) == 1 and abs(change - norms[0]) > 1e-3 * norms[0]:
                return f"{name}: its delta is {change:.3g} long, not {norms[0]:.3g}"
            continue
        step = float((wanted - base[name]).abs().max()) if name in base and wanted.shape == base[name].shape else 0.0
        if tensor.shape != wanted.shape or float((tensor - wanted).abs().max()) > 1e-4 * step + 2e-6:
            return f"{name}: PEFT merges the edited adapter to something else"
    return "" if manifest.tensors else "nothing was edited"


def format_table(cells: list[Cell]) -> str:
    """The results as Markdown: a row for each feature, a column for each verdict, and the reasons below."""
    verdicts = ("right", "full only", "adapter only", "refused", "wrong", "-")
    names = list(dict.fromkeys(cell.architecture for cell in cells))
    lines = [
        "# LoRA features of PEFT on tiny models",
        "",
        f"From `scripts/survey_lora.py` with transformers {transformers.__version__} and PEFT {peft.__version__}. "
        "*right*: the full output is W_base + edit, and PEFT merges the edited adapter to it; *full only*: the adapter "
        "form is refused; *adapter only*: the full form is; *-*: the model or PEFT has no such thing.",
        "",
        f"{len(names)} architectures: {', '.join(names)}.",
        "",
        f"| feature | {' | '.join(verdicts)} |",
        "|---|" + "---|" * len(verdicts),
    ]
    for feature in dict.fromkeys(cell.feature for cell in cells):
        mine = [cell for cell in cells if cell.feature == feature]
        lines.append(f"| {feature} | {' | '.join(str(sum(c.verdict == v for c in mine) or '') for v in verdicts)} |")
    total = [str(sum(cell.verdict == verdict for cell in cells)) for verdict in verdicts]
    lines += [f"| all | {' | '.join(total)} |", "", "| feature | architecture | verdict | why |", "|---|---|---|---|"]
    lines += [
        f"| {cell.feature} | {cell.architecture} | {cell.verdict} | {shorten(cell.why)} |"
        for cell in cells
        if cell.verdict != "right" and not (cell.verdict == "-" and not cell.why)
    ]
    return "\n".join(lines) + "\n"


def shorten(why: str) -> str:
    """A reason without the folder of the run."""
    return re.sub(r"\S*/(?=(base|adapter|full|made)\b)", "", why).replace("|", "/")
