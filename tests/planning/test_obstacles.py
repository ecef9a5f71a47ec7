"""What stands in the way of an edit: what is kept and why, what is refused, and what a refusal offers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pome import EditSpec, PairingError, SelectionError
from pome.checkpoint.source import open_checkpoint
from pome.config.spec import Override
from pome.editing.session import open_pair
from pome.planning.obstacles import refuse_doubtful_squares
from pome.planning.plan import check_overrides
from pome.planning.units import Plan
from support.checkpoints import LLAMA, perturb, random_llama, write_checkpoint

UP, EMBED = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"


def write_sides(folder: Path, base: Mapping[str, Tensor], ft: Mapping[str, Tensor], **configs: Any) -> list[Path]:
    """[BASE, FT]; `base_config` and `ft_config` are LLAMA unless given."""
    return [
        write_checkpoint(folder / side, tensors, config=configs.get(f"{side}_config", LLAMA))
        for side, tensors in (("base", base), ("ft", ft))
    ]


def plan(sides: list[Path], *layers: str, **options: Any) -> Plan:
    with open_pair(*sides, EditSpec(layers=layers or ("up",), **options)) as opened:
        return opened.plan


def kept(made: Plan) -> dict[str, str]:
    assert all(record.part is None for record in made.kept)
    return {record.name: record.reason for record in made.kept}


def edited(made: Plan) -> list[str]:
    return sorted({unit.name for unit in made.units})


def test_tensors_that_are_no_float_matrices_are_kept_with_the_reason(tmp_path: Path) -> None:
    odd = {
        "odd.vector": torch.zeros(6),
        "odd.scalar": torch.zeros(()),
        "odd.empty": torch.zeros(0, 6),
        "odd.cube": torch.zeros(2, 3, 4),
        "odd.matrix": torch.ones(3, 4),
        "odd.ids": torch.arange(6).reshape(2, 3),
        "odd.mask": torch.ones(2, 3, dtype=torch.bool),
    }
    ft = {name: t + 1 if t.is_floating_point() else t for name, t in odd.items()} | {"odd.new": torch.ones(3, 4)}
    made = plan(write_sides(tmp_path, odd, ft), "re:^odd", allow_missing=True)
    assert kept(made) == {
        "odd.vector": "not a matrix: its shape is [6]",
        "odd.scalar": "not a matrix: its shape is []",
        "odd.empty": "it is empty",
        "odd.cube": "not a matrix: its shape is [2, 3, 4]",
        "odd.ids": "it holds no weights (I64)",
        "odd.mask": "it holds no weights (BOOL)",
        "odd.new": "BASE has no such tensor",
    }
    assert edited(made) == ["odd.matrix"]


@pytest.mark.parametrize(("side", "other"), [("base", "ft"), ("ft", "base")])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_a_matrix_that_is_no_float_on_either_side_is_refused(
    tmp_path: Path, side: str, other: str, dtype: torch.dtype
) -> None:
    tensors = {side: random_llama(), other: random_llama()}
    tensors[side][UP] = torch.ones(40, 16, dtype=dtype)
    sides = write_sides(tmp_path, tensors["base"], tensors["ft"])
    stored = {torch.int8: "I8", torch.int64: "I64", torch.bool: "BOOL"}[dtype]
    with pytest.raises(
        PairingError, match=rf"/{side}/model.safetensors: tensor {UP}: stored as {stored}, which cannot"
    ):
        plan(sides, "re:mlp.up_proj")


@pytest.mark.parametrize("rows", [23, 25])
@pytest.mark.parametrize("name", [EMBED, "lm_head.weight"])
def test_another_vocabulary_is_kept_unless_its_common_rows_are_asked_for(tmp_path: Path, name: str, rows: int) -> None:
    ft = perturb(random_llama()) | {name: torch.randn(rows, 16)}
    sides = write_sides(tmp_path, random_llama(), ft)
    made = plan(sides, "up", "embed", "head")
    (reason,) = (reason for kept_name, reason in kept(made).items() if kept_name == name)
    assert reason == (
        f"its shape is [{rows}, 16], BASE's [24, 16] (another vocabulary; --common-rows edits the rows that both have)"
    )
    common = plan(sides, "up", "embed", "head", common_rows=True)
    assert kept(common) == {} and name in edited(common)
    assert [unit.shape for unit in common.units if unit.name == name] == [(min(rows, 24), 16)]


def test_common_rows_must_be_of_one_width(tmp_path: Path) -> None:
    sides = write_sides(tmp_path, random_llama(), perturb(random_llama()) | {EMBED: torch.randn(24, 17)})
    assert EMBED in kept(plan(sides, "up", "embed", common_rows=True))


def test_another_shape_is_kept_where_everything_was_asked_for_and_refused_where_it_was_itself(tmp_path: Path) -> None:
    base = random_llama() | {"odd.w": torch.ones(3, 4)}
    sides = write_sides(tmp_path, base, perturb(base) | {"odd.w": torch.ones(3, 5)})
    assert kept(plan(sides, "up", "other"))["odd.w"] == "its shape is [3, 5], BASE's [3, 4]"
    with pytest.raises(PairingError, match=r"odd\.w: its shape \[3, 5\] is not BASE's \[3, 4\]"):
        plan(sides, "up", "re:odd")


def test_a_matrix_of_a_role_and_another_shape_is_refused_though_everything_was_asked_for(tmp_path: Path) -> None:
    sides = write_sides(tmp_path, random_llama(), perturb(random_llama()) | {UP: torch.ones(40, 17)})
    with pytest.raises(PairingError, match=r"up_proj\.weight: its shape \[40, 17\] is not BASE's \[40, 16\]"):
        plan(sides, "up", "other")


def test_reasons_for_keeping_tensors_are_counted_the_three_most_frequent_first(tmp_path: Path) -> None:
    base = {"a.v": torch.ones(3)}
    ft = {f"x{i}.m": torch.ones(3, 4) for i in range(4)}
    ft |= {f"x{i}.v": torch.ones(3) for i in range(3)} | {f"y{i}.v": torch.ones(4) for i in range(2)}
    ft |= {"z.v": torch.ones(5)}
    with pytest.raises(SelectionError) as caught:
        plan(write_sides(tmp_path, base, ft, base_config=None, ft_config=None), "re:.")
    said = str(caught.value)
    assert (
        "10 tensors match, but none can be edited (4 x BASE has no such tensor; 3 x not a matrix: its shape is [3]; "
        in said
    )
    assert "2 x not a matrix: its shape is [4]);" in said and "[5]" not in said


def open_sides(folder: Path, base: Mapping[str, Tensor], ft: Mapping[str, Tensor]) -> list[Any]:
    return [open_checkpoint(side) for side in write_sides(folder, base, ft)]


@pytest.mark.parametrize(
    ("base_shape", "ft_shape", "proves"),
    [
        ((4, 6), (6, 4), True),
        ((2, 4, 6), (2, 6, 4), False),  # a stack, which proves nothing of a plain matrix
        ((4, 6), (4, 6), False),
        ((2, 4, 6), (3, 6, 4), False),  # other stacks
        ((2, 6, 4), (4, 6, 2), False),
        ((1, 6), (6, 1), False),  # a row and a column
        ((6, 1), (1, 6), False),
        ((2, 1, 6), (2, 6, 1), False),
        ((2, 2, 4, 6), (2, 2, 6, 4), False),  # a convolution
        ((2, 6), (6, 2), True),
        ((4, 6), (6, 5), False),
        ((4,), (6,), False),
    ],
)
def test_two_shapes_prove_another_orientation(
    tmp_path: Path, base_shape: tuple[int, ...], ft_shape: tuple[int, ...], proves: bool
) -> None:
    names = ("square", "proof")
    base = dict(zip(names, (torch.ones(4, 4), torch.ones(base_shape)), strict=True))
    ft = dict(zip(names, (torch.ones(4, 4), torch.ones(ft_shape)), strict=True))
    sides = open_sides(tmp_path, base, ft)
    pairs = {name: name for name in names}
    try:
        if not proves:
            refuse_doubtful_squares(names[:1], *sides, pairs)
            return
        said = re.escape(f"(proof is {list(ft_shape)}, BASE's {list(base_shape)})")
        with pytest.raises(PairingError, match=f"square: it is square, .*{said}"):
            refuse_doubtful_squares(names[:1], *sides, pairs)
        refuse_doubtful_squares([], *sides, pairs)
        refuse_doubtful_squares(names[:1], *sides, {"square": "square"})
    finally:
        for side in sides:
            side.close()


def test_a_stack_of_squares_is_as_doubtful_and_what_is_not_square_is_not(tmp_path: Path) -> None:
    base = {"stack": torch.ones(3, 4, 4), "wide": torch.ones(4, 4, 5), "tall": torch.ones(4, 5, 4)}
    base |= {"plain": torch.ones(4, 4)}
    base |= {"proof": torch.ones(2, 4, 6)}
    sides = open_sides(tmp_path, base, base | {"proof": torch.ones(2, 6, 4)})
    pairs = {name: name for name in base}
    refuse_doubtful_squares(["wide", "tall", "plain"], *sides, pairs)
    with pytest.raises(PairingError, match="tensor stack: it is square"):
        refuse_doubtful_squares(["wide", "stack"], *sides, pairs)
    for side in sides:
        side.close()


def test_an_override_must_match_an_edited_tensor(tmp_path: Path) -> None:
    made = plan(write_sides(tmp_path, random_llama(), perturb(random_llama())))
    check_overrides(
        made, EditSpec(overrides=(Override(match="up_proj", beta=2.0), Override(match=r"layers\.1", beta=3.0)))
    )
    check_overrides(made, EditSpec())
    for pattern in ("gate_proj", "^mlp"):
        spec = EditSpec(overrides=(Override(match="up_proj", beta=2.0), Override(match=pattern, beta=2.0)))
        with pytest.raises(SelectionError, match=re.escape(repr(pattern))):
            check_overrides(made, spec)


def test_candidates_are_matrices_and_stacks_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    base = {f"blocks.{i}.small.w": torch.ones(4, 4) for i in range(3)}  # 192 bytes
    base |= {"stack": torch.ones(2, 5, 6), "pair.0.w1": torch.ones(4, 4), "pair.1.w1": torch.ones(4, 4)}
    base |= {"vector": torch.ones(900), "video": torch.ones(2, 2, 5, 50), "ids": torch.ones(99, 9, dtype=torch.int64)}
    sides = write_sides(tmp_path, base, base | {"new": torch.ones(6, 7)}, base_config=None, ft_config=None)
    with pytest.raises(SelectionError) as caught:
        plan(sides)
    head, *lines = caught.value.args[0].splitlines()
    assert head.endswith("no tensor matches --layers up; its matrices are, and each line can be pasted:")
    assert [line.split("   ")[1] for line in lines] == [
        "1 of 2 x 5 x 6, role other",
        "3 of 4 x 4, role other",
        "1 of 6 x 7, role other",
        "2 of 4 x 4, role other",
    ]
    assert [re.fullmatch(r"  --layers '?re:\^(.+)\$'?   .*", line)[1] for line in lines] == [
        "stack", r"blocks\.\d+\.small\.w", "new", r"pair\.\d+\.w1"
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "more"), [(19, None), (20, None), (21, 1), (30, 10)])
def test_at_most_twenty_patterns_are_offered(tmp_path: Path, count: int, more: int | None) -> None:
    base = {f"x{'y' * i}.w": torch.ones(2, 3) for i in range(count)}
    sides = write_sides(tmp_path, base, base | {"vector": torch.ones(3)}, base_config=None, ft_config=None)
    with pytest.raises(SelectionError) as caught:
        plan(sides)
    lines = caught.value.args[0].splitlines()[1:]
    assert len([line for line in lines if "--layers" in line]) == min(count, 20)
    assert lines[20:] == ([] if more is None else [f"  ... and {more} more patterns"])


def test_roles_of_a_fused_candidate_are_named_once(tmp_path: Path) -> None:
    base = {"layers.0.mlp.gate_up_proj.weight": torch.ones(8, 4), "layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    sides = write_sides(tmp_path, base, perturb(base))
    with pytest.raises(SelectionError, match=r"1 of 8 x 4, role gate\+up\n.*1 of 4 x 4, role q$"):
        plan(sides, "embed")


def test_groups_and_roles_select_parts_of_a_fused_matrix(tmp_path: Path) -> None:
    base = {"layers.0.mlp.gate_up_proj.weight": torch.ones(8, 4), "layers.0.mlp.down_proj.weight": torch.ones(4, 4)}
    sides = write_sides(tmp_path, base, perturb(base))
    for layers, roles in {
        ("up",): ["up"], ("gate",): ["gate"], ("ffn",): ["down", "gate", "up"], ("down", "up"): ["down", "up"],
        ("re:gate_up",): ["gate", "up"], ("up", "re:gate_up"): ["gate", "up"],
    }.items():  # fmt: skip
        made = plan(sides, *layers)
        assert sorted(part.role for _, part in made.matrices()) == roles


def test_dtypes_and_layouts_of_what_is_written(tmp_path: Path) -> None:
    """A new header for each file in which a tensor changes its dtype, and for no other."""
    base = {name: t.bfloat16() for name, t in random_llama().items()}
    sides = [
        write_checkpoint(tmp_path / side, t, shards=3, config=LLAMA) for side, t in (("b", base), ("f", perturb(base)))
    ]
    assert plan(sides, dtype="bfloat16").layouts == {} == plan(sides).layouts
    made = plan(sides, "re:layers.0.mlp.up_proj", dtype="float32")
    (unit,) = made.units
    assert list(made.layouts) == [unit.file]
    raw, header = made.layouts[unit.file]
    assert header.tensors[unit.name].dtype == unit.out_dtype == "F32" and unit.dtype == "BF16"
    others = [entry for name, entry in header.tensors.items() if name != unit.name]
    assert {entry.dtype for entry in others} == {"BF16"}
    assert (unit.out_start, unit.out_nbytes) == (header.tensors[unit.name].start, 2 * unit.nbytes)
    assert min(entry.start for entry in header.tensors.values()) == len(raw)
    assert (
        sum(entry.end - entry.start for entry in header.tensors.values())
        == 2 * sum(t.numel() for name, t in base.items() if name in header.tensors) + unit.nbytes
    )
