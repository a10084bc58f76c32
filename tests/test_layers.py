"""Imports point one way: a module may import its own layer's package and the layers below, nothing above or beside."""

import ast
from pathlib import Path

import pytest

import circuitkit

ROOT = Path(circuitkit.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# From the bottom up. Modules of one layer do not know each other, unless KNOWS says so.
LAYERS = (
    ("errors", "shapes", "registry", "resources", "atomic", "result", "measures", "comparisons", "cautions"),
    ("functional", "graph", "positions", "arrangement"),
    ("circuit",),
    ("scores",),
    ("schema", "checkpoints", "drawing", "models", "tasks", "dictionaries"),
    ("methods", "features"),
    ("evaluation", "analysis"),
    ("figures", "exporters", "viewer"),
    ("runs",),
    ("cli", "testing", "__init__"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# The bottom layer and the pair around the graph are single files in a fixed order; figures and viewer draw alike;
# dictionaries are spliced into models.
KNOWS = {
    ("registry", "errors"),
    ("resources", "errors"),
    ("comparisons", "measures"),
    ("atomic", "errors"),
    ("graph", "functional"),
    ("positions", "functional"),
    ("positions", "graph"),
    ("arrangement", "functional"),
    ("arrangement", "graph"),
    ("drawing", "schema"),
    ("checkpoints", "schema"),
    ("dictionaries", "checkpoints"),
    ("dictionaries", "models"),
    ("evaluation", "analysis"),
    ("exporters", "figures"),
    ("viewer", "exporters"),
    ("viewer", "figures"),
}
# Pictures and files are made from circuits, never from models.
BLIND = {
    name: {"models", "tasks", "dictionaries", "methods", "evaluation"} for name in ("figures", "exporters", "viewer")
}
BLIND["schema"] = BLIND["drawing"] = {"models", "tasks", "dictionaries"}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """First parts of the circuitkit modules that are imported when this module is."""
    found = set()
    for node in top_level(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            is_package = node.module == "circuitkit"
            found |= {f"circuitkit.{alias.name}" for alias in node.names} if is_package else {node.module or ""}
    return {name.split(".")[1] for name in found if name.startswith("circuitkit.")}


def top_level(tree: ast.AST) -> list[ast.AST]:
    """Statements that run on import; what is imported for annotations only, or inside a function, is not there."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found += [node, *top_level(node)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    part = part_of(path)
    assert part in RANK, f"give {part!r} a layer in {__file__}"
    for other in imported_parts(path) - {part}:
        assert other in RANK, f"{path} imports circuitkit.{other}, which has no layer"
        allowed = RANK[other] < RANK[part] or (part, other) in KNOWS
        assert allowed, f"{path.relative_to(ROOT)} ({part}) must not import circuitkit.{other}"
        assert other not in BLIND.get(part, set()), f"{path.relative_to(ROOT)} must not know of {other}"


def test_the_exceptions_make_no_cycle():
    below = {}
    for part, other in KNOWS:
        below.setdefault(part, set()).add(other)
    for part in list(below):
        seen, todo = set(), set(below[part])
        while todo:
            name = todo.pop()
            assert name != part
            seen.add(name)
            todo |= below.get(name, set()) - seen
