"""Scale rules against their formulas."""

import math
from typing import get_args

import pytest
import torch

from pome.choices import SCALES, ScaleName
from pome.kernel.equalize import equalize
from pome.kernel.scale import RULES, KeptSpectrum, find_gain
from support.reference import plant


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("frobenius", math.sqrt(14.0 / 2)),
        ("unit", 1.0),
        ("rms", math.sqrt(6 / 4)),
        ("mean", 2.5),
        ("spectral", 3.0),
    ],
)
def test_each_scale_is_its_formula(scale, expected):
    delta = plant([3.0, 2.0, 1.0, 0.0], 6, 4, dtype=torch.float64)
    edit = equalize(delta, scale=scale, beta=1.5, rank=2)
    assert edit.alpha == pytest.approx(1.5 * expected, rel=1e-12)
    # The edit has k singular values of alpha each.
    assert torch.linalg.svdvals(edit.value)[:2].tolist() == pytest.approx([edit.alpha] * 2, rel=1e-12)
    assert edit.edit_norm == pytest.approx(float(edit.value.norm()), rel=1e-12)


def test_every_choice_of_a_scale_has_its_rule():
    assert list(RULES) == list(SCALES) == list(get_args(ScaleName))
    with pytest.raises(ValueError, match="scale 'loud' is none of frobenius, unit"):
        find_gain("loud", KeptSpectrum(torch.ones(1), 1, (1, 1), 1.0))
