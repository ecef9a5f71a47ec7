"""adapter_config.json of a LoRA, as PEFT reads it: what kind it is, and the rank and scaling of every module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pome.checkpoint.choice import FUSE_MLX
from pome.checkpoint.source import Checkpoint
from pome.errors import CheckpointError, printable

MERGE_FIRST = "or merge it with PEFT (merge_and_unload, save_pretrained) and give the merged model as FT"

# Options of a LoRA that do not change its result, or that are followed here. Any other may change it.
_KNOWN = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora",
    "qalora_group_size", "runtime_config", "lora_bias", "target_parameters",
    "trainable_token_indices", "ensure_weight_tying",
})  # fmt: skip
_SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying")
# Initialisations that leave no trace once the weights are trained, and those that also change BASE's weights when the
# adapter is loaded.
_INIT_WITHOUT_TRACE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraConfig:
    """The settings of one LoRA adapter. Raises CheckpointError for a kind of adapter that is not known here."""

    def __init__(self, ft: Checkpoint) -> None:
        self.values: Mapping[str, Any] = ft.adapter_config or {}
        self.where = f"{printable(ft.source)}/adapter_config.json"
        self._refuse_unknown_kinds()
        self.targets = [str(target) for target in self.values.get("target_parameters") or ()]

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def resolve_rank(self, key: str) -> int:
        """The rank of the module or parameter `key`."""
        rank = self._choose("rank_pattern", key, "r")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise CheckpointError(f"{self.where}: r {rank!r} is not a whole number")
        return rank

    def resolve(self, key: str) -> tuple[int, float]:
        """(rank, scaling) of the module or parameter `key`: scaling is alpha / rank, or alpha / sqrt(rank) (rsLoRA)."""
        rank, alpha = self.resolve_rank(key), self.resolve_alpha(key)
        return rank, alpha / math.sqrt(rank) if self.get("use_rslora") else alpha / rank

    def resolve_alpha(self, key: str) -> float:
        """The alpha of the module or parameter `key`."""
        alpha = self._choose("alpha_pattern", key, "lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.where}: lora_alpha {alpha!r} is not a number")
        return alpha

    def list_targets(self, module: str) -> list[str]:
        """The parameters of `module` that `target_parameters` names."""
        found = []
        for target in self.targets:
            around, _, leaf = target.rpartition(".")
            if not around or module == around or module.endswith("." + around):
                found.append(f"{module}.{leaf}")
        return list(dict.fromkeys(found))

    def is_target(self, parameter: str) -> bool:
        """Whether `target_parameters` names the parameter."""
        return any(parameter == target or parameter.endswith("." + target) for target in self.targets)

    def reads_experts_as_in_out(self) -> bool | None:
        """Whether the PEFT that wrote the adapter took stacked experts for (E, in, out) in any model; None: not known.

        PEFT up to 0.18.1 did. From 0.19 on it does so only where transformers marks the experts as stored that way.
        """
        version = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", str(self.get("peft_version") or ""))
        if version is None:
            return None  # 0.17, or a config that another tool wrote
        numbers = int(version[1]), int(version[2]), int(version[3] or 0)
        if numbers[:2] == (0, 18) and numbers[2] > 1:
            return None  # versions under development between the two
        return numbers < (0, 19, 0)

    def list_tokens(self, module: str) -> list[int] | None:
        """The rows of a module's table that were trained token by token; None where the config does not say."""
        given = self.get("trainable_token_indices")
        if isinstance(given, Mapping):
            matches = [rows for key, rows in given.items() if module == key or module.endswith(f".{key}")]
            given = matches[0] if len(matches) == 1 else None
        if isinstance(given, list) and all(type(row) is int and row >= 0 for row in given):
            return given
        return None

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names the module."""
        return any(
            module == saved or module.endswith(f".{saved}") for saved in map(str, self.get("modules_to_save") or ())
        )

    def _choose(self, patterns_key: str, key: str, default_key: str) -> Any:
        """The value of the first pattern, a regular expression for the end of a name, that matches, as PEFT chooses."""
        patterns = self.get(patterns_key)
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            try:
                if re.match(rf"(.*\.)?({pattern})$", key):
                    return value
            except (re.error, RecursionError, OverflowError):
                raise CheckpointError(
                    f"{self.where}: {printable(str(pattern))} is not a regular expression; mend the pattern"
                ) from None
        # A key that is no expression for the name may still be the name itself.
        return patterns.get(key, self.get(default_key)) if isinstance(patterns, Mapping) else self.get(default_key)

    def _refuse_unknown_kinds(self) -> None:
        if "peft_type" not in self.values and ("lora_parameters" in self.values or "fine_tune_type" in self.values):
            raise CheckpointError(f"{self.where}: an adapter of MLX, not of PEFT; {FUSE_MLX}")
        kind = str(self.get("peft_type"))
        if kind.upper() != "LORA":
            raise CheckpointError(f"{self.where}: peft_type {printable(kind)}, not LORA; {MERGE_FIRST}")
        for key, value in self.values.items():
            if value and key not in _KNOWN:
                raise CheckpointError(
                    f"{self.where}: {printable(key)} is set, a LoRA of a kind not known here; {MERGE_FIRST}"
                )
        for key in _SWITCHES:
            if self.get(key) is not None and not isinstance(self.get(key), bool):
                raise CheckpointError(
                    f"{self.where}: {key} is {printable(repr(self.get(key)))}, neither true nor false; correct it as "
                    "the adapter was trained"
                )
        start = str(self.get("init_lora_weights"))
        if start.lower().startswith(_INIT_CHANGES_BASE):
            raise CheckpointError(
                f"{self.where}: init_lora_weights {printable(start)}, which changes BASE's weights too; save the "
                f"adapter again with save_pretrained(..., path_initial_model_for_weight_conversion=...), {MERGE_FIRST}"
            )
        if start.lower() not in _INIT_WITHOUT_TRACE:
            raise CheckpointError(
                f"{self.where}: init_lora_weights {printable(start)}, a LoRA of a kind not known here; {MERGE_FIRST}"
            )
