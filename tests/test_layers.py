"""The house keeps its order: imports run down one table, names of modules and of functions do not collide."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import pytest

import pome

PACKAGE = Path(pome.__file__).parent

# Room -> the rooms that it may import. A new module must be entered here, with the least that it needs.
CHECKPOINT = {
    "checkpoint.header", "checkpoint.source", "checkpoint.sidefiles", "checkpoint.output", "checkpoint.target",
    "checkpoint.clone"
}  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "layout": set(),
    "architectures": {"layout"},
    "feed_forward": {"layout", "architectures"},
    "roles": {"errors", "layout", "architectures", "feed_forward"},
    "spec": {"errors", "roles"},
    "pairing": {"errors"},
    "checkpoint": set(),
    "checkpoint.json_text": {"errors"},
    "checkpoint.header": {"errors", "checkpoint.json_text"},
    "checkpoint.files": {"errors", "checkpoint.header"},
    "checkpoint.hub_calls": {"errors"},
    "checkpoint.hub": {"errors", "checkpoint.header", "checkpoint.files", "checkpoint.hub_calls"},
    "checkpoint.fp8": {"errors", "checkpoint.header", "checkpoint.files"},
    "checkpoint.source": {"errors", "checkpoint.header", "checkpoint.files", "checkpoint.hub", "checkpoint.fp8"},
    "checkpoint.adapter": {"errors", "checkpoint.header", "checkpoint.source"},
    "checkpoint.fitting": {
        "errors", "architectures", "roles", "pairing", "checkpoint.header", "checkpoint.source", "checkpoint.adapter"
    },
    "checkpoint.clone": {"errors"},
    "checkpoint.lock": {"errors", "checkpoint.clone"},
    "checkpoint.sidefiles": {"errors", "checkpoint.source", "checkpoint.hub"},
    "checkpoint.trail": {"errors"},
    "checkpoint.disk": {"errors", "checkpoint.files", "checkpoint.clone"},
    "checkpoint.target": {
        "errors", "checkpoint.clone", "checkpoint.disk", "checkpoint.lock", "checkpoint.sidefiles"
    },
    "checkpoint.output": {
        "errors", "checkpoint.files", "checkpoint.header", "checkpoint.clone", "checkpoint.lock", "checkpoint.disk",
        "checkpoint.sidefiles", "checkpoint.target"
    },
    "kernel": set(),
    "manifest": {"errors"},
    "yaml_text": set(),
    "card": {"manifest", "spec", "checkpoint.source", "yaml_text"},
    "upload": {"errors", "checkpoint.hub_calls"},
    "quantization": {"errors", "checkpoint.header"},
    "selection": {"errors", "spec", "roles", "quantization", *CHECKPOINT},
    "units": {"roles", "checkpoint.adapter", *CHECKPOINT},
    "obstacles": {"errors", "roles", "spec", "selection", *CHECKPOINT},
    "adapter_plan": {
        "errors", "spec", "roles", "quantization", "selection", "units", "obstacles", "checkpoint.adapter",
        "checkpoint.fitting", *CHECKPOINT
    },
    "plan": {
        "errors", "spec", "roles", "pairing", "quantization", "selection", "units", "obstacles", "adapter_plan",
        *CHECKPOINT
    },
    "patch": {"errors", "spec", "roles", "layout", "units", "manifest", "kernel"},
    "merge": {
        "errors", "spec", "roles", "units", "manifest", "patch", "kernel", "checkpoint.adapter", "checkpoint.source"
    },
    "adapt": {
        "errors", "spec", "roles", "units", "manifest", "patch", "merge", "kernel", "checkpoint.adapter",
        "checkpoint.disk", *CHECKPOINT
    },
    "engines": set(),
    "engines.local": {"errors"},
    "pair": {"", "errors", "spec", "plan", "units", *CHECKPOINT},
    "run": {
        "", "errors", "spec", "roles", "units", "pair", "manifest", "patch", "merge", "adapt", "card", "engines.local",
        "checkpoint.trail", *CHECKPOINT
    },
    "comparison": {"errors", "manifest", "units", "checkpoint.files", *CHECKPOINT},
    "recomputation": {"spec", "manifest", "units", "patch", "merge", "adapt", "comparison", *CHECKPOINT},
    "verification": {"errors", "spec", "plan", "manifest", "comparison", "recomputation", *CHECKPOINT},
    "finished": {"errors", "spec", "manifest", *CHECKPOINT},
    "findings": {"manifest"},
    "measure": {
        "errors", "spec", "roles", "layout", "units", "manifest", "findings", "patch", "merge", "kernel"
    },
    "survey": {
        "errors", "spec", "roles", "units", "manifest", "findings", "patch", "merge", "measure", "pair", "engines.local"
    },
    "suggest": {"findings"},
    "sheet": {"errors", "roles", "manifest", "findings", "suggest", *CHECKPOINT},
    "grid": {"errors", "spec"},
    "evaluate": {"errors", "spec", "checkpoint.clone"},
    "language": {"errors", "evaluate", "checkpoint.clone"},
    "scorers": {"errors", "spec", "evaluate", "language"},
    "evidence": {"evaluate"},
    "jobs": {"errors", "spec", "roles", "grid", "evaluate", "scorers", "yaml_text"},
    "scratch": {
        "spec", "roles", "units", "pair", "manifest", "patch", "merge", "kernel", "engines.local", "checkpoint.disk"
    },
    "trial": {"grid", "evaluate", "evidence", "pair", "manifest"},
    "journal": {"evaluate", "trial", "checkpoint.disk"},
    "search": {
        "errors", "spec", "grid", "evaluate", "evidence", "language", "scratch", "plan", "units", "pair", "patch",
        "manifest", "run", "trial", "journal", *CHECKPOINT
    },
    "standings": {"errors", "spec", "jobs", "grid", "sheet", "plots", "report", "trial"},
    "plots": {"errors", "sheet"},
    "report": {"errors", "jobs", "sheet", "plots", *CHECKPOINT},
    "tables": {"errors", "units", "manifest", "pair", "sheet", "standings", "trial", *CHECKPOINT},
    "progress": {"errors", "units", "pair", "standings", "trial", "tables", *CHECKPOINT},
    "actions": {
        "", "errors", "spec", "roles", "jobs", "plan", "pair", "manifest", "run", "verification", "finished",
        "findings", "survey", "suggest", "sheet", "report", "tables", "progress", "upload", "trial", "search",
        "standings", *CHECKPOINT
    },
    "cli": {"", "errors", "spec", "roles", "scorers", "jobs", "manifest", "verification", "tables", "actions"},
    "__main__": {"cli"},
    # The package itself: the public names, imported when they are used.
    "": {
        "errors", "spec", "manifest", "pair", "run", "verification", "kernel", "grid", "scorers", "trial", "search"
    },
}  # fmt: skip
# Inside the kernel no room but the kernel itself is known: pure tensors, no names, no paths.
KERNEL_ALONE = {"kernel"}

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
    assert room in MAY_IMPORT, f"{module} is a new room: enter it in the table"
    for name, at_once in list_imports(MODULES[module]):
        first, _, rest = name.partition(".")
        if first == "pome":
            allowed = KERNEL_ALONE if room == "kernel" else MAY_IMPORT[room]
            assert room_of(rest) in allowed, f"{module} must not import {name}"
        if first in GUESTS:
            assert room in GUESTS[first], f"{module} must not import {first}"
        if first in LOADED_AT_ONCE and at_once:
            assert room in LOADED_AT_ONCE[first], f"{module} loads {first} when it is imported"


def test_the_table_has_no_circle_and_no_room_that_is_gone() -> None:
    assert {room for room in MAY_IMPORT if room not in map(room_of, MODULES)} == set()
    done: set[str] = set()
    # `pome` itself answers names lazily, so the version may be asked of it from below.
    rooms = {room: allowed - {""} for room, allowed in MAY_IMPORT.items() if room}
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
