"""Every Python block of the README and of docs/ runs, in order, one namespace per file.

A block that cannot run here opens with ```python no-run.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python[ \t]*(?P<flag>[\w-]*)[ \t]*\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<target>[^)#\s]+)")

named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture
def registries_as_found(monkeypatch):
    """Pages that show how to register something do not change what other tests see."""
    from circuitkit.exporters.base import EXPORTERS, SUFFIXES
    from circuitkit.functional.metrics import METRICS
    from circuitkit.methods.base import METHODS
    from circuitkit.models.recurrent.cells import base as cells
    from circuitkit.tasks.base import TASKS

    for registry in (EXPORTERS, METRICS, METHODS, TASKS):
        len(registry)
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(cells, "_CELLS", dict(cells.cells()))
    before = dict(SUFFIXES)
    yield
    SUFFIXES.clear()
    SUFFIXES.update(before)


@named
@pytest.mark.usefixtures("registries_as_found")
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        if block["flag"] == "no-run":
            continue
        assert not block["flag"], f"unknown flag {block['flag']!r}"
        # Blank lines in front, so that a traceback shows the line of the page.
        line = text.count("\n", 0, block.start("code"))
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)


@named
def test_links_lead_somewhere(page):
    for link in LINK.finditer(page.read_text()):
        assert (page.parent / link["target"]).exists(), f"{page.name} links to {link['target']}, which is not there"


def test_the_readme_has_an_example():
    assert BLOCK.search((ROOT / "README.md").read_text())


def test_the_index_says_of_every_method_when_to_take_it():
    from circuitkit.methods.base import METHODS

    index = (ROOT / "docs" / "index.md").read_text()
    assert [name for name in METHODS if f"(methods/{name}.md)" not in index] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_tables_that_benchmarks_write_are_there(page):
    filled = re.findall(r"<!-- ([\w-]+) -->(.*?)<!-- /\1 -->", page.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, text in filled if text.count("\n|") < 3] == []
