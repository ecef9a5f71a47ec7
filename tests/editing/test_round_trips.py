"""What transformers saves, pome edits and transformers loads again: experts, fused halves, encoders, decoders.

Every matrix of a case is listed twice, by the record that the manifest must hold and by the parameter of the loaded
module that it ends in; the two spellings differ where transformers converts checkpoints as it reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import pome
from support.checkpoints import assert_only_edited, count_ulps, read_tensors
from support.quick import sample
from support.reference import reference_edit

View = Callable[[Tensor], Tensor]
# No two sizes are equal, nor is one twice another: a matrix cut or turned the wrong way has another shape.
HIDDEN, INNER, EXPERT, SHARED, HEAD, VOCAB, EXPERTS = 32, 72, 20, 28, 12, 60, 3
FT_SHIFT = 0.03
BETA = 0.1  # of the rms scale, whose alpha depends on which side is fan_out: a turned matrix is edited otherwise


@dataclass(frozen=True)
class Matrix:
    """One matrix: its record (tensor on disk, part, role), and where the loaded module has it, (fan_out, fan_in)."""

    name: str
    part: str | None
    role: str
    parameter: str
    view: View


@dataclass(frozen=True)
class Case:
    """A model with random weights; `matrices` was found by reading the model's code, not with the package."""

    model: str
    config: str
    sizes: Mapping[str, Any]
    matrices: tuple[Matrix, ...]
    inputs: Callable[[], dict[str, Tensor]]
    saving: Mapping[str, Any]


def whole(t: Tensor) -> Tensor:
    return t


def transposed(t: Tensor) -> Tensor:
    return t.T


def plain(name: str, role: str, view: View = whole) -> Matrix:
    return Matrix(name, None, role, name, view)


def expert(e: int, view: View = whole) -> View:
    return lambda t: view(t[e])


def rows(start: int, end: int) -> View:
    return lambda t: t[start:end]


def fused_experts(prefix: str, halves: Mapping[str, View], down: View) -> list[Matrix]:
    """Experts that are 3-D on disk as in the module."""
    found = []
    for e in range(EXPERTS):
        for half, view in halves.items():
            name = f"{prefix}.gate_up_proj"
            found.append(Matrix(name, f"expert={e},half={half}", half, name, expert(e, view)))
        found.append(Matrix(f"{prefix}.down_proj", f"expert={e}", "down", f"{prefix}.down_proj", expert(e, down)))
    return found


def single_experts(disk: str, names: Mapping[str, str], module: str) -> list[Matrix]:
    """Experts that are tensors of their own on disk and stacked in the module, (E, 2F, H) and (E, H, F)."""
    found = []
    for e in range(EXPERTS):
        for role, leaf in names.items():
            view = {"gate": rows(0, EXPERT), "up": rows(EXPERT, 2 * EXPERT), "down": whole}[role]
            stack = "down_proj" if role == "down" else "gate_up_proj"
            found.append(Matrix(f"{disk}.{e}.{leaf}.weight", None, role, f"{module}.{stack}", expert(e, view)))
    return found


def gated(prefix: str) -> list[Matrix]:
    return [plain(f"{prefix}.{role}_proj.weight", role) for role in ("gate", "up", "down")]


def both_layers(make: Callable[[int], list[Matrix]]) -> tuple[Matrix, ...]:
    return (*make(0), *make(1))


OUT_IN = {"gate": rows(0, EXPERT), "up": rows(EXPERT, 2 * EXPERT)}
CHUNKED: dict[str, View] = {"gate": lambda t: t[:, :EXPERT].T, "up": lambda t: t[:, EXPERT:].T}
INTERLEAVED: dict[str, View] = {"gate": lambda t: t[:, ::2].T, "up": lambda t: t[:, 1::2].T}
NAMED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def mixtral(i: int) -> list[Matrix]:
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return single_experts(f"model.layers.{i}.block_sparse_moe.experts", names, f"model.layers.{i}.mlp.experts")


def qwen2_moe(i: int) -> list[Matrix]:
    experts = f"model.layers.{i}.mlp.experts"
    return single_experts(experts, NAMED, experts) + gated(f"model.layers.{i}.mlp.shared_expert")


def qwen3_moe(i: int) -> list[Matrix]:
    experts = f"model.layers.{i}.mlp.experts"
    return gated(f"model.layers.{i}.mlp") if i == 0 else single_experts(experts, NAMED, experts)


def llama4(i: int) -> list[Matrix]:
    ffn = f"model.layers.{i}.feed_forward"
    if i == 0:
        return gated(ffn)
    return fused_experts(f"{ffn}.experts", CHUNKED, transposed) + gated(f"{ffn}.shared_expert")


def t5(*ffn: str) -> tuple[Matrix, ...]:
    roles = {"wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down"}
    places = [f"{side}.block.{i}.layer.{at}" for side, at in (("encoder", 1), ("decoder", 2)) for i in range(2)]
    return tuple(plain(f"{place}.DenseReluDense.{leaf}.weight", roles[leaf]) for place in places for leaf in ffn)


def token_ids(seed: int = 3, **shape: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(3, VOCAB, size, generator=generator) for name, size in shape.items()}


def text() -> dict[str, Tensor]:
    return token_ids(input_ids=(2, 11))


def two_texts() -> dict[str, Tensor]:
    return token_ids(input_ids=(2, 11), decoder_input_ids=(2, 7))


def picture() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def sound() -> dict[str, Tensor]:
    features = torch.randn(2, 10, 40, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, **token_ids(decoder_input_ids=(2, 7))}


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
TEXT = IDS | {
    "num_hidden_layers": 2, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 64,
}  # fmt: skip
MIXTRAL = TEXT | {"intermediate_size": EXPERT, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN_MOE = TEXT | {"moe_intermediate_size": EXPERT, "num_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN2_MOE = {key: value for key, value in QWEN_MOE.items() if key != "head_dim"}
LLAMA4 = TEXT | {
    "intermediate_size": EXPERT, "intermediate_size_mlp": INNER, "num_local_experts": EXPERTS,
    "interleave_moe_layer_step": 2,
}  # fmt: skip
GPT_OSS = MIXTRAL | {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
GPT2 = IDS | {"n_layer": 2, "n_embd": HIDDEN, "n_inner": INNER, "n_head": 4, "n_positions": 64}
T5 = IDS | {
    "d_model": HIDDEN, "d_kv": HEAD, "d_ff": INNER, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
VIT = {
    "num_hidden_layers": 2, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4, "num_labels": 5,
}  # fmt: skip
WHISPER = IDS | {
    "d_model": HIDDEN, "encoder_ffn_dim": INNER, "decoder_ffn_dim": 76, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 10, "max_source_positions": 20,
    "max_target_positions": 24, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
STACKED = {"save_original_format": False}  # as the module has them


def mixtral_stacked(i: int) -> list[Matrix]:
    return fused_experts(f"model.layers.{i}.mlp.experts", OUT_IN, whole)


def gpt_oss(i: int) -> list[Matrix]:
    return fused_experts(f"model.layers.{i}.mlp.experts", INTERLEAVED, transposed)


def phi3(i: int) -> list[Matrix]:
    name = f"model.layers.{i}.mlp.gate_up_proj.weight"
    halves = [
        Matrix(name, f"half={half}", half, name, rows(at * INNER, at * INNER + INNER))
        for at, half in enumerate(("gate", "up"))
    ]
    return [*halves, plain(f"model.layers.{i}.mlp.down_proj.weight", "down")]


def gpt2(i: int) -> list[Matrix]:
    mlp = f"transformer.h.{i}.mlp"
    return [plain(f"{mlp}.c_fc.weight", "up", transposed), plain(f"{mlp}.c_proj.weight", "down", transposed)]


def vit(i: int) -> list[Matrix]:
    module, disk = f"vit.layers.{i}.mlp", f"vit.encoder.layer.{i}"
    return [
        Matrix(f"{disk}.intermediate.dense.weight", None, "up", f"{module}.fc1.weight", whole),
        Matrix(f"{disk}.output.dense.weight", None, "down", f"{module}.fc2.weight", whole),
    ]


def whisper(i: int) -> list[Matrix]:
    places = [f"model.{side}.layers.{i}" for side in ("encoder", "decoder")]
    return [plain(f"{at}.{leaf}.weight", role) for at in places for leaf, role in (("fc1", "up"), ("fc2", "down"))]


def dense(i: int) -> list[Matrix]:
    return gated(f"model.layers.{i}.mlp")


CASES = {
    "mixtral": Case("MixtralForCausalLM", "MixtralConfig", MIXTRAL, both_layers(mixtral), text, {}),
    "mixtral-stacked": Case(
        "MixtralForCausalLM", "MixtralConfig", MIXTRAL, both_layers(mixtral_stacked), text, STACKED
    ),
    "qwen2-moe": Case(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN2_MOE | {"shared_expert_intermediate_size": SHARED},
        both_layers(qwen2_moe), text, {},
    ),
    "qwen3-moe": Case(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN_MOE | {"mlp_only_layers": [0]}, both_layers(qwen3_moe), text, {}
    ),
    "llama4": Case("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, both_layers(llama4), text, {}),
    "gpt-oss": Case("GptOssForCausalLM", "GptOssConfig", GPT_OSS, both_layers(gpt_oss), text, {}),
    # As published, where the experts are as wide as the model and only the architecture tells how they are stored.
    "gpt-oss-square": Case(
        "GptOssForCausalLM", "GptOssConfig", GPT_OSS | {"intermediate_size": HIDDEN}, both_layers(gpt_oss), text, {}
    ),
    "phi3": Case("Phi3ForCausalLM", "Phi3Config", TEXT, both_layers(phi3), text, {}),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", GPT2, both_layers(gpt2), text, {}),
    "gemma": Case("GemmaForCausalLM", "GemmaConfig", TEXT, both_layers(dense), text, {}),
    "gemma3": Case(
        "Gemma3ForCausalLM", "Gemma3TextConfig", TEXT | {"sliding_window": 8}, both_layers(dense), text, {}
    ),
    "t5": Case("T5ForConditionalGeneration", "T5Config", T5, t5("wi", "wo"), two_texts, {}),
    "t5-gated": Case(
        "T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"},
        t5("wi_0", "wi_1", "wo"), two_texts, {},
    ),
    "vit": Case("ViTForImageClassification", "ViTConfig", VIT, both_layers(vit), picture, {}),
    "whisper": Case(
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, both_layers(whisper), sound, {}
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two checkpoints as transformers wrote them."""

    case: Case
    base: Path
    ft: Path


@pytest.fixture(scope="module", params=sample(CASES, "mixtral", "qwen2-moe", "gpt-oss", "phi3", "gpt2", "t5-gated"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**case.sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)  # large enough for logits that a small edit moves visibly
        model.save_pretrained(folder / "base", **case.saving)
        for parameter in model.parameters():
            parameter.add_(FT_SHIFT * torch.randn_like(parameter))
        model.save_pretrained(folder / "ft", **case.saving)
    yield Pair(case, folder / "base", folder / "ft")


def load(folder: Path, case: Case) -> torch.nn.Module:
    kind = getattr(transformers, case.model)
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def edit_in_memory(pair: Pair, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, dict[Any, Any]]:
    """The fine-tuned module with the edit by definition, and (tensor, part) -> (role, fan_out and fan_in, k)."""
    base, ft = (dict(load(side, pair.case).named_parameters()) for side in (pair.base, pair.ft))
    edited = load(pair.ft, pair.case)
    parameters = dict(edited.named_parameters())
    records = {}
    for matrix in pair.case.matrices:
        W, fine_tuned = (matrix.view(side[matrix.parameter].detach()).double() for side in (base, ft))
        found = reference_edit(fine_tuned - W)
        P = found.value * math.sqrt(found.k) / found.value.norm()
        m, n = W.shape
        W = W + BETA * math.sqrt(m / n) * P
        target = parameters[matrix.parameter]
        numbers = matrix.view(torch.arange(target.numel()).reshape(target.shape))
        with torch.no_grad():
            target.view(-1)[numbers.reshape(-1)] = W.to(dtype).float().reshape(-1)
        records[matrix.name, matrix.part] = matrix.role, (m, n), found.k
    return edited, records


def compare_logits(pair: Pair, out: Path, wanted: torch.nn.Module) -> tuple[float, float]:
    """How far the logits of OUT, and those of FT, are from the wanted ones, relative to the largest."""
    with torch.no_grad():
        models = (load(out, pair.case), load(pair.ft, pair.case), wanted)
        made, before, expected = (model(**pair.case.inputs()).logits for model in models)
    reach = float(expected.abs().max())
    return float((made - expected).abs().max()) / reach, float((before - expected).abs().max()) / reach


def test_every_matrix_is_edited_as_in_memory_and_nothing_else(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = pome.edit(pair.base, pair.ft, out, pome.EditSpec(layers=("ffn",), scale="rms", beta=BETA))
    wanted, records = edit_in_memory(pair)
    assert {(r.name, r.part): (r.role, r.shape, r.k) for r in manifest.tensors} == records
    assert len(manifest.tensors) == len(pair.case.matrices) and not manifest.kept
    assert_only_edited(pair.ft, out, {matrix.name for matrix in pair.case.matrices})
    made, before = compare_logits(pair, out, wanted)
    # Float32 throughout two layers: some 1e-6 of the largest logit; 1e-4 is what the edit itself may be off.
    assert made <= 1e-4
    assert before >= 1e-2  # what is tested is seen by the logits


def test_every_matrix_gets_the_singular_values_of_its_base(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = pome.edit(pair.base, pair.ft, out, pome.EditSpec(layers=("ffn",), method="equivalence"))
    assert len(manifest.tensors) == len(pair.case.matrices) and not manifest.kept
    assert_only_edited(pair.ft, out, {matrix.name for matrix in pair.case.matrices})
    sides = [dict(load(side, pair.case).named_parameters()) for side in (pair.base, pair.ft, out)]
    for matrix in pair.case.matrices:
        base, ft, made = (matrix.view(side[matrix.parameter].detach()).double() for side in sides)
        U, _, Vh = torch.linalg.svd(ft, full_matrices=False)
        wanted = (U * torch.linalg.svdvals(base)) @ Vh
        assert float((made - wanted).norm() / wanted.norm()) <= 1e-6  # rounded to float32 once
        assert float((ft - wanted).norm() / wanted.norm()) >= 1e-4
    assert pome.verify(out, pair.base, pair.ft, full=True).ok


@pytest.mark.parametrize("pair", ["qwen2-moe", "llama4", "gpt-oss"], indirect=True)
def test_experts_written_in_bfloat16(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec = pome.EditSpec(layers=("ffn",), scale="rms", beta=BETA, dtype="bfloat16")
    manifest = pome.edit(pair.base, pair.ft, out, spec)
    wanted, records = edit_in_memory(pair, torch.bfloat16)
    assert {(r.name, r.part): (r.role, r.shape, r.k) for r in manifest.tensors} == records
    assert {r.dtype for r in manifest.tensors} == {"BF16"}
    edited = {matrix.name for matrix in pair.case.matrices}
    ft = read_tensors(pair.ft)
    for name, tensor in read_tensors(out).items():
        if name not in edited:
            assert tensor.dtype == torch.float32 and tensor.equal(ft[name])
    with safe_open(out / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in edited)
    parameters, loaded = (dict(model.named_parameters()) for model in (wanted, load(out, pair.case)))
    for name in {matrix.parameter for matrix in pair.case.matrices}:
        # A value that lies between two storable ones, to float32 precision, may be rounded either way.
        apart = count_ulps(loaded[name].detach().bfloat16(), parameters[name].detach().bfloat16())
        assert int(apart.max()) <= 1
        assert float(apart.double().mean()) <= 1e-3
    made, before = compare_logits(pair, out, wanted)
    # The few such values may move a logit by a unit of bfloat16, 2^-8, of one term among many.
    assert made <= 1e-3
    assert before >= 1e-2


@pytest.mark.parametrize("pair", ["llama4", "gpt-oss", "phi3"], indirect=True)
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_the_half_that_is_not_selected_stays(pair: Pair, tmp_path: Path, dtype: str) -> None:
    """Gate and up share a tensor: with up alone edited, gate is the fine-tuned one, rounded where the tensor is."""
    out = tmp_path / "out"
    manifest = pome.edit(pair.base, pair.ft, out, pome.EditSpec(dtype=dtype))
    wanted = {(matrix.name, matrix.part) for matrix in pair.case.matrices if matrix.role == "up"}
    assert {(record.name, record.part) for record in manifest.tensors} == wanted
    made, ft = read_tensors(out), read_tensors(pair.ft)
    for matrix in pair.case.matrices:
        rounded = ft[matrix.name].to(made[matrix.name].dtype)
        same = matrix.view(made[matrix.name]).equal(matrix.view(rounded))
        assert same == (matrix.role != "up")


def test_tied_embeddings_are_edited_once_and_only_when_named(tmp_path: Path) -> None:
    """A tied checkpoint stores one tensor; both modules that use it get the edit."""
    paths = [tmp_path / "base", tmp_path / "ft"]
    for path, seed in zip(paths, (0, 1), strict=True):
        torch.manual_seed(seed)
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    assert "lm_head.weight" not in read_tensors(paths[1])
    plain = pome.edit(*paths, tmp_path / "plain", pome.EditSpec(layers=("ffn", "attention"), allow_other_base=True))
    assert not any("embed" in record.name for record in plain.tensors)
    made = pome.edit(*paths, tmp_path / "out", pome.EditSpec(layers=("embed",), allow_other_base=True))
    assert [record.name for record in made.tensors] == ["model.embed_tokens.weight"]
    assert_only_edited(paths[1], tmp_path / "out", ["model.embed_tokens.weight"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = read_tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, stored) and torch.equal(model.get_input_embeddings().weight, stored)
