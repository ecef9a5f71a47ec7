"""YAML read with suspicion: what a few lines of aliases of aliases stand for would fill the memory, or never end."""

from __future__ import annotations

import yaml

MAX_NODES, MAX_DEPTH = 1_000_000, 50  # with every alias written out


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
