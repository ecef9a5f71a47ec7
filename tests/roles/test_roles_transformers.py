"""The role rules against the architectures of the installed transformers: what their modules do decides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from pome.roles.layout import Block, Layout, Part
from pome.roles.roles import find_layout, find_layouts
from support.roles_survey import KINDS, Row, format_table, inputs_of, judge, survey, take_part
from support.tiny_models import tiny_config, tiny_model
from support.true_roles import saved_tags, tag

pytestmark = [
    # What transformers says of its own modules and configs while tiny ones are built and run.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TABLE = Path(__file__).parent / "roles_survey.md"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on many threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def surveyed(one_thread: None) -> list[Row]:
    return [row for kind in KINDS for row in survey(kind)]


def test_no_role_is_wrong(surveyed: list[Row]):
    wrong = {row.model_type: row.verdict.wrong for row in surveyed if row.verdict and row.verdict.wrong}
    assert wrong == {}


def test_nearly_every_causal_language_model_is_fully_right(surveyed: list[Row]):
    causal = [row for row in surveyed if row.kind == "causal-lm"]
    assert sum(row.verdict is not None for row in causal) >= 0.95 * len(causal)
    # A few have no feed-forward module at all (state-space models).
    with_ffn = [row for row in causal if row.has_ffn]
    assert len(with_ffn) >= 0.95 * sum(row.verdict is not None for row in causal)
    assert sum(row.complete for row in with_ffn) >= 0.95 * len(with_ffn)


def test_the_table_is_of_the_release_that_constraints_pin():
    pinned = re.search(r"^transformers==([\d.]+)", CONSTRAINTS.read_text(encoding="utf-8"), re.M)[1]
    assert f"transformers {pinned};" in TABLE.read_text(encoding="utf-8")


def test_the_table_is_the_survey(surveyed: list[Row]):
    """Line by line in the table's release; in any, what it calls right is right: that does not wait for a new table."""
    table = TABLE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z-]+) \| ([\w-]+) \| [1-9]\d* \| 0 \| 0 \| 0 \|", table, re.M)
    built = {(row.kind, row.model_type): row.complete for row in surveyed if row.verdict}
    known = [row for row in rows if row in built]
    assert len(known) >= 0.5 * len(rows) >= 100
    assert [row for row in known if not built[row]] == []
    if f"transformers {transformers.__version__};" in table:
        again = "run: python scripts/survey_roles.py --out tests/roles/roles_survey.md"
        assert format_table(surveyed).splitlines() == table.splitlines(), again


def swap_gate_and_up(role: str) -> str:
    return {"gate": "up", "up": "gate"}.get(role, role)


@pytest.mark.parametrize(
    ("class_name", "model_type", "break_it"),
    [
        ("LlamaForCausalLM", "llama", lambda layout: replace_roles(layout, swap_gate_and_up)),
        ("Phi3ForCausalLM", "phi3", lambda layout: replace_roles(layout, swap_gate_and_up)),
        (
            "GPT2LMHeadModel",
            "gpt2",
            lambda layout: Layout(layout.parts, not layout.transposed, layout.stacked),
        ),
        ("GPTNeoXForCausalLM", "gpt_neox", lambda layout: replace_roles(layout, {"q": "k", "k": "q"}.get)),
        ("GptOssForCausalLM", "gpt_oss", lambda layout: replace_roles(layout, swap_gate_and_up)),
    ],
)
def test_the_survey_sees_a_wrong_rule(
    class_name: str, model_type: str, break_it: Callable, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model(class_name, tiny_config(model_type)).double()
    assert judge(model, inputs_of(model)).wrong == []
    monkeypatch.setattr(
        "support.roles_survey.find_layouts",
        lambda *given: {name: break_it(layout) for name, layout in find_layouts(*given).items()},
    )
    model = tiny_model(class_name, tiny_config(model_type)).double()
    assert judge(model, inputs_of(model)).wrong != []


def replace_roles(layout: Layout, new: Callable[[str], str | None]) -> Layout:
    parts = tuple(Part(new(part.role) or part.role, part.label, part.block) for part in layout.parts)
    return Layout(parts, layout.transposed, layout.stacked)


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("MixtralForCausalLM", "mixtral"),
        ("GptOssForCausalLM", "gpt_oss"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("ViTModel", "vit"),
        ("GPTNeoXForCausalLM", "gpt_neox"),
    ],
)
def test_the_survey_spells_names_as_save_pretrained_does(class_name: str, model_type: str, tmp_path: Path):
    model = tiny_model(class_name, tiny_config(model_type))
    model.save_pretrained(tmp_path)
    tagged, _ = tag(model)
    spelled = {name: list(tags.shape) for name, tags in saved_tags(model, tagged).items()}
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 - no mapping
    assert shapes == {name: shape for name, shape in spelled.items() if name in shapes} != {}
    # What is tied to another tensor is not stored.
    assert all(name.endswith(("lm_head.weight", "embed_out.weight")) for name in spelled.keys() - shapes.keys())


SPLITS = {
    "gpt2": ("GPT2LMHeadModel", "gpt2", {}),
    "imagegpt": ("ImageGPTForCausalImageModeling", "imagegpt", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox", {}),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", "gpt_neox_japanese", {}),
    "bloom": ("BloomForCausalLM", "bloom", {}),
    "falcon multi-query": ("FalconForCausalLM", "falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon per head": ("FalconForCausalLM", "falcon", {"multi_query": False, "num_kv_heads": 4}),
    "falcon grouped": ("FalconForCausalLM", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "phi3": ("Phi3ForCausalLM", "phi3", {}),
    "gpt_bigcode multi-query": ("GPTBigCodeForCausalLM", "gpt_bigcode", {"multi_query": True}),
    "gpt_bigcode per head": ("GPTBigCodeForCausalLM", "gpt_bigcode", {"multi_query": False}),
    "mpt": ("MptForCausalLM", "mpt", {}),
    "codegen": ("CodeGenForCausalLM", "codegen", {}),
    "persimmon": ("PersimmonForCausalLM", "persimmon", {"qk_layernorm": False}),
    "dbrx": ("DbrxForCausalLM", "dbrx", {}),
}


@pytest.mark.parametrize("case", SPLITS)
def test_keys_and_values_of_a_fused_projection_are_those_in_the_cache(case: str):
    class_name, model_type, overrides = SPLITS[case]
    model = tiny_model(class_name, tiny_config(model_type, **overrides)).double()
    config = json.loads(model.config.to_json_string(use_diff=True))
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        fused = re.search(r"\b0\.\w+\.(self_attention\.)?(c_attn|query_key_value|qkv_proj|Wqkv|attn\.Wqkv)$", name)
        if fused and hasattr(module, "weight"):
            hooks.append(module.register_forward_hook(lambda m, x, y, n=name: seen.update({n: x[0]})))
    with torch.no_grad():
        # One token at position 0, where a rotary embedding turns nothing.
        cache = model(input_ids=torch.tensor([[5]]), use_cache=True).past_key_values
    ((name, x),) = seen.items()
    weight = model.get_parameter(name + ".weight")
    bias = dict(model.named_parameters()).get(name + ".bias")
    layout = find_layout(name + ".weight", tuple(weight.shape), config)
    assert sorted(part.role for part in layout.parts) == ["k", "q", "v"]
    for part in layout.parts:
        matrix = take_part(weight, layout, part)
        # A bias lies along the rows of the map, so it is cut as one column.
        upright = Layout(layout.parts)
        rows = part if part.block is None else Part(part.role, part.label, as_rows(part.block))
        offset = 0 if bias is None else take_part(bias[:, None], upright, rows)[:, 0]
        expected = (x @ matrix.T + offset).flatten()
        if part.role == "q":
            assert len(expected) == model.config.num_attention_heads * head_size(model, layout)
            continue
        stored = getattr(cache.layers[0], {"k": "keys", "v": "values"}[part.role])[0, :, 0]
        expected = expected.reshape(-1, stored.shape[-1])
        # Falcon keeps shared heads repeated.
        expected = expected.repeat_interleave(stored.shape[0] // expected.shape[0], 0)
        torch.testing.assert_close(stored, expected, rtol=1e-6, atol=1e-7)  # some models compute in float32
    for hook in hooks:
        hook.remove()


def as_rows(block: Block) -> Block:
    return Block(0, block.count, block.period, block.start, block.size)


def head_size(model: torch.nn.Module, layout: Layout) -> int:
    hidden = getattr(model.config, "hidden_size", None) or model.config.d_model
    return getattr(model.config, "head_dim", None) or hidden // model.config.num_attention_heads


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def gpt_oss_gated(gate: Tensor, up: Tensor) -> Tensor:
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize(
    ("class_name", "model_type", "where", "gated"),
    [
        ("MixtralForCausalLM", "mixtral", "model.layers.1.mlp.experts", silu_gated),
        ("Qwen3MoeForCausalLM", "qwen3_moe", "model.layers.1.mlp.experts", silu_gated),
        ("GptOssForCausalLM", "gpt_oss", "model.layers.1.mlp.experts", gpt_oss_gated),
        ("Llama4ForCausalLM", "llama4_text", "model.layers.1.feed_forward.experts", silu_gated),
        ("DbrxForCausalLM", "dbrx", "transformer.blocks.1.ffn.experts", silu_gated),
    ],
)
def test_experts_compute_what_their_parts_say(class_name: str, model_type: str, where: str, gated: Callable):
    model = tiny_model(class_name, tiny_config(model_type)).double()
    config = json.loads(model.config.to_json_string(use_diff=True))
    bank = model.get_submodule(where)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if model_type == "gpt_oss":
        bank.gate_up_proj_bias.data.zero_()
        bank.down_proj_bias.data.zero_()
    experts = 3
    matrices: dict[tuple[str, int], Tensor] = {}
    for name, parameter in bank.named_parameters():
        if not name.endswith("bias"):
            layout = find_layout(f"{where}.{name}", tuple(parameter.shape), config)
            for part in layout.parts:
                stack = take_part(parameter, layout, part)
                if layout.stacked:
                    matrices |= {(part.role, expert): stack[expert] for expert in range(experts)}
                else:
                    matrices[part.role, int(str(part.label).removeprefix("expert="))] = stack
    x = torch.randn(experts, 48, dtype=torch.float64)
    with torch.no_grad():
        if model_type == "llama4_text":
            computed = bank(x)
        else:
            chosen = torch.arange(experts)[:, None]
            computed = bank(x, chosen, torch.ones(experts, 1, dtype=torch.float64))
    for expert in range(experts):
        gate, up, down = (matrices[role, expert] for role in ("gate", "up", "down"))
        expected = down @ gated(gate @ x[expert], up @ x[expert])
        torch.testing.assert_close(
            computed.reshape(experts, -1)[expert], expected, rtol=1e-5, atol=1e-6
        )  # gpt-oss computes in float32
