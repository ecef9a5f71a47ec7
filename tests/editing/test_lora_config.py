"""adapter_config.json: ranks and scalings as PEFT resolves them, read and written."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

import pome
from pome import EditSpec
from pome.checkpoint.lora import LowRank
from pome.checkpoint.lora_config import LoraConfig
from pome.checkpoint.source import Checkpoint
from pome.editing.lora_rewrite import make_config, name_alone
from support.adapters import LINEAR, configure, make_pair
from support.checkpoints import read_tensors

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
WORDS = st.sampled_from(["model", "layers", "0", "1", "11", "mlp", "up_proj", "experts", "a+b", "vision"])
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
PATTERNS = st.one_of(
    NAMES, NAMES.map(re.escape), WORDS.map(lambda word: rf".*\.{re.escape(word)}"), st.just(".*"), st.just("^model.*")
)


def read_config(**values: Any) -> LoraConfig:
    settings = {"peft_type": "LORA", "init_lora_weights": True, "r": 4, "lora_alpha": 6, **values}
    return LoraConfig(Checkpoint("adapter", None, {}, {}, None, None, adapter_config=settings))


def resolve_as_peft(config: dict[str, Any], key: str) -> tuple[int, float]:
    """Rank and scaling by PEFT's own lines (LoraModel._create_and_replace, LoraLayer.update_layer)."""
    chosen = []
    for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        found = get_pattern_key(config[patterns].keys(), key)
        chosen.append(config[patterns].get(found, config[default]))
    rank, alpha = chosen
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


@UNHURRIED
@given(
    ranks=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=4),
    alphas=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=4),
    key=NAMES,
    rslora=st.booleans(),
)
def test_rank_and_scaling_are_those_of_peft(
    ranks: dict[str, int], alphas: dict[str, int], key: str, rslora: bool
) -> None:
    config = read_config(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    assert config.resolve(key) == resolve_as_peft(dict(config.values), key)


@UNHURRIED
@given(st.lists(NAMES, unique=True, min_size=1, max_size=8))
def test_a_written_key_matches_its_own_module_alone(names: list[str]) -> None:
    keys = name_alone(names)
    for name in names:
        assert [other for other in names if re.match(rf"(.*\.)?({keys[other]})$", name)] == [name]


def test_a_written_key_outlives_a_change_of_prefix() -> None:
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.vision.layers.2.mlp.up_proj", "lm_head"]
    keys = name_alone(names)
    for name in names:
        renamed = name.replace("model.", "model.language_model.model.")
        assert [other for other in names if re.match(rf"(.*\.)?({keys[other]})$", renamed)] == [name]


@UNHURRIED
@given(
    patterns=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=3),
    ranks=st.dictionaries(NAMES, st.integers(1, 9), min_size=1, max_size=6),
    rslora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_peft_resolves_what_was_written_in_any_order_of_the_keys(
    patterns: dict[str, int], ranks: dict[str, int], rslora: bool, seed: int
) -> None:
    config = read_config(rank_pattern=patterns, alpha_pattern=patterns, use_rslora=rslora)
    loras = []
    for name, rank in ranks.items():
        old, scaling = config.resolve(name)
        loras.append((LowRank(name, f"{name}.A", f"{name}.B", old, scaling, "linear", False), rank))
    written = json.loads(make_config(config, loras))
    if any((low.rank, low.scaling) != config.resolve(low.key) or low.rank != rank for low, rank in loras):
        for patterns_key in ("rank_pattern", "alpha_pattern"):
            items = list(written[patterns_key].items())
            random.Random(seed).shuffle(items)
            written[patterns_key] = dict(items)
    for low, rank in loras:
        loaded, scaling = resolve_as_peft(written, low.key)
        assert loaded == rank and math.isclose(scaling, low.scaling, rel_tol=1e-12)


OLD_PATTERNS: dict[str, dict[str, Any]] = {
    "an expression for every layer": {"rank_pattern": {r".*\.up_proj": 8}, "alpha_pattern": {r".*\.up_proj": 64}},
    "one end of a name": {"rank_pattern": {"up_proj": 8}, "alpha_pattern": {"mlp.up_proj": 64}},
    "an anchored name": {"alpha_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 64}},
    "one expression in another": {"alpha_pattern": {r".*proj": 5, r".*\.0\..*": 64}},
}


@pytest.mark.parametrize("case", OLD_PATTERNS)
@pytest.mark.parametrize("rounds", [1, 2])
def test_peft_loads_an_adapter_edited_once_or_twice_under_any_pattern(case: str, rounds: int, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR, **OLD_PATTERNS[case])
    source, out = pair.adapter, tmp_path / "out1"
    for number in range(1, rounds + 1):
        full, out = tmp_path / f"full{number}", tmp_path / f"out{number}"
        pome.edit(pair.base, source, full)
        pome.edit(pair.base, source, out, EditSpec(out_format="adapter"))
        assert pome.verify(out, pair.base, source, full=True).ok
        source = out
    wanted, merged = read_tensors(tmp_path / f"full{rounds}"), pair.save_merged(tmp_path / "merged", out)
    base = read_tensors(pair.base)
    for name, tensor in wanted.items():
        change = float((tensor - base[name]).abs().max())
        # Factors of float32 and one rounding of each sum.
        assert float((merged[name] - tensor).abs().max()) <= 1e-5 * change + 1e-6, name


def test_peft_saves_and_loads_an_edited_adapter_again(tmp_path: Path) -> None:
    """A save sorts the patterns."""
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR, alpha_pattern={r".*\.up_proj": 64})
    pome.edit(pair.base, pair.adapter, tmp_path / "out", EditSpec(out_format="adapter", rank=2))
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    config.save_pretrained(tmp_path / "again")
    (tmp_path / "again/adapter_model.safetensors").write_bytes(
        (tmp_path / "out/adapter_model.safetensors").read_bytes()
    )
    one, other = (pair.save_merged(tmp_path / f"merged {name}", tmp_path / name) for name in ("out", "again"))
    assert all((one[name] == other[name]).all() for name in one)


def test_verify_finds_a_pattern_that_peft_would_read_otherwise(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=LINEAR)
    out = tmp_path / "out"
    pome.edit(pair.base, pair.adapter, out, EditSpec(out_format="adapter"))
    made = json.loads((out / "adapter_config.json").read_text())
    pair.adapter.rename(tmp_path / "old")
    pair.adapter = out
    configure(pair, alpha_pattern={".*": 99, **made["alpha_pattern"]})
    manifest = pome.manifest.read_manifest(out / "pome_manifest.json")
    raw = json.loads(manifest.to_json())
    text = (out / "adapter_config.json").read_bytes()
    raw["files"]["adapter_config.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    sealed = pome.manifest.Manifest.from_json(json.dumps(raw), "test").sealed()
    (out / "pome_manifest.json").write_text(sealed.to_json())
    found = pome.verify(out, pair.base, tmp_path / "old", full=True).differences
    assert any("PEFT loads it with rank 3 and scaling 33" in item.what for item in found)
