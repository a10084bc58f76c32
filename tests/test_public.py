"""What ``import circuitkit`` gives, and how little it costs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import circuitkit as ck

ROOT = Path(ck.__file__).parent
HEAVY = ("torch", "transformer_lens", "transformers", "sae_lens", "plotly", "pandas", "networkx", "numpy")


def heavy_after(code: str) -> set[str]:
    """Which heavy packages a fresh Python has imported after running some code."""
    end = f"\nimport sys; print('LOADED', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("name", ck.__all__)
def test_every_public_name_is_there_and_explained(name):
    thing = getattr(ck, name)
    assert name == "__version__" or thing.__doc__


def test_public_names_are_sorted_and_complete():
    assert ck.__all__ == sorted(ck.__all__)
    assert set(ck.__all__) == {*ck._HOMES, "__version__"}
    assert set(ck.__all__) <= set(dir(ck))


def test_what_type_checkers_see_is_what_is_loaded():
    block = next(node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            seen[alias.asname or alias.name] = node.module + (f":{alias.name}" if alias.asname else "")
    assert seen == ck._HOMES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = ck.lod


def test_the_version_is_the_project_s():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == ck.__version__


def test_importing_loads_nothing_heavy():
    assert heavy_after("import circuitkit") == set()


@pytest.mark.parametrize("arguments", ["--help", "find --help", "eval --help", "--version", "fnd"])
def test_asking_for_help_loads_nothing_heavy(arguments):
    assert heavy_after(f"from circuitkit.cli import main; main({arguments.split()!r})") == set()
