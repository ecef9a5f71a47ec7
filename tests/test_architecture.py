"""The house keeps its order: public names are there, and no module hides one of them."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import pytest

import pome

PACKAGE = Path(pome.__file__).parent


def test_no_module_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    assert modules & set(pome.__all__) == set()


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
