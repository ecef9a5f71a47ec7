"""Which files are training state or weights in another format by their names, and which belong to the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pome
from pome.checkpoint.leftovers import OTHER_FORMAT, TRAINING, find_leftover
from support.checkpoints import HIDDEN, INNER, llama_pair, random_llama

TRAINING_STATE = [
    # transformers, accelerate, Lightning, Ray
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_7.pth", "trainer_state.json",
    "training_args.bin", "checkpoint-500/model.safetensors", "tmp-checkpoint-500/x.json", "last-checkpoint/config.json",
    "optimizer.bin", "optimizer_1.bin", "random_states_0.pkl", "sampler.bin", "custom_checkpoint_0.pkl", "last.ckpt",
    "epoch=3-step=100.ckpt", "checkpoint_000010/model.safetensors", "epoch_0/model.safetensors", "step_1000/a.json",
    # DeepSpeed, FSDP, Megatron, torchtune
    "global_step7/mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer_0/__0_0.distcp",
    "pytorch_model_fsdp_0/.metadata", "iter_0000100/a.txt", "recipe_state/recipe_state.pt", "runs/checkpoint-5/a.txt",
]  # fmt: skip
OTHER_FORMATS = [
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "model.onnx", "onnx/decoder_model_merged.onnx", "model.tflite",
    "llama-Q4_K_M.gguf", "consolidated.00.pth", "original/consolidated.00.pth", "original/model.safetensors",
    "metal/model.bin", "consolidated.safetensors",
]  # fmt: skip
# A speaker table, heads, projectors, voices, a vocoder, a normalisation, an adapter for speech: a model needs them.
NEEDED = [
    "spk_dict.pt", "value_head.safetensors", "v_head.bin", "mm_projector.bin", "voices/af_heart.pt", "campplus.onnx",
    "speaker_embeddings/a.npy", "non_lora_trainables.bin", "mel_filters.npz", "scheduler/scheduler_config.json",
    "scheduler_config.json", "speech-lora/adapter_model.safetensors", "tokenizer.json", "stepwise/notes.txt",
    "epochs.json", "preprocessor_config.json", "mmproj-f16.gguf", "optimizer_config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAINING_STATE)
def test_training_state_of_every_trainer_is_known_by_its_name(name: str) -> None:
    assert find_leftover(name, [name.rpartition("/")[2]]) == TRAINING


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_weights_in_another_format_are_known_by_their_names(name: str) -> None:
    assert find_leftover(name, [name.rpartition("/")[2]]) == OTHER_FORMAT


@pytest.mark.parametrize("name", NEEDED)
def test_files_of_unknown_use_are_kept(name: str) -> None:
    assert find_leftover(name, [name.rpartition("/")[2]]) is None


def test_a_pickle_beside_safetensors_of_the_same_stem_repeats_it() -> None:
    assert find_leftover("vae/decoder.bin", ["decoder.bin", "decoder.safetensors", "config.json"]) == OTHER_FORMAT
    assert find_leftover("vae/decoder.bin", ["decoder.bin", "config.json"]) is None


def test_pickled_weights_alone_with_a_config_below_are_a_part_of_the_model() -> None:
    assert find_leftover("2_Dense/pytorch_model.bin", ["pytorch_model.bin", "config.json"]) is None
    assert find_leftover("2_Dense/pytorch_model.bin", ["pytorch_model.bin", "model.safetensors", "config.json"])


def test_all_of_a_folder_of_distributed_shards_is_training_state() -> None:
    assert find_leftover("dist/.metadata", [".metadata", "__0_0.distcp"]) == TRAINING


def test_an_edit_copies_what_is_needed_names_the_rest_and_verify_agrees(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    for name in (*TRAINING_STATE, *OTHER_FORMATS, *NEEDED):
        path = ft / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"v_head.weight": torch.ones(2, 2)}, path)
        else:
            path.write_bytes(b"{}")
    out = tmp_path / "out"
    manifest = pome.edit(base, ft, out)
    for name in NEEDED:
        assert (out / name).read_bytes() == (ft / name).read_bytes()
    for name in (*TRAINING_STATE, *OTHER_FORMATS):
        assert not (out / name).exists()
        folder = next((f"{part}/" for part in Path(name).parts[:-1] if f"{part}/" in manifest.not_copied), None)
        deeper = any(left in f"{name}/" for left in manifest.not_copied if left.endswith("/"))
        assert name in manifest.not_copied or folder or deeper
    assert pome.verify(out, base, ft, full=True).ok


@pytest.mark.parametrize("folder", ["backup", "fp16", "merged/old"])
def test_weights_below_that_repeat_the_checkpoints_names_are_named_with_their_size(tmp_path: Path, folder: str) -> None:
    base, ft = llama_pair(tmp_path)
    (ft / folder).mkdir(parents=True)
    save_file(random_llama(), ft / folder / "model.safetensors")
    manifest = pome.edit(base, ft, tmp_path / "out")
    (notice,) = manifest.notices
    size = (ft / folder / "model.safetensors").stat().st_size
    assert f"{folder}/model.safetensors" in notice and f"in {size} bytes" in notice
    assert f"{folder}/model.safetensors" in manifest.files


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "value_head.safetensors", "mm_projector.bin"])
def test_weights_trained_beside_an_adapter_are_copied_and_named(tmp_path: Path, name: str) -> None:
    base, _ = llama_pair(tmp_path)
    adapter = tmp_path / "lora"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.randn(4, HIDDEN), f"{module}.lora_B.weight": torch.randn(INNER, 4)}
    save_file(factors, adapter / "adapter_model.safetensors")
    save_file({"v_head.weight": torch.ones(2, 2)}, adapter / name)
    for form in ("full", "adapter"):
        manifest = pome.edit(base, adapter, tmp_path / form, pome.EditSpec(out_format=form))
        assert (tmp_path / form / name).read_bytes() == (adapter / name).read_bytes()
        assert any(name in notice and "trained beside the adapter" in notice for notice in manifest.notices)
        assert pome.verify(tmp_path / form, base, adapter, full=True).ok
    assert json.loads((tmp_path / "full/pome_manifest.json").read_text())["notices"]
