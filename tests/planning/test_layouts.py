"""Checkpoints that transformers itself writes in two layouts: an edit across them is the edit within one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from pome import EditSpec, edit, verify
from support.checkpoints import read_tensors
from support.quick import sample
from support.tiny_models import tiny_config, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# Model type -> the class whose checkpoints differ between releases 4 and 5, and how.
FAMILIES = {
    "qwen2_moe": "Qwen2MoeForCausalLM",  # a tensor for each expert, or packed; shared experts stay apart
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",  # w1, w2, w3 in block_sparse_moe, or gate_up_proj and down_proj in mlp
    "phimoe": "PhimoeForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",  # the first layers dense
    "jamba": "JambaForCausalLM",  # experts in every other layer
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",  # no gate, another prefix
    "granitemoe": "GraniteMoeForCausalLM",  # one layout, other names
    "vit": "ViTForImageClassification",  # encoder.layer and intermediate.dense, or layers and mlp.fc1
    "swin": "SwinForImageClassification",
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", sample(FAMILIES, "qwen2_moe", "vit"))
def test_an_edit_across_two_layouts_is_the_edit_within_one(model_type: str, tmp_path: Path) -> None:
    kind = getattr(transformers, FAMILIES[model_type])
    model = tiny_model(FAMILIES[model_type], tiny_config(model_type))

    def save(side: str) -> None:
        for layout, original in (("old", True), ("new", False)):
            model.save_pretrained(tmp_path / f"{side}-{layout}", save_original_format=original)

    save("base")
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    save("ft")
    assert read_tensors(tmp_path / "ft-old").keys() != read_tensors(tmp_path / "ft-new").keys()

    def run(base: str, ft: str, name: str) -> tuple[int, dict[str, Tensor]]:
        manifest = edit(tmp_path / base, tmp_path / ft, tmp_path / name, EditSpec(layers=("ffn",)))
        return len(manifest.tensors), kind.from_pretrained(tmp_path / name).state_dict()

    for mine, other in (("old", "new"), ("new", "old")):
        count, expected = run(f"base-{mine}", f"ft-{mine}", f"within-{mine}")
        across, made = run(f"base-{other}", f"ft-{mine}", f"across-{mine}")
        assert across == count > 0
        assert read_tensors(tmp_path / f"across-{mine}").keys() == read_tensors(tmp_path / f"ft-{mine}").keys()
        for name, tensor in expected.items():  # float32 throughout, and one edit computed twice
            torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-6)
        assert verify(tmp_path / f"across-{mine}", tmp_path / f"base-{other}", tmp_path / f"ft-{mine}", full=True).ok


H, F, E = 12, 20, 3


def turn(experts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.mT.contiguous() if t.ndim == 3 else t for name, t in experts.items()}


@pytest.mark.parametrize("turned", ["base", "ft"])
@pytest.mark.parametrize("model_type", ["qwen3_vl_moe_text", "unheard_of"])
def test_experts_stored_in_out_on_one_side_are_edited_as_those_stored_out_in(
    model_type: str, turned: str, tmp_path: Path
) -> None:
    """(E, in, out) on one side and (E, out, in) on the other: Qwen3-VL-MoE's checkpoints exist both ways."""
    torch.manual_seed(0)
    around = "model.layers.0.mlp.experts."
    base = {f"{around}gate_up_proj": torch.randn(E, 2 * F, H), f"{around}down_proj": torch.randn(E, H, F)}
    ft = {name: t + 0.01 * torch.randn(t.shape) for name, t in base.items()}
    config = {"model_type": model_type, "hidden_size": H, "moe_intermediate_size": F, "num_experts": E}
    # Nothing tells how an unheard-of model lays out the halves of experts stored (in, out).
    layers = ("ffn",) if model_type != "unheard_of" else ("down",)

    def put(name: str, tensors: dict[str, Tensor]) -> Path:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    plain = [put("base", base), put("ft", ft)]
    mixed = [put("turned", turn(base)), plain[1]] if turned == "base" else [plain[0], put("turned", turn(ft))]
    edit(*plain, tmp_path / "plain-out", EditSpec(layers=layers))
    edit(*mixed, tmp_path / "mixed-out", EditSpec(layers=layers))
    expected, made = (read_tensors(tmp_path / f"{name}-out") for name in ("plain", "mixed"))
    for name, tensor in (turn(made) if turned == "ft" else made).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected[f"{around}down_proj"], ft[f"{around}down_proj"])
    assert verify(tmp_path / "mixed-out", *mixed, full=True).ok
