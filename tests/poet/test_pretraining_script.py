"""scripts/poet_pretraining.py: all runs of the comparison at a tiny size, resumed, and the table of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers

import poet_pretraining


def run(monkeypatch, out, *more):
    text = Path(poet_pretraining.__file__).read_text() * 3
    (out.parent / "text").write_text(text)
    line = ["poet_pretraining.py", out, "--text", out.parent / "text", "--steps", "3", "--tune-steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*line, "--seeds", "2", "--batch", "2", *more]])
    poet_pretraining.main()


def test_all_runs_are_made_once_and_tabled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(poet_pretraining, "LENGTH", 8)
    monkeypatch.setattr(poet_pretraining, "VALIDATION_WINDOWS", 2)
    monkeypatch.setattr(poet_pretraining, "VOCABULARY", 300)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}

    class Small(transformers.LlamaConfig):
        def __init__(self, **given):
            super().__init__(**{**given, **sizes})

    monkeypatch.setattr(transformers, "LlamaConfig", Small)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="no finished tuning run of adamw"):
        run(monkeypatch, out, "--only", "main")
    run(monkeypatch, out, "--limit", "5")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["adamw"] * 4 + ["muon"]
    run(monkeypatch, out)
    lines = (out / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [json.dumps(row) for row in rows[:5]] == lines[:5]
    phases = {phase: [row for row in rows if row["phase"] == phase] for phase in ("tune", "main", "ablate")}
    assert [len(found) for found in phases.values()] == [16, 8, 18]
    best = min((row for row in phases["tune"] if row["method"] == "poet-fs"), key=lambda row: row["loss"])["rate"]
    assert all(row["rate"] == best for row in phases["main"] if row["method"] == "poet-fs")
    assert all(row["loss"] > 0 and len(row["curve"]) == 3 for row in phases["main"])
    by_method = {row["method"]: row["trained"] for row in phases["main"]}
    assert by_method["poet-fs"] < by_method["poet-bs"] < by_method["adamw"] == by_method["muon"]
    capsys.readouterr()
    run(monkeypatch, out, "--table")
    table = capsys.readouterr().out
    assert (out / "results.jsonl").read_text().splitlines() == lines
    for words in ("| poet-fs |", "| every = 25 |", "| terms = 0, correct = False |", "| adamw, init = normalized |"):
        assert words in table
    assert "| nothing |" in table
