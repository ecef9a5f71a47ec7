"""The survey of LoRA features: its table has nothing wrong, and a sample of its cells comes out as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.lora_survey import ARCHITECTURES, FEATURES, survey_cell

TABLE = Path(__file__).with_name("lora_survey.md")
SAMPLE = [
    ("granitemoe", "parameters", "right"),  # a stack under another name
    ("phimoe", "parameters", "right"),  # single experts under other names, and a renamed module around them
    ("vit", "plain", "right"),  # every module of a layer renamed
    ("gpt_neox", "whole head", "right"),  # a head under another name
    ("qwen3_moe", "experts, own keys", "right"),
    ("gpt_oss", "parameters, rslora", "right"),
    ("phi3", "regular expressions", "right"),
    ("t5", "tied whole", "right"),
    ("bert", "dora", "full only"),
    ("falcon", "another vocabulary", "-"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "feature", "verdict"), SAMPLE)
def test_a_cell_of_the_survey_comes_out_again(architecture: str, feature: str, verdict: str, tmp_path: Path) -> None:
    cell = survey_cell(architecture, feature, tmp_path / "cell")
    assert cell.verdict == verdict, cell.why


def test_the_table_has_every_feature_on_twenty_architectures_and_nothing_wrong() -> None:
    text = TABLE.read_text(encoding="utf-8")
    (line,) = re.findall(r"^(\d+) architectures: (.*)\.$", text, re.MULTILINE)
    assert int(line[0]) >= 20 and set(line[1].split(", ")) <= ARCHITECTURES.keys()
    counts, _, reasons = text.partition("| feature | architecture |")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in counts.splitlines() if row.startswith("|")]
    head, body = rows[0], rows[2:]
    assert {row[0] for row in body} == FEATURES.keys() | {"all"}
    assert all(row[head.index("wrong")] in ("", "0") for row in body)
    assert "| wrong |" not in reasons
    for row in body:
        if row[0] != "all":
            assert sum(int(cell or 0) for cell in row[1:]) == int(line[0]), row[0]
