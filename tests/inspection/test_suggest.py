"""Suggestions and warnings, from surveys whose truth is planted."""

import shlex

import pytest
import torch

from pome.inspection.suggest import list_warnings, suggest
from pome.inspection.survey import survey
from support.checkpoints import LLAMA, llama_pair, write_checkpoint

WIDE = {**LLAMA, "hidden_size": 128, "intermediate_size": 192}
NAMES = {f"model.layers.{i}.mlp.up_proj.weight": (192, 128) for i in range(2)}


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
