"""Which matrix of BASE is the partner of which of FT's: by what it is in the model, whatever tensor holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pome import EditSpec, PairingError, SelectionError, edit
from pome.editing.session import open_pair
from pome.planning.units import Plan
from support.checkpoints import read_tensors

H, F, E, HEADS = 12, 20, 3, 3
CONFIG = {"model_type": "unheard_of", "hidden_size": H, "intermediate_size": F, "num_attention_heads": HEADS}
MOE = {"model_type": "mixtral", "hidden_size": H, "num_local_experts": E}


def put(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def matrices(layers: int = 2, experts: int | None = None, seed: int = 0) -> dict[tuple[int, int | None, str], Tensor]:
    """(layer, expert, role) -> a matrix (out, in)."""
    torch.manual_seed(seed)
    shapes = {"gate": (F, H), "up": (F, H), "down": (H, F)} | ({} if experts else dict.fromkeys("qkvo", (H, H)))
    numbers: list[int | None] = list(range(experts)) if experts else [None]
    return {(i, e, role): torch.randn(shape) for i in range(layers) for e in numbers for role, shape in shapes.items()}


Matrices = dict[tuple[int, int | None, str], Tensor]


def plain(
    m: Matrices, layer: str = "model.layers.{}.", mlp: str = "mlp.", ends: str = "_proj.weight"
) -> dict[str, Tensor]:
    """Dense layers, a tensor a matrix."""
    blocks = {role: (mlp if len(role) > 1 else "self_attn.") for _, _, role in m}
    return {layer.format(i) + blocks[role] + role + ends: t for (i, _, role), t in m.items()}


def fused(m: Matrices) -> dict[str, Tensor]:
    """Gate and up in one tensor, q, k and v in another."""
    tensors = {}
    for i in sorted({i for i, _, _ in m}):
        layer = f"model.layers.{i}."
        tensors[f"{layer}mlp.gate_up_proj.weight"] = torch.cat([m[i, None, "gate"], m[i, None, "up"]])
        tensors[f"{layer}mlp.down_proj.weight"] = m[i, None, "down"]
        tensors[f"{layer}self_attn.qkv_proj.weight"] = torch.cat([m[i, None, role] for role in "qkv"])
        tensors[f"{layer}self_attn.o_proj.weight"] = m[i, None, "o"]
    return tensors


def conv1d(m: Matrices) -> dict[str, Tensor]:
    """The layers of a model without gates under GPT-2's names, stored (in, out)."""
    names = {"up": "mlp.c_fc", "down": "mlp.c_proj"}
    return {f"transformer.h.{i}.{names[r]}.weight": t.T for (i, _, r), t in m.items() if r in names}


def separate(m: Matrices) -> dict[str, Tensor]:
    words = {"gate": "w1", "down": "w2", "up": "w3"}
    around = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    return {around.format(i, e, words[role]): t for (i, e, role), t in m.items()}


def packed(m: Matrices, turned: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for i in sorted({i for i, _, _ in m}):
        count = len({e for j, e, _ in m if j == i})
        pair = [torch.cat([m[i, e, "gate"], m[i, e, "up"]]) for e in range(count)]
        tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(pair)
        tensors[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack([m[i, e, "down"] for e in range(count)])
    return {name: t.mT for name, t in tensors.items()} if turned else tensors


def interleaved(m: Matrices) -> dict[str, Tensor]:
    """As gpt-oss: packed (in, out), gate and up in turn."""
    tensors = packed(m, turned=True)
    fused = {n: t.unflatten(-1, (2, F)).mT.flatten(-2) for n, t in tensors.items() if "gate_up" in n}
    return tensors | fused


def below_each_other(m: Matrices) -> dict[str, Tensor]:
    """As DBRX: the experts of a layer in one matrix, down stored (in, out)."""
    words = {"gate": "w1", "up": "v1", "down": "w2"}
    tensors = {}
    for i in sorted({i for i, _, _ in m}):
        for role, word in words.items():
            stack = [m[i, e, role].T if role == "down" else m[i, e, role] for e in range(E)]
            tensors[f"transformer.blocks.{i}.ffn.experts.mlp.{word}"] = torch.cat(stack)
    return tensors


PHI3 = {"model_type": "phi3", "hidden_size": H, "num_attention_heads": HEADS}
GPT2 = {"model_type": "gpt2", "n_embd": H, "n_head": HEADS}
NO_GATE = {
    "Linear": (lambda m: {n: t for n, t in plain(m).items() if "up_" in n or "down_" in n}, CONFIG),
    "Conv1D": (conv1d, GPT2),
}
LLAMA4 = {"model_type": "llama4_text", "hidden_size": H, "num_local_experts": E}
# Layout -> how it stores the matrices, and its config.
DENSE = {
    "plain": (plain, CONFIG),
    "fused": (fused, PHI3),
    "other names": (lambda m: plain(m, "net.blocks.{}.", "feed_forward."), CONFIG),
    "wrapped": (lambda m: plain(m, "module.model.layers.{}._orig_mod.", "_fsdp_wrapped_module.mlp."), CONFIG),
}
EXPERTS = {
    "separate": (separate, MOE),
    "packed": (packed, MOE),
    "interleaved": (interleaved, {"model_type": "gpt_oss", "hidden_size": H, "num_local_experts": E}),
    "below each other": (below_each_other, {"model_type": "dbrx", "d_model": H, "ffn_config": {"moe_num_experts": E}}),
}
# Side by side and interleaved halves differ in no shape: those two against each other are refused.
TURNED = {
    "separate": (separate, MOE),
    "packed": (packed, MOE),
    "packed (in, out)": (lambda m: packed(m, turned=True), LLAMA4),
}


def define_edits(base: Matrices, ft: Matrices) -> Matrices:
    """The edit of every matrix with the default options, by an SVD in float64."""
    edits = {}
    for key, W in ft.items():
        U, S, Vh = torch.linalg.svd(W.double() - base[key].double(), full_matrices=False)
        k = round(0.5 * len(S))
        edits[key] = (base[key].double() + S.norm() / k**0.5 * U[:, :k] @ Vh[:k]).float()
    return edits


@pytest.mark.parametrize(
    ("layouts", "count", "layers"),
    [(DENSE, None, ("ffn", "attention")), (EXPERTS, E, ("ffn",)), (TURNED, E, ("ffn",)), (NO_GATE, None, ("ffn",))],
    ids=["dense", "experts", "turned experts", "no gate"],
)
def test_every_layout_is_edited_against_every_other(
    layouts: dict[str, Any], count: int | None, layers: tuple[str, ...], tmp_path: Path
) -> None:
    base = matrices(experts=count)
    ft = {key: t + 0.01 * torch.randn(t.shape) for key, t in base.items()}
    edits = define_edits(base, ft)
    for name, (store, config) in layouts.items():
        put(tmp_path / f"base {name}", store(base), config)
        put(tmp_path / f"ft {name}", store(ft), config)
    for mine, (store, _) in layouts.items():
        for other in layouts:
            out = tmp_path / f"{mine} on {other}"
            manifest = edit(tmp_path / f"base {other}", tmp_path / f"ft {mine}", out, EditSpec(layers=layers))
            assert manifest.kept == ()
            made = read_tensors(out)
            assert made.keys() == store(edits).keys()
            for name, tensor in store(edits).items():  # float32 entries of about one
                torch.testing.assert_close(made[name], tensor.contiguous(), rtol=0, atol=1e-5)


def plan(base: Path, ft: Path, **options: Any) -> Plan:
    with open_pair(base, ft, EditSpec(**options)) as opened:
        return opened.plan


def tuned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t + 0.01 * torch.randn(t.shape) for name, t in tensors.items()}


def test_only_what_is_needed_of_base_is_read(tmp_path: Path) -> None:
    """One half of one expert: not the packed tensor that holds it."""
    m = matrices(experts=E)
    made = plan(put(tmp_path / "base", packed(m), MOE), put(tmp_path / "ft", separate(m), MOE))
    assert {unit.base_nbytes for unit in made.units} == {4 * F * H}
    assert {json.dumps(entry["base"]) for entry in made.to_json()["edit"]} == {
        f'"model.layers.{i}.mlp.experts.gate_up_proj"' for i in range(2)
    }


def test_sides_of_several_dtypes_are_subtracted_exactly(tmp_path: Path) -> None:
    """BASE's halves in bfloat16 and float16, whose common dtype is float32."""
    m = matrices()
    ft = {key: t + 0.01 * torch.randn(t.shape) for key, t in m.items()}
    base = {key: t.to({"gate": torch.bfloat16, "up": torch.float16}.get(key[2], t.dtype)) for key, t in m.items()}
    folders = put(tmp_path / "base", plain(base)), put(tmp_path / "ft", fused(ft), PHI3)
    edit(*folders, tmp_path / "out", EditSpec(layers=("ffn",)))
    expected = fused(define_edits(base, ft) | {key: t for key, t in ft.items() if len(key[2]) == 1})
    for name, tensor in read_tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["base", "ft"])
def test_integers_in_a_fused_matrix_or_its_partner_are_refused_by_dtype(side: str, tmp_path: Path) -> None:
    tensors = {"base": plain(matrices(1)), "ft": fused(matrices(1))}
    name = next(name for name in tensors[side] if "up_proj" in name)
    tensors[side][name] = torch.ones(tensors[side][name].shape, dtype=torch.int8)
    folders = put(tmp_path / "base", tensors["base"]), put(tmp_path / "ft", tensors["ft"], PHI3)
    with pytest.raises(PairingError, match=rf"/{side}/.*{name}: stored as I8, which cannot be edited"):
        plan(*folders)


TWICE = {"model.layers.0.mlp.up_proj.weight": (F, H), "model.layers.0.feed_forward.up_proj.weight": (F, H)}


@pytest.mark.parametrize(
    ("base", "ft", "said"),
    [
        (TWICE, {"model.layers.0.ffn.up_proj.weight": (F, H)}, r"ffn.*BASE's .*feed_forward.* and BASE's .*mlp.*both"),
        ({"model.layers.0.ffn.up_proj.weight": (F, H)}, TWICE, r"feed_forward.* and .*mlp.* may both .*BASE's .*ffn"),
        (
            {"model.layers.0.attention.wq.weight": (H, H)},
            {"model.layers.0.self_attn.q_proj.weight": (H, H)},
            "q_proj.*wq.* may hold the same rows, or the rows in the order of another rotary",
        ),
        (
            {"model.layers.0.self_attn.k_proj.weight": (H, H)},
            {"layers.0.attention.wk.weight": (H, H)},
            "wk.*k_proj.* may hold the same rows, or the rows in the order of another rotary",
        ),
    ],
)
def test_two_readings_are_refused_and_both_are_named(
    base: dict[str, tuple[int, ...]], ft: dict[str, tuple[int, ...]], said: str, tmp_path: Path
) -> None:
    folders = [
        put(tmp_path / name, {n: torch.randn(shape) for n, shape in side.items()})
        for name, side in (("base", base), ("ft", ft))
    ]
    with pytest.raises(PairingError, match=said):
        plan(*folders, layers=("up", "attention"))


def test_of_two_blocks_in_one_layer_each_keeps_its_own_partner(tmp_path: Path) -> None:
    """A block that has a name in common with BASE's, beside one that BASE lacks."""
    ft = {"model.layers.0.vision_mlp.up_proj.weight": torch.randn(F, H), **plain(matrices(1))}
    folders = put(tmp_path / "base", plain(matrices(1))), put(tmp_path / "ft", ft)
    made = plan(*folders, allow_missing=True)
    assert [unit.name for unit in made.units] == ["model.layers.0.mlp.up_proj.weight"]
    assert [item.name for item in made.kept] == ["model.layers.0.vision_mlp.up_proj.weight"]


def test_a_head_that_base_lacks_is_tied_only_to_an_embedding_of_its_shape(tmp_path: Path) -> None:
    base = {"model.embed_tokens.weight": torch.randn(7, H)}
    put(tmp_path / "base", base)
    for rows in (7, 8):
        ft = tuned(base) | {"lm_head.weight": torch.randn(rows, H)}
        folders = tmp_path / "base", put(tmp_path / f"ft {rows}", ft)
        if rows == 7:
            assert [item.name for item in plan(*folders, layers=("embed", "head")).kept] == ["lm_head.weight"]
        else:
            with pytest.raises(PairingError, match="no partner for whole groups of the selection: all lm_head"):
                plan(*folders, layers=("embed", "head"))


def test_of_two_blocks_in_another_layout_each_finds_its_own(tmp_path: Path) -> None:
    def store(layout: Any) -> dict[str, Tensor]:
        beside = {n.replace(".mlp.", ".feed_forward."): t for n, t in layout(matrices(1, seed=1)).items() if "mlp" in n}
        return {**layout(matrices(1)), **beside}

    made = plan(put(tmp_path / "base", store(fused), PHI3), put(tmp_path / "ft", tuned(store(plain))), layers=("up",))
    found = {unit.name.split(".")[3]: unit.base_parts[0].name.split(".")[3] for unit in made.units}
    assert found == {"mlp": "mlp", "feed_forward": "feed_forward"}


@pytest.mark.parametrize("store", [separate, packed])
@pytest.mark.parametrize("counts", [(3, 4), (4, 3)])
def test_other_numbers_of_experts_are_refused_with_both(store: Any, counts: tuple[int, int], tmp_path: Path) -> None:
    folders = [
        put(tmp_path / name, s(matrices(experts=count)), MOE | {"num_local_experts": count})
        for name, s, count in (("base", separate, counts[0]), ("ft", store, counts[1]))
    ]
    with pytest.raises(PairingError, match=rf"{counts[1]} experts.*BASE (has )?{counts[0]}.*exclude"):
        plan(*folders)


# Depth -------------------------------------------------------------------------------------------------------------
DEPTH_KEYS = {"num_hidden_layers": None, "n_layer": None, "text_config": "num_hidden_layers"}


@pytest.mark.parametrize("key", [*DEPTH_KEYS, None])
@pytest.mark.parametrize("depths", [(2, 3), (3, 2)])
def test_another_depth_is_refused_with_both_numbers(key: str | None, depths: tuple[int, int], tmp_path: Path) -> None:
    """By the configs, or without one by the names; the switch that the message names pairs by number."""
    folders = []
    for name, depth in zip(("base", "ft"), depths, strict=True):
        inner = DEPTH_KEYS.get(key or "")
        config = {**CONFIG, str(key): {**CONFIG, inner: depth} if inner else depth} if key else None
        folders.append(put(tmp_path / name, plain(matrices(depth)), config))
    with pytest.raises(PairingError, match=rf"{depths[1]} layers .* {depths[0]} layers .*allow_other_depth"):
        plan(*folders)
    made = plan(*folders, allow_other_depth=True, allow_missing=True)
    assert len(made.units) == min(depths)
    spec = EditSpec(allow_other_depth=True, allow_missing=True)
    manifest = edit(folders[0], put(tmp_path / "tuned", tuned(read_tensors(folders[1]))), tmp_path / "out", spec)
    assert manifest.spec["allow_other_depth"] is True


def test_one_config_that_says_the_depth_of_both_is_believed(tmp_path: Path) -> None:
    """A checkpoint may store layers beyond its depth, as for predicting several tokens, or be one shard of several."""
    config = {**CONFIG, "num_hidden_layers": 2}
    folders = put(tmp_path / "base", plain(matrices(3)), config), put(tmp_path / "ft", plain(matrices(2)), config)
    assert len(plan(*folders).units) == 2


def test_the_depth_of_a_tower_that_is_not_edited_is_no_matter(tmp_path: Path) -> None:
    folders = []
    for name, depth in (("base", 2), ("ft", 3)):
        tensors = plain(matrices(2)) | plain(matrices(depth), "vision_tower.layers.{}.")
        vision = {"vision_config": {"num_hidden_layers": depth}, "text_config": {**CONFIG, "num_hidden_layers": 2}}
        folders.append(put(tmp_path / name, tensors, vision))
    assert len(plan(*folders, exclude=("vision",)).units) == 2
    with pytest.raises(PairingError, match="3 layers in vision_tower.layers.*2 layers"):
        plan(*folders)


# Missing partners --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        ("layers.1.mlp.up_proj", "up of model.layers.1.ffn"),
        ("mlp.up_proj", "all model.layers.N.mlp.up_proj.weight"),
        ("layers.0.self_attn.q_proj", "q of model.layers.0.attention"),
    ],
)
def test_a_whole_group_without_a_partner_is_refused_unless_allowed(lacking: str, named: str, tmp_path: Path) -> None:
    full = plain(matrices())
    base = {name: t for name, t in full.items() if lacking not in name}
    folders = put(tmp_path / "base", base), put(tmp_path / "ft", tuned(full))
    with pytest.raises(PairingError, match=f"no partner for whole groups of the selection: .*{named}.*allow_missing"):
        plan(*folders, layers=("ffn", "attention"))
    made = plan(*folders, layers=("ffn", "attention"), allow_missing=True)
    assert {item.name for item in made.kept} == full.keys() - base.keys()
    assert {item.reason for item in made.kept} == {"BASE has no such tensor"}


@pytest.mark.parametrize(
    ("roles", "more"), [(("up",), ""), (("up", "gate"), " and 3 more"), (("up", "gate", "down"), " and 6 more")]
)
def test_three_groups_without_a_partner_are_named_and_the_others_counted(
    roles: tuple[str, ...], more: str, tmp_path: Path
) -> None:
    """A group for each role in all layers, and one for each in each of the two."""
    full = plain(matrices())
    base = {name: t for name, t in full.items() if not any(f"{role}_proj" in name for role in roles)}
    folders = put(tmp_path / "base", base), put(tmp_path / "ft", tuned(full))
    with pytest.raises(PairingError) as caught:
        plan(*folders, layers=("ffn", "attention"))
    shown = str(caught.value).partition("selection: ")[2].partition("; give")[0]
    assert shown.count(", ") == 2 and (shown.endswith(more) if more else " more" not in shown)


def test_missing_experts_of_a_packed_tensor_are_named_one_by_one(tmp_path: Path) -> None:
    """BASE lacks the gates: the units that are left hold the up halves alone."""
    m = matrices(experts=E)
    base = {name: t for name, t in separate(m).items() if "w1" not in name}
    folders = put(tmp_path / "base", base, MOE), put(tmp_path / "ft", packed(m), MOE)
    assert len(plan(*folders).units) == 2 * E  # up alone was selected
    with pytest.raises(PairingError, match=r"gate of model\.layers\.0\.experts"):
        plan(*folders, layers=("gate", "up"))
    made = plan(*folders, layers=("gate", "up"), allow_missing=True)
    assert {part.role for _, part in made.matrices()} == {"up"}
    assert [(item.part, item.reason) for item in made.kept] == [
        (f"expert={e},half=gate", "BASE has no such tensor") for _ in range(2) for e in range(E)
    ]


# Names with wrappers, and tensors without content ------------------------------------------------------------------
WRAPPERS = ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module", "base_layer"]


@settings(deadline=None, max_examples=30)  # the machine may be busy, and each example writes files
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(WRAPPERS)), max_size=4), st.booleans())
def test_wrappers_anywhere_in_a_name_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, wrappers: list[tuple[int, str]], on_base: bool
) -> None:
    def wrap(name: str) -> str:
        words = name.split(".")
        for at, word in wrappers:
            words.insert(min(at, len(words) - 1), word)
        return ".".join(words)

    folder = tmp_path_factory.mktemp("wrapped")
    base, ft = plain(matrices(1)), tuned(plain(matrices(1)))
    base, ft = ({wrap(n): t for n, t in base.items()}, ft) if on_base else (base, {wrap(n): t for n, t in ft.items()})
    made = plan(put(folder / "base", base), put(folder / "ft", ft), layers=("ffn", "attention"))
    assert len(made.units) == 7 and made.kept == ()


def test_two_names_that_differ_in_wrappers_alone_stay_two(tmp_path: Path) -> None:
    tensors = {
        "layers.0.mlp.up_proj.weight": torch.randn(F, H),
        "layers.0.module.mlp.up_proj.weight": torch.randn(F, H),
    }
    made = plan(put(tmp_path / "base", tensors), put(tmp_path / "ft", tuned(tensors)))
    assert {unit.base_name for unit in made.units} == tensors.keys()
    assert all(unit.base_name == unit.name for unit in made.units)


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, H)])
def test_placeholders_of_weights_that_other_processes_hold_are_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    full = plain(matrices())
    ft = tuned(full) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(shape)}
    base = put(tmp_path / "base", full)
    made = plan(base, put(tmp_path / "ft", ft))
    assert [unit.name for unit in made.units] == ["model.layers.0.mlp.up_proj.weight"]
    ((name, reason),) = [(item.name, item.reason) for item in made.kept]
    assert name == "model.layers.1.mlp.up_proj.weight" and "ZeRO-3" in reason
    empty = {name: torch.zeros(shape) for name in full}
    with pytest.raises(SelectionError, match="2 tensors match, but none can be edited .*ZeRO-3"):
        plan(base, put(tmp_path / "all", empty))
    with pytest.raises(SelectionError, match="BASE's is empty, as DeepSpeed ZeRO-3"):
        plan(put(tmp_path / "empty base", empty), put(tmp_path / "full", tuned(full)))
