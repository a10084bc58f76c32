"""Files and functions stay short, names stay telling, and the package never prints."""

import ast
import inspect
from pathlib import Path

import pytest

import circuitkit

ROOT = Path(circuitkit.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
FILE, METHOD, FUNCTION = 300, 150, 60
# Files under methods/ that are no method.
SHARED = (
    "__init__.py",
    "base.py",
    "gradients.py",
    "learning.py",
    "node_effects.py",
    "optimal_constants.py",
    "search.py",
)
VAGUE = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "managers"}

by_name = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


@by_name
def test_files_are_short(path):
    name = str(path.relative_to(ROOT))
    cap = METHOD if path.parent.name == "methods" and path.name not in SHARED else FILE
    assert len(path.read_text().splitlines()) <= cap, f"{name} has more than {cap} lines: split it by what it does"


def docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    return (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0


@by_name
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
            assert lines <= FUNCTION, f"{path.name}: {node.name} has {lines} lines, more than {FUNCTION}"


@by_name
def test_names_say_what_is_inside(path):
    assert path.stem not in VAGUE


@by_name
def test_nothing_prints(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "breakpoint"), f"{path.name}:{node.lineno} calls {node.func.id}"


def registered():
    from circuitkit.methods.base import METHODS
    from circuitkit.tasks.base import TASKS

    return [(name, thing) for registry in (METHODS, TASKS) for name, thing in registry.items()]


@pytest.mark.parametrize(("name", "thing"), [pytest.param(name, thing, id=name) for name, thing in registered()])
def test_a_registered_name_is_its_file(name, thing):
    source = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "")
    assert source.stem == name.replace("-", "_")


@pytest.mark.parametrize(("name", "thing"), [pytest.param(name, thing, id=name) for name, thing in registered()])
def test_a_registered_name_is_explained(name, thing):
    module = inspect.getmodule(inspect.unwrap(thing))
    assert module is not None and module.__doc__, f"{name}: its file has no docstring"


def test_every_method_has_a_page():
    from circuitkit.methods.base import METHODS

    pages = {path.stem for path in (ROOT.parent / "docs" / "methods").glob("*.md")}
    assert set(METHODS) <= pages, f"docs/methods lacks {sorted(set(METHODS) - pages)}"
