"""A tied weight that a checkpoint stores several times is edited once, and all its copies stay one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pome
from pome import CheckpointError, EditSpec
from pome.checkpoint.source import open_checkpoint
from pome.editing.ties import find_copies
from support.checkpoints import HIDDEN, LLAMA, perturb, random_llama, read_tensors, write_checkpoint
from support.reference import reference_edit

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
T5 = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
TIED = {**LLAMA, "tie_word_embeddings": True}


def tie(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The same tensors with all of `names` equal to the first."""
    return {**tensors, **{name: tensors[names[0]].clone() for name in names}}


def make_pair(
    folder: Path, base: dict[str, Tensor], ft: dict[str, Tensor], config: object, shards: int = 1
) -> list[Path]:
    return [
        write_checkpoint(folder / name, tensors, shards=shards, config=config)  # type: ignore[arg-type]
        for name, tensors in (("base", base), ("ft", ft))
    ]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layers", [("embed", "head"), ("embed",), ("head",), ("ffn", "embed", "head")])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_embeddings_and_their_head_stay_one(tmp_path: Path, shards: int, layers: tuple[str, ...], dtype: str) -> None:
    base = tie(random_llama(), EMBED, HEAD)
    base_path, ft_path = make_pair(tmp_path, base, tie(perturb(base), EMBED, HEAD), TIED, shards)
    manifest = pome.edit(base_path, ft_path, tmp_path / "out", EditSpec(layers=layers, dtype=dtype))
    made = read_tensors(tmp_path / "out")
    assert torch.equal(made[EMBED], made[HEAD])
    assert not torch.equal(made[EMBED].float(), read_tensors(ft_path)[EMBED].float())
    assert len([record for record in manifest.tensors if record.role in ("embed", "head")]) == 1
    assert any("one tensor, stored again" in notice for notice in manifest.notices)
    assert pome.verify(tmp_path / "out", base_path, ft_path, full=True).ok
    assert pome.verify(tmp_path / "out", ft=ft_path).ok


def test_a_base_that_stores_the_tied_weight_once_is_enough(tmp_path: Path) -> None:
    base = random_llama()
    del base[HEAD]
    ft = perturb(base)
    paths = make_pair(tmp_path, base, tie(ft, EMBED, HEAD), TIED)
    manifest = pome.edit(*paths, tmp_path / "out", EditSpec(layers=("embed", "head")))
    made = read_tensors(tmp_path / "out")
    expected = base[EMBED].double() + reference_edit((ft[EMBED] - base[EMBED]).double()).value
    assert torch.equal(made[EMBED], made[HEAD])
    assert float((made[EMBED] - expected).norm() / expected.norm()) < 1e-6
    assert [(item.name, "stored again" in item.reason) for item in manifest.kept] == [(HEAD, True)]


@pytest.mark.parametrize("layers", [("embed",), (f"re:^{T5[1]}$",), ("re:embed_tokens",)])
def test_three_copies_of_one_table_stay_one(tmp_path: Path, layers: tuple[str, ...]) -> None:
    torch.manual_seed(2)
    base = tie({name: torch.randn(24, HIDDEN) for name in T5}, *T5)
    paths = make_pair(tmp_path, base, tie(perturb(base), *T5), {"model_type": "t5"})
    pome.edit(*paths, tmp_path / "out", EditSpec(layers=layers))
    made = read_tensors(tmp_path / "out")
    assert all(torch.equal(made[T5[0]], made[name]) for name in T5)
    assert not torch.equal(made[T5[0]], read_tensors(paths[1])[T5[0]])
    assert pome.verify(tmp_path / "out", *paths, full=True).ok


@pytest.mark.parametrize("case", ["other bytes", "untied by the config"])
def test_weights_that_are_not_tied_are_edited_each_by_itself(tmp_path: Path, case: str) -> None:
    base = random_llama()
    ft = perturb(base)
    config = dict(TIED)
    if case != "other bytes":
        ft = tie(ft, EMBED, HEAD)
        config["tie_word_embeddings"] = False
    paths = make_pair(tmp_path, base, ft, config)
    manifest = pome.edit(*paths, tmp_path / "out", EditSpec(layers=("embed", "head")))
    assert {record.name for record in manifest.tensors} == {EMBED, HEAD}
    assert not any("are one tensor" in notice for notice in manifest.notices)


def test_tensors_that_differ_only_in_their_middle_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {EMBED: torch.randn(9000, HIDDEN)}
    ft = tie(perturb(base), EMBED, HEAD)
    ft[HEAD][4500] += 1.0
    paths = make_pair(tmp_path, tie(base, EMBED, HEAD), ft, TIED)
    with pytest.raises(CheckpointError, match="differs from it"):
        pome.edit(*paths, tmp_path / "out", EditSpec(layers=("embed",)))


def test_nothing_is_read_where_neither_is_selected(tmp_path: Path) -> None:
    base = tie(random_llama(), EMBED, HEAD)
    _, ft = make_pair(tmp_path, base, base, TIED)
    checkpoint = open_checkpoint(ft)
    checkpoint.close()  # reading raises from here on
    assert find_copies(checkpoint, ["model.layers.0.mlp.up_proj.weight"]) == {}
    with pytest.raises(Exception, match="Bad file descriptor"):
        find_copies(checkpoint, [EMBED])


def test_verify_finds_a_copy_that_is_no_copy(tmp_path: Path) -> None:
    base = tie(random_llama(), EMBED, HEAD)
    paths = make_pair(tmp_path, base, tie(perturb(base), EMBED, HEAD), TIED)
    pome.edit(*paths, tmp_path / "out", EditSpec(layers=("embed",)))
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    tensors[HEAD][0, 0] += 1.0
    save_file(tensors, file, {"format": "pt"})
    found = pome.verify(tmp_path / "out", *paths)
    assert HEAD in {item.tensor for item in found.differences} or not found.ok


def test_an_adapter_of_the_embeddings_reaches_the_stored_head(tmp_path: Path) -> None:
    base = tie(random_llama(), EMBED, HEAD)
    base_path = write_checkpoint(tmp_path / "base", base, config=TIED)
    lora = tmp_path / "lora"
    lora.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["embed_tokens", "up_proj"],
    }
    (lora / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model"
    factors = {
        f"{prefix}.embed_tokens.lora_embedding_A": torch.randn(2, 24),
        f"{prefix}.embed_tokens.lora_embedding_B": torch.randn(HIDDEN, 2),
        f"{prefix}.layers.0.mlp.up_proj.lora_A.weight": torch.randn(2, HIDDEN),
        f"{prefix}.layers.0.mlp.up_proj.lora_B.weight": torch.randn(40, 2),
    }
    save_file(factors, lora / "adapter_model.safetensors")
    for layers in (("up",), ("embed",)):
        out = tmp_path / f"out-{layers[0]}"
        pome.edit(base_path, lora, out, EditSpec(layers=layers))
        made = read_tensors(out)
        assert torch.equal(made[EMBED], made[HEAD]) and not torch.equal(made[EMBED], base[EMBED])
        assert pome.verify(out, base_path, lora, full=True).ok
