"""Sizes and model type from `config.json`, for the part of a model in which a tensor lies. No torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

_TOWERS = (
    (re.compile(r"talker"), ("talker_config",)),
    (re.compile(r"vision|visual|image|(^|_)vit(_|$)|pixel"), ("vision_config", "vit_config")),
    (
        re.compile(r"audio|speech|sound|wav2vec|whisper"),
        ("audio_config", "speech_config", "sound_config", "audio_encoder_config"),
    ),
    (re.compile(r"qformer"), ("qformer_config",)),
)
_TEXT = ("thinker_config", "text_config", "llm_config", "language_config", "llm", "decoder_config")


def config_of(name: str, config: Config | None) -> Config | None:
    """The part of a (possibly multimodal) config about the tower in which `name` lies; None: not known."""
    tokens = name.split(".")
    while config is not None:
        for tower in sorted({tower for token in tokens for tower in _find_towers(token)}):
            keys = _TOWERS[tower][1]
            found = next((config[key] for key in keys if isinstance(config.get(key), Mapping)), None)
            if found is not None:
                return config_of_text(found)
            if any(isinstance(config.get(key), Mapping) for key in _TEXT):
                return None  # a tower beside a language model, of which the config says nothing we know
        sides = [token for token in tokens[:2] if token in ("encoder", "decoder")]
        side = next((side for side in sides if isinstance(config.get(side), Mapping)), None)
        if side is None:
            return config_of_text(config)
        config, tokens = config[side], tokens[tokens.index(side) + 1 :]
    return None


@functools.lru_cache(1 << 14)
def _find_towers(token: str) -> tuple[int, ...]:
    """Which of _TOWERS a word of a name speaks of."""
    return tuple(i for i, (pattern, _) in enumerate(_TOWERS) if pattern.search(token))


def config_of_text(config: Config) -> Config:
    """The language model's own config inside a multimodal one, of the outer model type where it names none."""
    while True:
        inner = next((config[key] for key in _TEXT if isinstance(config.get(key), Mapping)), None)
        if inner is None:
            return config
        config = {"model_type": config.get("model_type"), **inner}


def model_type_of(config: Config | None) -> str | None:
    """`model_type` of a config, None where it is absent."""
    value = None if config is None else config.get("model_type")
    return value if isinstance(value, str) else None


def size_of(config: Config | None, *keys: str) -> int | None:
    """The first of `keys` that the config gives as a positive integer."""
    for key in keys if config is not None else ():
        value = config.get(key) if config is not None else None
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def hidden_size_of(config: Config | None) -> int | None:
    """Width of the residual stream."""
    return size_of(config, "hidden_size", "n_embd", "d_model", "dim", "embed_dim")


def intermediate_size_of(config: Config | None) -> int | None:
    """Width inside the dense FFN."""
    return size_of(config, "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "inner_dim")


def query_heads_of(config: Config | None) -> int | None:
    """Number of query heads."""
    return size_of(config, "num_attention_heads", "n_head", "n_heads", "num_heads")


def head_size_of(config: Config | None) -> int | None:
    """Entries of one query head."""
    given = size_of(config, "head_dim")
    hidden, heads = hidden_size_of(config), query_heads_of(config)
    if given is not None or hidden is None or heads is None:
        return given
    return hidden // heads


def expert_count_of(config: Config | None) -> int | None:
    """Number of routed experts of one layer."""
    ffn = config.get("ffn_config") if config is not None else None
    inner = size_of(ffn, "moe_num_experts") if isinstance(ffn, Mapping) else None
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
    return inner or size_of(config, *keys)
