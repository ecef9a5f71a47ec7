"""Options of one extraction: those of an edit with other defaults, and what an adapter holds beside LoRAs. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pome.choices import RankRuleName, ScaleName
from pome.config.options import HOW, OUTPUT, Option, documented
from pome.config.spec import EDIT_OPTIONS, EditSpec
from pome.errors import SpecError

EXTRACT = "extract"
# Projections of an attention that are neither q, k, v nor o, such as those to and from a latent space.
PROJECTIONS = r"re:(attn|attention)\w*\.([\w.]+\.)?\w*_proj\w*\.weight$"


def _again(name: str, **changes: Any) -> Option:
    """An option of `edit`, taken by `extract` too."""
    return dataclasses.replace(EDIT_OPTIONS[name], **{"commands": (EXTRACT,), **changes})


@documented
@dataclass(frozen=True)
class ExtractSpec(EditSpec):
    """One extraction: the options of an edit, whose result becomes a LoRA instead of a checkpoint.

    Of the update D of a matrix the LoRA holds alpha U_k S_k^power V_k^T, with the defaults the best approximation of
    rank k. `rank` or another rule for k must be given. Raises SpecError.
    """

    layers: Annotated[
        tuple[str, ...], _again("layers", instead={EXTRACT: {"default": "ffn, attention and its other projections"}})
    ] = ("ffn", "attention", PROJECTIONS)
    rank: Annotated[int | None, _again("rank", help="Rank of every LoRA: k = min(N, rank of the update).")] = None
    rank_rule: Annotated[RankRuleName, _again("rank_rule")] = "fixed"
    scale: Annotated[ScaleName, _again("scale")] = "unit"
    beta: Annotated[float, _again("beta", help="Factor of the update; 1 leaves it as it is.", more="")] = 1.0
    power: Annotated[
        float,
        _again(
            "power",
            help="A LoRA of alpha U_k S_k^P V_k^T: 1 keeps the singular values, 0 equalizes.",
            more="1 with `--scale unit` is the best approximation of rank k; 0 with `--scale frobenius` POME's edit.",
        ),
    ] = 1.0
    common_rows: Annotated[bool, _again("common_rows", commands=())] = False
    allow_missing: Annotated[bool, _again("allow_missing")] = False
    allow_other_base: Annotated[bool, _again("allow_other_base")] = False
    allow_other_depth: Annotated[bool, _again("allow_other_depth")] = False
    save_modules: Annotated[
        bool,
        Option(
            "Take changed heads, embeddings, norms and biases along whole (modules_to_save).",
            more="Without it they are named with the norm that is lost. vLLM loads no adapter that has any.",
            group=OUTPUT, commands=(EXTRACT,),
        ),
    ] = False  # fmt: skip
    uniform_rank: Annotated[
        bool,
        Option("Pad every LoRA with zeros to the largest rank.", group=HOW, commands=(EXTRACT,)),
    ] = False  # fmt: skip

    def __post_init__(self) -> None:
        if self.rank is None and self.rank_rule == "fixed":
            raise SpecError(
                "rank: give the rank of the LoRAs, or how it is chosen (energy, rank_ratio, rank_rule)",
                options=["rank", "energy", "rank_ratio", "rank_rule"],
            )
        super().__post_init__()
        for name, default in (
            ("dtype", "keep"),
            ("out_format", "full"),
            ("common_rows", False),
            ("method", "equalize"),
        ):
            if getattr(self, name) != default:
                raise SpecError(f"{name}: an adapter has no such option; leave it out", options=[name])


def find_spec_class(options: Mapping[str, Any]) -> type[EditSpec]:
    """The class of the spec that a manifest holds: of an extraction, or of an edit."""
    return ExtractSpec if "save_modules" in options else EditSpec


def read_spec(options: Mapping[str, Any]) -> EditSpec:
    """The spec that a manifest holds. Raises SpecError."""
    return find_spec_class(options).from_mapping(options)
