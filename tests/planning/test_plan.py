"""What will be edited and what kept, and why; what does not fit together is refused before a byte is read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pome import EditSpec, PairingError, SelectionError, edit, verify
from pome.checkpoint.source import Checkpoint
from pome.editing.session import open_pair
from pome.planning.units import Plan
from support.checkpoints import (
    HIDDEN,
    INNER,
    LLAMA,
    assert_only_edited,
    llama_pair,
    perturb,
    random_llama,
    read_ranges,
    write_checkpoint,
)

UP = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]


def plan(base: Path, ft: Path, **options: Any) -> Plan:
    with open_pair(base, ft, EditSpec(**options)) as opened:
        return opened.plan


def write_pair(
    folder: Path,
    base: Mapping[str, Tensor],
    ft: Mapping[str, Tensor],
    base_config: Mapping[str, Any] | None = LLAMA,
    ft_config: Mapping[str, Any] | None = LLAMA,
) -> tuple[Path, Path]:
    return (
        write_checkpoint(folder / "base", base, config=base_config),
        write_checkpoint(folder / "ft", ft, config=ft_config),
    )


def edited(plan: Plan) -> list[str]:
    return sorted({unit.name for unit in plan.units})


def test_no_tensor_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = llama_pair(tmp_path)
    monkeypatch.delattr(Checkpoint, "read")
    for folder in (base, ft):
        file = folder / "model.safetensors"
        start = min(start for start, _ in read_ranges(file).values())
        raw = file.read_bytes()
        file.write_bytes(raw[:start] + b"\xff" * (len(raw) - start))  # NaN throughout, which an edit refuses
    assert edited(plan(base, ft)) == UP


def test_the_ranges_are_those_of_the_format(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, shards=3, dtype=torch.bfloat16)
    for unit in plan(base, ft, layers=("ffn", "q")).units:
        start, end = read_ranges(ft / unit.file)[unit.name]
        assert (unit.start, unit.nbytes, unit.out_start, unit.out_nbytes) == (start, end - start, start, end - start)
        ranges = [read_ranges(file).get(unit.base_name) for file in base.glob("*.safetensors")]
        assert (unit.base_start, unit.base_start + unit.base_nbytes) in ranges


@pytest.mark.parametrize("layers", [("up",), ("ffn",), ("attention",), ("embed", "head"), (r"re:layers\.0\.",)])
def test_a_selection_matches_what_its_names_say(tmp_path: Path, layers: tuple[str, ...]) -> None:
    patterns = {
        "up": "up_proj", "ffn": "mlp", "attention": "q_proj", "embed": "embed_tokens", "head": "lm_head"
    }  # fmt: skip
    base, ft = llama_pair(tmp_path)
    wanted = [patterns.get(name, name.removeprefix("re:")) for name in layers]
    names = [name for name in random_llama() if any(re.search(pattern, name) for pattern in wanted)]
    assert edited(plan(base, ft, layers=layers)) == sorted(names)


def test_exclusion_is_stronger_than_selection(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    assert edited(plan(base, ft, layers=("up", "re:gate"), exclude=(r"layers\.0", "gate"))) == UP[1:]


def test_bytes_and_counts_are_those_of_the_files(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path, dtype=torch.bfloat16)
    made = plan(base, ft, dtype="float32")
    size = 2 * HIDDEN * INNER
    assert (made.bytes_read, made.bytes_written) == (2 * 2 * size, 2 * 2 * size)
    assert (made.tensor_count, len(made.units)) == (len(random_llama()), 2)


def test_the_document_of_a_dry_run(tmp_path: Path) -> None:
    base = random_llama() | {"lm_head.weight": torch.zeros(20, HIDDEN)}
    base, ft = write_pair(tmp_path, base, perturb(random_llama()))
    document = plan(base, ft, layers=("up", "head")).to_json()
    file = "model.safetensors"
    assert document["edit"] == [
        {"name": name, "part": None, "file": file, "role": "up", "shape": [INNER, HIDDEN], "dtype": "F32"}
        for name in UP
    ]
    assert [(item["name"], "another vocabulary" in item["reason"]) for item in document["keep"]] == [
        ("lm_head.weight", True)
    ]
    size = 4 * HIDDEN * INNER
    assert (document["bytes_read"], document["bytes_written"]) == (4 * size, 2 * size)


def test_a_selected_vector_and_a_tensor_that_base_lacks_are_kept_with_the_reason(tmp_path: Path) -> None:
    base = {name: t for name, t in random_llama().items() if name != UP[0]}
    pair = write_pair(tmp_path, base, perturb(random_llama()))
    made = plan(*pair, layers=("up", "re:^model.norm"), allow_missing=True)
    assert edited(made) == UP[1:]
    assert {kept.name: kept.reason for kept in made.kept} == {
        UP[0]: "BASE has no such tensor",
        "model.norm.weight": f"not a matrix: its shape is [{HIDDEN}]",
    }


def test_nothing_in_common_is_an_error_that_asks_for_the_right_base(tmp_path: Path) -> None:
    base = {f"other{i}": torch.zeros(3, 3) for i in range(2)}
    pair = write_pair(tmp_path, base, random_llama())
    with pytest.raises(SelectionError, match="2 tensors match, but none can be edited .*is .*base the model"):
        plan(*pair)


def test_a_selection_without_a_match_offers_lines_that_work_when_pasted(tmp_path: Path) -> None:
    base = {f"blocks.{i}.odd+name.kernel": torch.zeros(6, 4) for i in range(3)} | {"table": torch.zeros(9, 4)}
    pair = write_pair(tmp_path, base, perturb(base), None, None)
    with pytest.raises(SelectionError) as caught:
        plan(*pair)
    head, *lines = caught.value.args[0].splitlines()
    assert "no tensor matches --layers up" in head
    assert len(lines) == 2
    found = [re.fullmatch(r"  --layers '(re:.+)'   (\d+) of (\d+) x (\d+), role other", line) for line in lines]
    assert [match.groups()[1:] for match in found if match] == [("3", "6", "4"), ("1", "9", "4")]
    pasted = plan(*pair, layers=(found[0][1],) if found[0] else ())
    assert edited(pasted) == sorted(name for name in base if "odd" in name)
    with pytest.raises(SelectionError, match="no tensor matches layers up without x"):
        plan(*pair, exclude=("x",))


def test_a_suggested_option_is_quoted_for_the_shell_whatever_the_name(tmp_path: Path) -> None:
    base = {"x';id>PWNED;'": torch.zeros(6, 4), "esc\x1b": torch.zeros(5, 4), "n" * 300: torch.zeros(4, 4)}
    pair = write_pair(tmp_path, base, perturb(base), None, None)
    with pytest.raises(SelectionError) as caught:
        plan(*pair)
    lines = [line.rpartition("   ")[0] for line in caught.value.args[0].splitlines()[1:]]
    option, pattern = shlex.split(lines[0])
    assert option == "--layers" and edited(plan(*pair, layers=(pattern,))) == ["x';id>PWNED;'"]
    assert lines[1:] == [
        "  (a name that cannot be pasted) esc\\x1b", f"  (a name that cannot be pasted) {'n' * 197}..."
    ]  # fmt: skip


def test_no_two_units_share_a_key(tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.experts.up_proj"
    shapes = {stack: (2, 40, 16), f"{stack}#0": (40, 16), f'["{stack}", 0]': (40, 16), f"{stack}#0#1": (40, 16)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    made = plan(*write_pair(tmp_path, tensors, perturb(tensors)), layers=("re:up_proj",))
    assert len({unit.key for unit in made.units}) == len(made.units) == 5


def test_a_checkpoint_without_a_matrix_says_so(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3, 3, dtype=torch.int32)}
    with pytest.raises(SelectionError, match="holds no floating-point matrix at all"):
        plan(*write_pair(tmp_path, tensors, {name: t + 1 for name, t in tensors.items()}))


def test_shapes_that_disagree_name_the_tensor_and_both(tmp_path: Path) -> None:
    ft = perturb(random_llama()) | {UP[1]: torch.zeros(INNER, HIDDEN + 1)}
    pair = write_pair(tmp_path, random_llama(), ft)
    with pytest.raises(PairingError, match=rf"{UP[1]}: its shape \[40, 17\] is not BASE's \[40, 16\]; .*exclude"):
        plan(*pair)
    assert edited(plan(*pair, exclude=(r"layers\.1\.",))) == UP[:1]


def test_another_vocabulary_keeps_embedding_and_head(tmp_path: Path) -> None:
    ft = perturb(random_llama()) | {
        name: torch.ones(26, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    base, ft_folder = write_pair(tmp_path, random_llama(), ft)
    made = plan(base, ft_folder, layers=("up", "embed", "head"))
    assert edited(made) == UP
    assert sorted(kept.name for kept in made.kept) == ["lm_head.weight", "model.embed_tokens.weight"]
    edit(base, ft_folder, tmp_path / "out", EditSpec(layers=("up", "embed", "head")))
    assert_only_edited(ft_folder, tmp_path / "out", UP)


@pytest.mark.parametrize("rows", [(23, 26), (26, 23)])
def test_common_rows_of_another_vocabulary_are_edited_when_the_user_says_so(
    tmp_path: Path, rows: tuple[int, int]
) -> None:
    """Both a grown and a shrunk vocabulary: the rows that both have are a matrix, those that one has stay FT's."""
    name = "model.embed_tokens.weight"
    base = random_llama() | {name: torch.randn(rows[0], HIDDEN)}
    ft = perturb(base) | {name: torch.randn(rows[1], HIDDEN)}
    base_folder, ft_folder = write_pair(tmp_path, base, ft)
    manifest = edit(
        base_folder, ft_folder, tmp_path / "out", EditSpec(layers=("embed",), common_rows=True, allow_other_base=True)
    )
    (record,) = manifest.tensors
    assert (record.name, record.shape) == (name, (23, HIDDEN))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out[name][23:], ft[name][23:])
    D = ft[name][:23].double() - base[name][:23].double()
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    k = round(0.5 * len(S))
    exact = base[name][:23].double() + D.norm() / k**0.5 * U[:, :k] @ Vh[:k]
    assert torch.allclose(out[name][:23].double(), exact, rtol=0, atol=1e-6)  # float32 of entries around one
    assert all(torch.equal(out[n], ft[n]) for n in ft if n != name)
    assert verify(tmp_path / "out", base_folder, ft_folder, full=True).ok
    with pytest.raises(PairingError, match="only its common rows"):
        plan(base_folder, ft_folder, layers=("embed",), common_rows=True, dtype="bfloat16")


def test_square_weights_stored_in_two_orientations_are_refused(tmp_path: Path) -> None:
    """GPT-2 stores (in, out), GPT-BigCode (out, in): a square weight shows it by its config alone."""
    name = "transformer.h.0.mlp.c_fc.weight"
    sizes = {"n_embd": 8, "n_inner": 8, "n_head": 2}
    tensors = {name: torch.randn(8, 8)}
    pair = write_pair(
        tmp_path, tensors, perturb(tensors), {"model_type": "gpt2", **sizes}, {"model_type": "gpt_bigcode", **sizes}
    )
    with pytest.raises(PairingError, match=rf"{name}: FT \(gpt_bigcode\) and BASE \(gpt2\) store it differently"):
        plan(*pair)


@pytest.mark.parametrize("lacking", ["base", "ft"])
@pytest.mark.parametrize(
    ("shapes", "config", "parts"),
    [
        ({"mlp.dense_h_to_4h.weight": (80, 16)}, {"model_type": "chatglm", "ffn_hidden_size": 40}, ["other: None"]),
        (
            {"mlp.experts.gate_up_proj": (1, 16, 48)},
            {"model_type": "gpt_oss", "hidden_size": 16, "quantization_config": {"quant_method": "mxfp4"}},
            ["gate: expert=0,half=gate", "up: expert=0,half=up"],
        ),
    ],
)
def test_a_side_without_a_config_is_read_by_the_others(
    tmp_path: Path, lacking: str, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], parts: list[str]
) -> None:
    tensors = {f"model.layers.0.{name}": torch.randn(shape) for name, shape in shapes.items()}
    configs = [None if lacking == side else config for side in ("base", "ft")]
    pair = write_pair(tmp_path, tensors, perturb(tensors), *configs)
    made = plan(*pair, layers=("re:mlp",))
    assert [f"{part.role}: {unit.label(part)}" for unit, part in made.matrices()] == parts


@pytest.mark.parametrize("square", ["h.0.attn.c_proj.weight", "h.0.mlp.experts.down_proj"])
def test_a_square_matrix_beside_turned_ones_is_refused(tmp_path: Path, square: str) -> None:
    """As nanoGPT's Linear beside transformers' Conv1D: only the matrices that are not square show it."""
    base = {square: torch.randn(8, 8), "h.0.mlp.c_fc.weight": torch.randn(32, 8), "row": torch.randn(1, 8)}
    ft = {name: t.T.contiguous() for name, t in base.items()}
    gpt2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2}
    pair = write_pair(tmp_path, base, ft, None, gpt2)
    said = rf"{square}: it is square, .*c_fc.weight is \[8, 32\], BASE's \[32, 8\]\); convert"
    with pytest.raises(PairingError, match=said):
        plan(*pair, layers=(f"re:{square}",))
    only_row = [
        write_checkpoint(tmp_path / name, {n: side[n] for n in (square, "row")})
        for name, side in (("b", base), ("f", ft))
    ]
    assert edited(plan(*only_row, layers=(f"re:{square}",))) == [square]


def test_head_counts_that_disagree_are_refused_for_fused_attention(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    tensors = {name: torch.randn(48, 16)}
    configs = [{"model_type": "gpt_neox", "hidden_size": 16, "num_attention_heads": heads} for heads in (2, 4)]
    pair = write_pair(tmp_path, tensors, perturb(tensors), *configs)
    with pytest.raises(PairingError, match="store it differently"):
        plan(*pair, layers=("attention",))


def test_quantized_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    base, ft = random_llama(), perturb(random_llama())
    ft[UP[0]] = torch.zeros(INNER, HIDDEN, dtype=torch.int8)
    pair = write_pair(tmp_path, base, ft, LLAMA, LLAMA)
    with pytest.raises(PairingError, match=rf"{UP[0]}: stored as I8, which cannot be edited; save .* in bfloat16"):
        plan(*pair)


def test_a_name_that_would_rewrite_the_terminal_is_shown_escaped(tmp_path: Path) -> None:
    name = "layers.0.mlp.\x1b[2Jup_proj.weight"
    tensors = {name: torch.zeros(4, 4)}
    pair = write_pair(tmp_path, tensors, perturb(tensors), None, None)
    with pytest.raises(SelectionError) as caught:
        plan(*pair)
    assert "\x1b" not in str(caught.value)


def test_the_same_files_as_base_and_ft_are_refused(tmp_path: Path) -> None:
    base, ft = llama_pair(tmp_path)
    (tmp_path / "link").symlink_to(ft)
    for other in (ft, tmp_path / "link", ft / "model.safetensors"):
        with pytest.raises(PairingError, match="BASE and FT are the same files"):
            plan(other, ft)


def test_experts_are_units_of_their_own(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: torch.randn(3, 16, 2 * 24)}
    config = {"model_type": "gpt_oss", "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 3}
    base, ft = write_pair(tmp_path, tensors, perturb(tensors), config, config)
    save_file({name: tensors[name]}, base / "model.safetensors")
    made = plan(base, ft)
    start, end = read_ranges(ft / "model.safetensors")[name]
    size = (end - start) // 3
    assert [(unit.start, unit.nbytes) for unit in made.units] == [(start + i * size, size) for i in range(3)]
    assert [unit.label(part) for unit, part in made.matrices()] == [f"expert={i},half=up" for i in range(3)]


@pytest.mark.parametrize(
    ("ft_dtype", "base_dtype", "dtype"),
    [(torch.bfloat16, torch.float32, "keep"), (torch.float32, torch.bfloat16, "float16"),
     (torch.float64, torch.float16, "float32")],
)  # fmt: skip
def test_an_expert_is_read_and_written_where_its_bytes_lie_whatever_the_dtypes(
    ft_dtype: torch.dtype, base_dtype: torch.dtype, dtype: str, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"model_type": "gpt_oss", "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 3}
    stack = {name: torch.randn(3, 16, 48, dtype=torch.float64)}
    sides = write_pair(
        tmp_path, {name: stack[name].to(base_dtype)}, {name: perturb(stack)[name].to(ft_dtype)}, config, config
    )
    edit(*sides, tmp_path / "out", EditSpec(dtype=dtype))
    folders = sides[1], sides[0], tmp_path / "out"
    tensors = [load_file(folder / "model.safetensors")[name] for folder in folders]
    raw = [(folder / "model.safetensors").read_bytes() for folder in folders]
    units = plan(*sides, dtype=dtype).units
    assert len(units) == 3
    for i, unit in enumerate(units):
        places = (unit.start, unit.nbytes), (unit.base_start, unit.base_nbytes), (unit.out_start, unit.out_nbytes)
        for (start, size), file, tensor in zip(places, raw, tensors, strict=True):
            assert file[start : start + size] == tensor[i].contiguous().view(torch.uint8).numpy().tobytes()
