"""YAML from untrusted files: limits on size, aliases and depth, keys and options checked by line, variables.

What a few lines of aliases of aliases stand for would fill the memory, or never end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pome.config.conflicts import RANK_OPTIONS, check_rank_options, find_idle, merge_options
from pome.config.options import find_options, nearest
from pome.config.preset import Preset
from pome.config.spec import EDIT_OPTIONS, EditSpec, check_alone, list_overridable
from pome.errors import SpecError, printable

MAX_YAML_BYTES = 4 << 20
MAX_NODES, MAX_DEPTH = 1_000_000, 50  # with every alias written out
Check = Callable[[str, Any], object]
Children = dict[str, tuple[int, yaml.Node]]  # key -> (line, value)


def compose(text: bytes | str) -> yaml.Node | None:
    """The nodes of a document, or None for an empty one; no object is made. Raises yaml.YAMLError, also for a document
    beyond all use, RecursionError and UnicodeError."""
    root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    waiting, seen = [(root, 1)] if root is not None else [], 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_NODES:
            what = "nested too deeply" if depth > MAX_DEPTH else f"over {MAX_NODES} values with the aliases written out"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            waiting += [(item, depth + 1) for pair in node.value for item in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(item, depth + 1) for item in node.value]
    return root


def read_yaml(path: Path) -> yaml.Node:
    """The nodes of a configuration file. Raises SpecError."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise SpecError(f"{path}: over {MAX_YAML_BYTES >> 20} MiB; this is not a configuration")
    try:
        root = compose(raw)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"{path}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise SpecError(f"{path}: not YAML: {printable(reason)}") from None
    if root is None:
        raise SpecError(f"{path}: empty; write options as 'key: value' lines")
    return root


def read_keys(node: yaml.Node, path: Path, allowed: Iterable[str]) -> Children:
    """The values of a mapping by key; unknown and repeated keys are refused by line."""
    known = list(allowed)
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{path}:{node.start_mark.line + 1}: expected 'key: value' lines here")
    found: Children = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key not in known:
            shown = "a key that is not a word" if key is None else f"unknown key {printable(key)!r}"
            hint = nearest(key or "", known) or f"; known keys: {', '.join(known)}"
            raise SpecError(f"{path}:{line}: {shown}{hint}")
        if key in found:
            raise SpecError(f"{path}:{line}: key {key!r} stands here and in line {found[key][0]}; keep one")
        found[key] = (line, value_node)
    return found


def read_options(node: yaml.Node, path: Path, allowed: Iterable[str], check: Check = check_alone) -> dict[str, Any]:
    """A flat mapping of options as plain values, each checked alone, so that a message names its line; together they
    are checked later."""
    values = {}
    loader = yaml.SafeLoader("")
    for key, (line, value_node) in read_keys(node, path, allowed).items():
        if key == "overrides" and isinstance(value_node, yaml.SequenceNode):
            for item in value_node.value:
                read_keys(item, path, ("match", *list_overridable()))
        try:
            value = loader.construct_object(value_node, deep=True)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SpecError(f"{path}:{line}: {key}: {printable(str(error).splitlines()[0])}") from None
        try:
            check(key, value)
        except SpecError as error:
            raise SpecError(f"{path}:{line}: {error}{_explain_text(value, value_node)}") from None
        values[key] = value
    return values


def _explain_text(value: Any, node: yaml.Node) -> str:
    """YAML 1.1 has numbers with an exponent only where they have a dot and the exponent a sign."""
    if (
        isinstance(value, str)
        and getattr(node, "style", None) is None
        and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value)
    ):
        return "; YAML reads this as text; write 0.1 or 1.0e-1"
    return ""


def read_config(path: Path, check: Check = check_alone, allowed: Iterable[str] = EDIT_OPTIONS) -> dict[str, Any]:
    """The options of edit, or others `allowed`, in a YAML file. Raises SpecError, naming the line of an unknown or
    repeated key, and of a value that is wrong by itself, as `check` says."""
    return read_options(read_yaml(path), path, allowed, check)


Spec = TypeVar("Spec", bound=EditSpec)


def make_spec(config: Path | None, given: Mapping[str, Any], kind: type[Spec], check: Check = check_alone) -> Spec:
    """The options of a command line over those of its config file, whose values `check` looks at one by one. Raises
    SpecError."""
    if config is not None and not RANK_OPTIONS & given.keys() and not find_idle(given.get("method")):
        kind.from_given({**given, "rank": 1})  # are they good by themselves? what chooses k may stand in the file
    else:
        spec = kind.from_given(given)
    check_rank_options(given, find_options(kind), defaults_count=True)
    if config is None:
        return spec
    allowed = (*find_options(kind), *(find_options(Preset) if kind is EditSpec else ()))
    options = merge_options(read_config(config, check, allowed), given)
    try:
        return kind.from_given(options)
    except SpecError as error:  # those of the command line were good by themselves
        raise SpecError(f"{config}: {error}") from None


def fill_in_variables(
    root: yaml.Node, declared: tuple[int, yaml.Node] | None, path: Path, given: Mapping[str, str]
) -> None:
    """Put texts in the place of `${name}` in every value below a node: those given, else those that are declared.

    Raises SpecError, for all variables without a value at once.
    """
    known = _read_variables(declared, path)
    for name in given:
        if name not in known:
            raise SpecError(f"{path}: no variable is named {printable(name)!r}{nearest(name, known)}")
    variables = {**known, **given}
    missing: dict[str, str] = {}
    for node in _walk(root):
        at = f"{path}:{node.start_mark.line + 1}"
        names = re.findall(r"\$\{(\w+)\}", node.value)
        for name in names:
            if name not in variables:
                raise SpecError(f"{at}: no variable is named {printable(name)!r}{nearest(name, variables)}")
            if variables[name] is None:
                missing.setdefault(name, at)
        if names and not missing:
            node.value = re.sub(r"\$\{(\w+)\}", lambda match: str(variables[match[1]]), node.value)
            if node.style is None:  # written without quotes: what is put in may be a number
                loader: Any = yaml.SafeLoader("")
                node.tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))
    if missing:
        *names, last = (repr(name) for name in missing)
        what = f"variables {', '.join(names)} and {last} have" if names else f"variable {last} has"
        give = " ".join(f"--set {name}=VALUE" for name in missing)
        raise SpecError(f"{next(iter(missing.values()))}: the {what} no value; give {give}")


def _read_variables(declared: tuple[int, yaml.Node] | None, path: Path) -> dict[str, str | None]:
    """Name -> text; None for one that must be given."""
    found: dict[str, str | None] = {}
    line, node = declared or (0, None)
    if node is None:
        return found
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{path}:{line}: variables: expected 'name: text' lines")
    for key, value in node.value:
        at = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            raise SpecError(f"{at}: variables: expected 'name: text' lines")
        if key.value in found:
            raise SpecError(f"{at}: the variable {printable(key.value)!r} stands there twice")
        found[key.value] = None if value.tag.endswith(":null") else value.value
    return found


def _walk(node: yaml.Node) -> Iterator[Any]:
    """Every scalar value below a node, in the order of the document."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item)
    elif isinstance(node, yaml.MappingNode):
        for _, item in node.value:
            yield from _walk(item)
