"""Suggestions and warnings, from surveys whose truth is planted, and at each side of every threshold."""

import dataclasses
import shlex
from array import array

import pytest
import torch

from pome.inspection.records import Matrix
from pome.inspection.suggest import list_warnings, suggest
from pome.inspection.survey import survey
from support.checkpoints import LLAMA, llama_pair, write_checkpoint

WIDE = {**LLAMA, "hidden_size": 128, "intermediate_size": 192}
NAMES = {f"model.layers.{i}.mlp.up_proj.weight": (192, 128) for i in range(2)}
# The pattern that a warning gives for the matrices of one name: it matches them and no other.
EXCLUDE = r"--exclude '^model\.layers\.\d+\.mlp\.up_proj\.weight$'"


def make_pair(folder, change, base_dtype=torch.bfloat16, dtype=torch.bfloat16):
    """BASE and FT of two up projections; `change` maps (generator, shape) to the update before it is rounded."""
    generator = torch.Generator().manual_seed(5)
    base = {n: (torch.randn(s, generator=generator) * 0.02).to(base_dtype) for n, s in NAMES.items()}
    ft = {n: (t.double() + change(generator, t.shape).double()).to(dtype) for n, t in base.items()}
    return [write_checkpoint(folder / side, tensors, config=WIDE) for side, tensors in (("base", base), ("ft", ft))]


def low_rank(generator, shape, rank=4, size=0.02):
    B, A = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    return size * B @ A / rank**0.5


def dense(generator, shape, size=0.004):
    return size * torch.randn(shape, generator=generator)


def sparse(generator, shape):
    return dense(generator, shape, 0.01) * (torch.rand(shape, generator=generator) < 0.2)


@pytest.mark.parametrize(
    ("change", "dtypes", "title", "options"),
    [
        (low_rank, (torch.float32, torch.bfloat16), "merged LoRA", ["--rank-rule", "noise-floor"]),
        (low_rank, (torch.float64, torch.float64), "adapter", ["--rank-ratio", "1"]),
        (dense, (torch.bfloat16, torch.bfloat16), "ordinary", []),
        (sparse, (torch.bfloat16, torch.bfloat16), "sparse", ["--rank-rule", "noise-floor"]),
    ],
)
def test_the_kind_of_update_is_recognised(tmp_path, change, dtypes, title, options):
    base, ft = make_pair(tmp_path, change, *dtypes)
    found = survey(base, ft)
    suggestion = suggest(str(base), str(ft), found.matrices)
    assert title in suggestion.title
    words = shlex.split(suggestion.command)
    assert words[:7] == ["pome", "edit", str(base), str(ft), "ft-pome", "--layers", "up"]
    assert words[7 : 7 + len(options)] == options
    assert "rule of thumb" in suggestion.why


def test_an_update_of_rounding_alone_is_not_to_be_edited(tmp_path):
    # FT is BASE rounded to bfloat16: not one direction of the update was learned.
    base, ft = make_pair(tmp_path, lambda _, shape: torch.zeros(shape), torch.float32)
    found = survey(base, ft)
    assert [m.above_noise for m in found.matrices] == [0, 0]
    assert suggest("b", "f", found.matrices).command == ""
    assert list_warnings(found.matrices)[0].count == 2


def test_a_suggested_command_can_be_pasted(tmp_path):
    base, ft = llama_pair(tmp_path)
    odd = "it's; rm -rf $HOME"
    command = suggest(odd, str(ft), survey(base, ft).matrices).command
    assert shlex.split(command)[2] == odd


def test_each_warning_comes_with_the_option_that_answers_it(tmp_path):
    base, ft = make_pair(tmp_path, lambda g, s: dense(g, s, 1e-5), torch.float32)
    warnings = list_warnings(survey(base, ft).matrices)
    assert any("--exclude" in warning.option for warning in warnings)
    base, ft = make_pair(tmp_path / "lora", low_rank, torch.float64, torch.float64)
    assert "--rank-ratio 1" in [warning.option for warning in list_warnings(survey(base, ft).matrices)]


# A full fine-tune of 160 x 80, of which nothing is odd: every test below moves one number of it.
ORDINARY = Matrix(
    name="model.layers.0.mlp.up_proj.weight", part=None, role="up", place="model.layers.0", shape=(160, 80),
    dtype="BF16", base_norm=10.0, delta_norm=1.0, relative_norm=0.1, rank=80, stable_rank=20.0, effective_rank=60.0,
    energy={"0.25": 0.4, "0.5": 0.7, "0.75": 0.9}, noise_floor=0.01, noise_share=0.05, above_noise=70, changed=1.0,
    k={"ratio": 40}, alpha={"frobenius": 0.15}, edit_ratio={"frobenius": 1.0}, rounding=0.1, align_r=8, align_left=0.1,
    align_right=0.1, drift=0.01, spectral_norm=1.0, sigma=array("f", [1.0]),
)  # fmt: skip


def warn(**changed):
    """The options that the warnings of one matrix name."""
    return [notice.option for notice in list_warnings([dataclasses.replace(ORDINARY, **changed)])]


def test_an_ordinary_update_has_no_warning():
    assert warn() == []


@pytest.mark.parametrize(
    ("field", "odd", "sane", "option"),
    [
        ("above_noise", 0, 1, EXCLUDE),  # no direction stands out, or one
        ("noise_share", 0.51, 0.5, "--rank-rule noise-floor --scale mean"),  # more than half
        ("rank", 10, 11, "--rank-ratio 1"),  # an eighth of 80
        ("rounding", 0.31, 0.3, "--dtype float32"),  # over 30 %
        ("changed", 0.49, 0.5, "--rank-rule noise-floor"),  # fewer than half of the entries
        ("relative_norm", 0.31, 0.3, EXCLUDE),  # over 30 % of the weight
    ],
)
def test_each_warning_begins_at_its_threshold(field, odd, sane, option):
    assert warn(**{field: odd}) == [option]
    assert warn(**{field: sane}) == []


def test_noise_is_no_second_warning_where_nothing_stands_above_it():
    assert warn(above_noise=0, noise_share=0.9) == [EXCLUDE]
    assert warn(above_noise=1, noise_share=0.9) == ["--rank-rule noise-floor --scale mean"]


def test_a_warning_counts_its_matrices():
    two = [dataclasses.replace(ORDINARY, rounding=0.9), ORDINARY, dataclasses.replace(ORDINARY, rounding=0.5)]
    assert [notice.count for notice in list_warnings(two)] == [2]


def test_an_unknown_share_of_changed_entries_is_not_few():
    assert warn(changed=None) == []


def test_a_base_of_zeros_is_a_warning():
    assert warn(relative_norm=None) == [EXCLUDE]


def advise(*others, **changed):
    """Title and options of the suggestion for one matrix."""
    found = suggest("b", "f", [dataclasses.replace(ORDINARY, **changed), *others])
    return found.title, shlex.split(found.command)[7:]


@pytest.mark.parametrize(
    ("odd", "sane", "title", "options"),
    [
        ({"rank": 10, "above_noise": 10}, {"rank": 11, "above_noise": 11}, "such as an adapter", ["--rank-ratio", "1"]),
        ({"above_noise": 10}, {"above_noise": 11}, "such as a merged LoRA", ["--rank-rule", "noise-floor"]),
        ({"changed": 0.49}, {"changed": 0.5}, "after reinforcement learning", ["--rank-rule", "noise-floor"]),
        (
            {"noise_share": 0.51}, {"noise_share": 0.5}, "mostly storage rounding",
            ["--rank-rule", "noise-floor", "--scale", "mean"],
        ),
    ],
)  # fmt: skip
def test_each_kind_of_update_begins_at_its_threshold(odd, sane, title, options):
    assert advise() == ("An ordinary full fine-tune", [])
    found = advise(**odd)
    assert found[0].endswith(title) and found[1] == options
    assert advise(**sane) == ("An ordinary full fine-tune", [])


def test_the_scale_mean_is_suggested_where_noise_holds_over_a_tenth_of_the_energy():
    assert advise(above_noise=10, noise_share=0.11)[1] == ["--rank-rule", "noise-floor", "--scale", "mean"]
    assert advise(above_noise=10, noise_share=0.1)[1] == ["--rank-rule", "noise-floor"]


def test_float32_is_suggested_where_rounding_takes_over_30_per_cent():
    assert advise(rounding=0.31)[1] == ["--dtype", "float32"]
    assert advise(rounding=0.3)[1] == []


def test_the_role_is_the_first_of_the_papers_order_with_a_direction_above_noise():
    matrices = [dataclasses.replace(ORDINARY, role=role) for role in ("q", "k", "o", "v", "down", "gate", "up")]
    for role in ("up", "gate", "down", "v", "o", "k", "q"):
        assert shlex.split(suggest("b", "f", matrices).command)[6] == role
        matrices = [dataclasses.replace(m, above_noise=0) if m.role == role else m for m in matrices]
    assert suggest("b", "f", matrices).command == ""
