"""The house keeps its order: imports run down one table, names of modules and of functions do not collide."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import pytest

import pome

PACKAGE = Path(pome.__file__).parent

# Room -> the rooms that it imports, no more and no fewer. A new module, or a new import, must be entered here.
IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "layout": set(),
    "architectures": {"layout"},
    "feed_forward": {"layout", "architectures"},
    "roles": {"layout", "architectures", "feed_forward"},
    "spec": {"errors", "roles"},
    "pairing": {"errors"},
    "checkpoint": set(),
    "checkpoint.json_text": {"errors"},
    "checkpoint.header": {"errors", "checkpoint.json_text"},
    "checkpoint.files": {"errors", "checkpoint.header"},
    "checkpoint.hub_calls": {"errors"},
    "checkpoint.hub": {"errors", "checkpoint.files", "checkpoint.hub_calls"},
    "checkpoint.fp8": {"errors", "checkpoint.header", "checkpoint.files"},
    "checkpoint.source": {"errors", "checkpoint.header", "checkpoint.files", "checkpoint.hub", "checkpoint.fp8"},
    "checkpoint.adapter": {"errors", "checkpoint.header", "checkpoint.source"},
    "checkpoint.fitting": {
        "errors", "architectures", "roles", "pairing", "checkpoint.header", "checkpoint.source",
        "checkpoint.adapter"
    },
    "checkpoint.clone": set(),
    "checkpoint.lock": {"errors", "checkpoint.clone"},
    "checkpoint.sidefiles": {"errors", "checkpoint.hub", "checkpoint.source"},
    "checkpoint.trail": {"errors"},
    "checkpoint.disk": {"errors", "checkpoint.files", "checkpoint.clone"},
    "checkpoint.target": {"errors", "checkpoint.clone", "checkpoint.lock", "checkpoint.sidefiles", "checkpoint.disk"},
    "checkpoint.output": {
        "errors", "checkpoint.header", "checkpoint.files", "checkpoint.clone", "checkpoint.lock",
        "checkpoint.sidefiles", "checkpoint.disk", "checkpoint.target"
    },
    "kernel": set(),
    "manifest": {"errors"},
    "yaml_text": set(),
    "card": {"spec", "checkpoint.source", "manifest", "yaml_text"},
    "upload": {"errors", "checkpoint.hub_calls"},
    "quantization": {"errors", "checkpoint.header"},
    "selection": {"errors", "roles", "spec", "checkpoint.header", "checkpoint.source", "quantization"},
    "units": {"roles", "checkpoint.header", "checkpoint.source", "checkpoint.adapter"},
    "obstacles": {"errors", "roles", "spec", "checkpoint.source", "selection"},
    "adapter_plan": {
        "errors", "roles", "spec", "checkpoint.header", "checkpoint.source", "checkpoint.adapter",
        "checkpoint.fitting", "quantization", "selection", "units", "obstacles"
    },
    "plan": {
        "errors", "roles", "spec", "pairing", "checkpoint.source", "selection", "units", "obstacles",
        "adapter_plan"
    },
    "patch": {"errors", "roles", "spec", "kernel", "manifest", "units"},
    "merge": {
        "errors", "roles", "spec", "checkpoint.source", "checkpoint.adapter", "kernel", "manifest", "units",
        "patch"
    },
    "adapt": {
        "errors", "roles", "spec", "checkpoint.header", "checkpoint.source", "checkpoint.adapter",
        "checkpoint.clone", "checkpoint.disk", "manifest", "units", "patch", "merge"
    },
    "engines": set(),
    "engines.local": set(),
    "pair": {
        "errors", "spec", "checkpoint.files", "checkpoint.source", "checkpoint.sidefiles", "checkpoint.output",
        "units", "plan", ""
    },
    "run": {
        "errors", "spec", "checkpoint.source", "checkpoint.clone", "checkpoint.sidefiles", "checkpoint.trail",
        "checkpoint.target", "checkpoint.output", "manifest", "card", "units", "patch", "merge", "adapt",
        "engines.local", "pair", ""
    },
    "comparison": {"errors", "checkpoint.files", "checkpoint.source", "checkpoint.clone", "manifest", "units"},
    "recomputation": {
        "spec", "checkpoint.source", "checkpoint.sidefiles", "manifest", "units", "patch", "merge", "adapt",
        "comparison"
    },
    "verification": {
        "errors", "spec", "checkpoint.source", "checkpoint.clone", "checkpoint.sidefiles", "manifest", "card",
        "plan", "comparison", "recomputation"
    },
    "finished": {"errors", "spec", "checkpoint.source", "checkpoint.sidefiles", "manifest", "card"},
    "findings": {"manifest"},
    "measure": {"errors", "roles", "spec", "kernel", "manifest", "units", "patch", "merge", "findings"},
    "survey": {"roles", "spec", "manifest", "units", "patch", "merge", "engines.local", "pair", "findings", "measure"},
    "suggest": {"findings"},
    "sheet": {"errors", "roles", "checkpoint.sidefiles", "manifest", "findings", "suggest"},
    "grid": {"errors", "spec"},
    "evaluate": {"errors", "spec"},
    "language": {"errors", "checkpoint.clone", "evaluate"},
    "scorers": {"errors", "spec", "evaluate", "language"},
    "evidence": {"evaluate"},
    "jobs": {"errors", "roles", "spec", "yaml_text", "grid", "evaluate", "scorers"},
    "scratch": {"roles", "spec", "checkpoint.disk", "kernel", "units", "patch", "merge", "engines.local", "pair"},
    "trial": {"manifest", "pair", "grid", "evaluate", "evidence"},
    "journal": {"checkpoint.disk", "evaluate", "trial"},
    "search": {
        "errors", "spec", "checkpoint.sidefiles", "checkpoint.target", "checkpoint.output", "manifest", "units",
        "plan", "patch", "pair", "run", "grid", "evaluate", "language", "evidence", "scratch", "trial",
        "journal"
    },
    "standings": {"errors", "sheet", "grid", "jobs", "trial", "plots", "report"},
    "plots": {"errors", "sheet"},
    "report": {"errors", "checkpoint.sidefiles", "sheet", "jobs", "plots"},
    "tables": {"errors", "checkpoint.source", "manifest", "units", "pair", "sheet", "trial", "standings"},
    "progress": {"errors", "checkpoint.source", "units", "pair", "trial", "standings", "tables"},
    "actions": {
        "errors", "spec", "checkpoint.sidefiles", "checkpoint.target", "manifest", "upload", "pair", "run",
        "verification", "finished", "findings", "survey", "suggest", "sheet", "jobs", "trial", "search",
        "standings", "report", "tables", "progress"
    },
    "cli": {"errors", "roles", "spec", "verification", "scorers", "jobs", "tables", "actions", ""},
    "__main__": {"cli"},
    "": {"errors", "spec", "kernel", "manifest", "pair", "run", "verification", "grid", "scorers", "trial", "search"},
}  # fmt: skip
# Who else may be imported, and by which rooms alone.
GUESTS: dict[str, set[str]] = {
    "torch": {
        "kernel",
        "patch",
        "merge",
        "adapt",
        "measure",
        "recomputation",
        "checkpoint.fp8",
        "scratch",
        "evidence",
        "language",
    },
    "transformers": {"language"},
    "lm_eval": {"language"},
    "matplotlib": {"plots"},
    "rich": {"tables", "progress", "actions"},
    "typer": {"cli"},
    "click": {"cli"},
    "yaml": {"yaml_text", "jobs", "card"},
    "huggingface_hub": {"checkpoint.hub", "checkpoint.hub_calls", "card", "upload"},
}
LOADED_AT_ONCE: dict[str, set[str]] = {
    "torch": {"kernel", "patch", "merge", "adapt", "measure", "scratch", "evidence"},
    "huggingface_hub": set(),
    "matplotlib": set(),
}


def room_of(module: str) -> str:
    """The row of the table for a dotted module name below the package; the kernel's modules share one."""
    return "kernel" if module.startswith("kernel.") else module


def list_modules() -> dict[str, Path]:
    modules = {"": PACKAGE / "__init__.py"}
    for path in sorted(PACKAGE.rglob("*.py")):
        words = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if words[-1] == "__init__":
            words.pop()
        modules[".".join(words)] = path
    return modules


MODULES = list_modules()


def list_imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it is loaded with the file) of each import; `from pome import x` counts as the module x."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("pome.") in MODULES
                found.append((inner if is_module else str(node.module), id(node) not in lazy))
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module or "pome")
def test_imports_run_down_the_table(module: str) -> None:
    room = room_of(module)
    assert room in IMPORTS, f"{module} is a new room: enter it in the table"
    for name, at_once in list_imports(MODULES[module]):
        first, _, rest = name.partition(".")
        if first == "pome":
            assert room_of(rest) in IMPORTS[room] | {room}, f"{module} must not import {name}"
        if first in GUESTS:
            assert room in GUESTS[first], f"{module} must not import {first}"
        if first in LOADED_AT_ONCE and at_once:
            assert room in LOADED_AT_ONCE[first], f"{module} loads {first} when it is imported"


def test_the_table_has_no_circle_and_nothing_that_is_gone() -> None:
    seen: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        room, names = room_of(module), [name.partition(".") for name, _ in list_imports(path)]
        seen.setdefault(room, set()).update(room_of(rest) for first, _, rest in names if first == "pome")
    assert {room: rooms - {room} for room, rooms in seen.items()} == IMPORTS
    done: set[str] = set()
    # `pome` itself answers names lazily, so the version may be asked of it from below.
    rooms = {room: allowed - {""} for room, allowed in IMPORTS.items() if room}
    while rooms:
        ready = {room for room, allowed in rooms.items() if allowed <= done}
        assert ready, f"these import each other: {sorted(rooms)}"
        done |= ready
        rooms = {room: allowed for room, allowed in rooms.items() if room not in ready}


def test_no_module_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    assert modules & set(pome.__all__) == set()


def test_every_public_name_is_there_and_said_to_type_checkers() -> None:
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = next(node for node in source.body if isinstance(node, ast.If))
    typed = {alias.asname for node in checked.body for alias in node.names}  # type: ignore[attr-defined]
    assert typed == set(pome.__all__) - {"__version__"}
    for name in pome.__all__:
        assert getattr(pome, name) is not None
    assert (PACKAGE / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pome.nothing  # noqa: B018
