"""The order of the packages: public names, sizes of files, and which modules load which library.

The contracts of import-linter in pyproject.toml hold the imports; here is what those cannot say.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pome

PACKAGE = Path(pome.__file__).parent
MODULES = sorted(module.name for module in pkgutil.walk_packages(pome.__path__, "pome."))
# The modules that compute: they load torch at once, by themselves or by another of them. No other module does.
LOAD_TORCH = re.compile(
    r"pome\.(kernel|poet|editing\.(unit|lora_merge|lora_rewrite|extract_cell|extract_file|compare_rest|measurement|"
    r"remote|workers)|inspection\.(measure|weights)|sweeping\.(bootstrap|cache|candidates|ranking|remote))\b"
)
MOST_LINES = 350
MOST_FILES_AT_THE_TOP = 10

IMPORT_ALL = """
import importlib, json, sys
heavy = {"huggingface_hub", "jinja2", "lm_eval", "matplotlib", "numpy", "peft", "ray", "torch", "transformers"}
loaded, seen = {}, set()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    if new := sorted(heavy & set(sys.modules) - seen):
        loaded[name] = new
        seen.update(new)
print(json.dumps(loaded))
"""


def import_all(modules: list[str]) -> dict[str, list[str]]:
    """The heavy libraries that each of the modules is the first to load, in a process of its own."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(modules)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_no_module_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    assert modules & set(pome.__all__) == set()


def test_few_files_lie_at_the_top_of_the_package() -> None:
    files = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(files) <= MOST_FILES_AT_THE_TOP, files


def test_no_file_is_long() -> None:
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".html", ".css", ".js"}]
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in sources}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_modules_that_do_not_compute_load_no_heavy_library() -> None:
    light = [name for name in MODULES if not LOAD_TORCH.match(name)]
    assert {name.split(".")[1] for name in light} >= {"checkpoint", "config", "output", "planning", "roles"}
    assert import_all(light) == {}


def test_modules_that_compute_load_torch_and_no_other_heavy_library() -> None:
    computing = [name for name in MODULES if LOAD_TORCH.match(name) and name != "pome.poet.callback"]
    loaded = import_all(computing)
    assert "torch" in {library for libraries in loaded.values() for library in libraries}
    assert {library for libraries in loaded.values() for library in libraries} <= {"numpy", "torch"}


def test_every_public_name_is_there_and_said_to_type_checkers() -> None:
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = next(node for node in source.body if isinstance(node, ast.If))
    imported = {alias.asname for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assigned = {str(node.targets[0].id) for node in checked.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    typed = {name for name in imported | assigned if not str(name).startswith("_")}
    assert typed | set(pome.errors.__all__) == set(pome.__all__) - {"__version__"}
    for name in pome.__all__:
        assert getattr(pome, name) is not None
    assert (PACKAGE / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pome.nothing  # noqa: B018
