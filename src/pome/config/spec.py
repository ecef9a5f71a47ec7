"""Options of one edit: a frozen dataclass, made from the command line, from YAML or in Python. No torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pome.choices import (
    DTYPES,
    ENGINES,
    GROUPS,
    METHODS,
    MOST_POWER,
    OUT_FORMATS,
    RANK_RULES,
    ROLES,
    SCALES,
    DtypeName,
    EngineName,
    MethodName,
    OutFormatName,
    RankRuleName,
    ScaleName,
)
from pome.config.conflicts import (
    NUMBER_OF,
    RANK_OPTIONS,
    check_conflicts,
    check_rank_options,
    find_idle,
    merge_options,
    refuse_beside_method,
)
from pome.config.options import (
    HOW,
    OUTPUT,
    RUN,
    WHAT,
    Option,
    Range,
    check_pattern,
    documented,
    find_options,
    nearest,
)
from pome.config.preset import fill_in_preset
from pome.config.reading import read_address, read_device, read_layers, read_patterns
from pome.errors import SpecError, printable

if TYPE_CHECKING:
    from typing_extensions import Self

SHARE = Range(0, 1, above=True)


@dataclass(frozen=True, init=False)
class Override:
    """Other options for the tensors whose name `match` finds (a regular expression, searched for).

    The options are those of EditSpec that are declared with `override`; None leaves one as it is. Raises SpecError for
    a pattern that is none, an unknown option, and an override that changes nothing; values are checked together with
    those of the spec that it stands in.
    """

    match: str
    values: tuple[tuple[str, Any], ...]  # by name, in EditSpec's order

    def __init__(self, match: str, **options: Any) -> None:
        if not isinstance(match, str) or not match:
            raise SpecError("overrides: each needs match, a regular expression over tensor names")
        check_pattern("overrides", match)
        known = list_overridable()
        may = f"it may set {', '.join(known)}"
        for key in options:
            if key not in known:
                hint = nearest(key, ("match", *known)) or f"; {may}"
                raise SpecError(f"overrides: unknown key {printable(key)!r}{hint}")
        object.__setattr__(self, "match", match)
        given = tuple((key, options[key]) for key in known if options.get(key) is not None)
        object.__setattr__(self, "values", given)
        if not given:
            raise SpecError(f"overrides: {printable(match)!r} changes nothing; {may}")
        try:
            check_rank_options(self.options, find_options(EditSpec))
        except SpecError as error:
            raise SpecError(f"overrides: {printable(match)!r}: {error}") from None

    @property
    def options(self) -> dict[str, Any]:
        """The options that it changes, by name."""
        return dict(self.values)

    def to_mapping(self) -> dict[str, Any]:
        """The override as a mapping, as in YAML."""
        return {"match": self.match, **self.options}


def list_overridable() -> tuple[str, ...]:
    """The options that an override may set."""
    return tuple(name for name, option in find_options(EditSpec).items() if option.override)


def _read_overrides(key: str, value: object) -> tuple[Override, ...]:
    """Overrides as such or as mappings, from YAML, Python or a manifest."""
    if not isinstance(value, (tuple, list)):
        raise SpecError(f"{key}: not a list; write '- match: PATTERN' lines", options=[key])
    overrides = []
    for item in value:
        if not isinstance(item, (Override, Mapping)):
            raise SpecError(f"{key}: each must be 'key: value' lines, one of them match", options=[key])
        if isinstance(item, Mapping):
            item = Override(**{"match": "", **{str(name): item[name] for name in item}})
        overrides.append(item)
    return tuple(overrides)


@documented
@dataclass(frozen=True)
class EditSpec:
    """One edit, every option resolved; the names are those of the command line, of YAML and of the manifest.

    D = W_ft - W_base is the delta of a matrix, m x n, s_1 >= s_2 >= ... its singular values and rank the number of
    them that are not zero. The edit is W_base + alpha U_k S_k^power V_k^T with alpha = beta * alpha_0 (POME, arXiv
    2510.06627, equations 12 and 18, with a power of 0); with the method `equivalence` it is W_base + beta (W_E -
    W_base), where W_E = U_ft S_base V_ft^T (POET, arXiv 2506.08001). Raises SpecError for a value out of range and for
    options that exclude each other. `rank` given turns the rule `ratio` into `fixed`.
    """

    layers: Annotated[
        tuple[str, ...],
        Option(
            "Role, group or re:PATTERN over tensor names; repeatable.",
            more="Roles: " + " ".join(ROLES) + ". Groups: "
            + "; ".join(f"{group} = {', '.join(roles)}" for group, roles in GROUPS.items()) + ".",
            metavar="NAME", group=WHAT, axis=True, read=read_layers, suggestions=(*ROLES, *GROUPS),
            instead={
                "sweep": {"metavar": "A,B+C", "help": "Roles to try, by commas; + joins."},
                "inspect": {"default": "all"},
            },
        ),
    ] = ("up",)  # fmt: skip
    exclude: Annotated[
        tuple[str, ...],
        Option(
            "Tensors to leave alone (regex); repeatable.", metavar="PATTERN", group=WHAT, read=read_patterns
        ),
    ] = ()  # fmt: skip
    method: Annotated[
        MethodName,
        Option(
            "What takes the place of a matrix.",
            more="With `equivalence` the options of rank, scale and power have no effect and are refused, and `--beta` "
            "gives W_base + B (W_E - W_base).",
            metavar="NAME", group=HOW, choices=METHODS, axis=True, override=True, commands=("edit", "sweep"),
        ),
    ] = "equalize"  # fmt: skip
    rank_ratio: Annotated[
        float,
        Option(
            "k = max(1, round(K * rank)).",
            more="rank is the number of singular values of the delta that are not zero.",
            metavar="K", group=HOW, range=SHARE, axis=True, override=True,
        ),
    ] = 0.5  # fmt: skip
    rank: Annotated[
        int | None,
        Option(
            "k = min(N, rank).",
            metavar="N", group=HOW, axis=True, override=True, commands=("edit", "sweep"),
        ),
    ] = None  # fmt: skip
    rank_rule: Annotated[
        RankRuleName,
        Option(
            "How k is chosen.",
            metavar="NAME", group=HOW, choices=RANK_RULES, axis=True, override=True, commands=("edit", "sweep"),
        ),
    ] = "ratio"  # fmt: skip
    energy: Annotated[
        float,
        Option(
            "Least k that holds E of the squared norm; alone it means the rule energy.",
            metavar="E", group=HOW, range=SHARE, axis=True, override=True,
        ),
    ] = 0.9  # fmt: skip
    scale: Annotated[
        ScaleName,
        Option(
            "Rule for alpha_0 (alpha = beta * alpha_0).",
            metavar="NAME", group=HOW, choices=SCALES, axis=True, override=True, commands=("edit", "sweep"),
        ),
    ] = "frobenius"  # fmt: skip
    beta: Annotated[
        float,
        Option(
            "Factor; 1 keeps the update's norm.",
            more="The paper's best lay between 1.3 and 2.5 by model (its Table 13).",
            metavar="B", group=HOW, range=Range(1e-6, 1e6), axis=True, override=True, commands=("edit", "sweep"),
        ),
    ] = 1.0  # fmt: skip
    power: Annotated[
        float,
        Option(
            "Edit alpha U_k S_k^P V_k^T: 0 equalizes, 1 keeps the singular values.",
            more="With `--scale unit`, 1 is plain truncation (the paper's Figure 1). Scales keep their meaning for the "
            "singular values of the edit.",
            metavar="P", group=HOW, range=Range(0, MOST_POWER), axis=True, override=True, commands=("edit", "sweep"),
        ),
    ] = 0.0  # fmt: skip
    device: Annotated[
        str,
        Option(
            "auto, cpu, cuda, cuda:N or mps.",
            more="`auto` is every CUDA device, else MPS, else the CPU; `cuda` is every CUDA device.",
            metavar="DEVICE", group=RUN, read=read_device, suggestions=("auto", "cpu", "cuda", "mps"),
        ),
    ] = "auto"  # fmt: skip
    dtype: Annotated[
        DtypeName,
        Option(
            "Dtype of the edited tensors.",
            metavar="NAME", group=OUTPUT, choices=DTYPES, commands=("edit", "sweep"), hidden_in=("sweep",),
        ),
    ] = "keep"  # fmt: skip
    engine: Annotated[
        EngineName,
        Option(
            "Where matrices are worked on.",
            metavar="NAME", group=RUN, choices=ENGINES, commands=("edit", "sweep"), everyday=False,
        ),
    ] = "local"  # fmt: skip
    ray_address: Annotated[
        str | None,
        Option(
            "The Ray cluster: its head's HOST:PORT, or auto for the one of this machine.",
            more="Without it, engine ray starts Ray here and stops it at the end. No part of the manifest.",
            metavar="ADDRESS", group=RUN, read=read_address, commands=("edit", "sweep"), everyday=False,
        ),
    ] = None  # fmt: skip
    out_format: Annotated[
        OutFormatName,
        Option(
            "Form of OUT where FT is an adapter.",
            metavar="NAME", group=OUTPUT, choices=OUT_FORMATS, commands=("edit", "sweep"), hidden_in=("sweep",),
        ),
    ] = "full"  # fmt: skip
    dequantize: Annotated[
        bool, Option("See fp8 weights with block scales as bfloat16, and write them so.", group=RUN, everyday=False)
    ] = False
    common_rows: Annotated[
        bool, Option("Edit the first rows that resized embeddings share.", group=WHAT, everyday=False)
    ] = False
    allow_missing: Annotated[
        bool,
        Option(
            "Go on where BASE lacks whole groups of the selection, and keep them as in FT.",
            group=WHAT, commands=("edit", "sweep"), everyday=False,
        ),
    ] = False  # fmt: skip
    allow_other_base: Annotated[
        bool,
        Option(
            "Go on where BASE does not look like the model that FT was trained from.",
            group=WHAT, commands=("edit", "sweep"), everyday=False,
        ),
    ] = False  # fmt: skip
    allow_other_depth: Annotated[
        bool,
        Option(
            "Pair layers by number where BASE and FT have different numbers of layers.",
            group=WHAT, commands=("edit", "sweep", "inspect"), everyday=False,
        ),
    ] = False  # fmt: skip
    overrides: Annotated[
        tuple[Override, ...],
        Option(
            "Other options for tensors whose names a pattern finds; in YAML and Python alone, later ones win.",
            group=WHAT, commands=("edit", "sweep"), on_command_line=False, read=_read_overrides,
        ),
    ] = ()  # fmt: skip

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen; what is put here only normalises what was given
        for name, option in find_options(type(self)).items():
            put(self, name, option.check(getattr(self, name)))
        if self.rank is not None and self.rank_rule == "ratio":
            put(self, "rank_rule", "fixed")
        check_conflicts(self, find_options(EditSpec))
        for override in self.overrides:
            self._apply(override)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """A spec from options by name; a number alone means its rule, as `energy` means the rule `energy`."""
        chosen = fill_in_preset(options)
        known = find_options(cls)
        for key in chosen:
            if key not in known:
                raise SpecError(f"unknown option {printable(str(key))!r}{nearest(str(key), known)}")
        for rule, number in NUMBER_OF.items():
            if RANK_OPTIONS & {key for key, value in chosen.items() if value is not None} == {number}:
                if rule != "ratio" and number in find_idle(chosen.get("method")):
                    refuse_beside_method(number, chosen["method"])
                chosen["rank_rule"] = rule
        return cls(**chosen)

    @classmethod
    def from_given(cls, options: Mapping[str, Any]) -> Self:
        """A spec from options that a user typed: one that cannot take effect is refused."""
        spec = cls.from_mapping(options)
        check_rank_options(options, find_options(EditSpec))
        return spec

    def resolve(self, name: str) -> Self:
        """The spec for one tensor: every override that matches its name applied in turn, and none left."""
        spec = self
        for override in self.overrides:
            if re.search(override.match, name):
                spec = spec._apply(override)
        return dataclasses.replace(spec, overrides=()) if self.overrides else self

    def _apply(self, override: Override) -> Self:
        """Options that choose k set aside all that was said of choosing k before."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        merged = merge_options({**values, "overrides": ()}, override.options)
        try:
            return self.from_mapping(merged)
        except SpecError as error:
            raise SpecError(f"overrides: {printable(override.match)!r}: {error}") from None

    def to_mapping(self) -> dict[str, Any]:
        """Every option as resolved, in JSON's types, but for where a cluster is: that is no part of what is made."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["ray_address"]
        values["overrides"] = [override.to_mapping() for override in self.overrides]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


EDIT_OPTIONS = find_options(EditSpec)


def check_alone(key: str, value: Any) -> None:
    """Raise SpecError for a value of an option of edit that is wrong whatever stands beside it."""
    if key == "preset":
        fill_in_preset({key: value})
    elif key in EDIT_OPTIONS:
        EditSpec(**{key: value, **({"rank": 1} if key == "rank_rule" and value == "fixed" else {})})
