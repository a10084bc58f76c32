"""The page needs no network, runs nothing but its own scripts, and opens in a real browser."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import circuitkit.viewer.page as viewer
from circuitkit.circuit import Circuit
from circuitkit.graph import Graph, Node, chain_graph
from circuitkit.viewer.document import source_hash
from circuitkit.viewer.page import embed, page, page_data, write_page
from tests.toys_graph import circuit_on, recurrent_graph, transformer_graph

HOSTILE = "</script><img src=x onerror=document.body.dataset.owned='yes'>"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
CIRCUITS = {
    "mha": circuit_on(transformer_graph(3, 4), 25),
    "gqa": circuit_on(transformer_graph(2, 4, 2), 25),
    "rnn": circuit_on(recurrent_graph(), 12),
    "empty": Circuit.from_edges(chain_graph(2), []),
    "no result": replace(circuit_on(chain_graph(2), 4), result=None, meta={}, stderr=None),
}


def hostile_circuit() -> Circuit:
    sources = (Node("input", "input", -1, 0), Node(HOSTILE, "mlp", 0, 1), Node("a\x00\u2028b", "mlp", 1, 2))
    plain = chain_graph(2)
    graph = Graph(sources, (*sources[1:], plain.destination_nodes[-1]), plain.mask, plain.feeds)
    circuit = Circuit.from_edges(graph, list(graph.edge_names()))
    example = {"clean": HOSTILE, "corrupt": "x\x00y", "right": "&amp;", "wrong": "\u2028"}
    return replace(circuit, meta={"task": HOSTILE, "model": "m & <b>", "example": example})


class Tags(HTMLParser):
    """Collects every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def payload(text: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


@pytest.mark.parametrize("name", CIRCUITS)
def test_the_page_refers_to_nothing_outside(name):
    text = page(CIRCUITS[name]).replace("http-equiv", "")
    assert "http" not in re.sub(r"[hH]ttp[A-Z]", "", text).lower()
    for tag, attributes in Tags(text).found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert not {"src", "href", "action", "srcset"} & set(attributes)
    assert "url(" not in (Path(viewer.__file__).parent / "page.css").read_text()


def test_the_vendored_library_is_the_pinned_one():
    folder = Path(viewer.__file__).parent / "vendor"
    digest = hashlib.sha256((folder / "cytoscape.min.js").read_bytes()).hexdigest()
    assert (folder / "cytoscape.min.js.sha256").read_text().split() == [digest, "cytoscape.min.js"]
    assert digest == "081591ab735b2b6a3b31a3c60f8f3a3e2fee8c92939e0c7820ad1208571b6cd8"
    assert "Permission is hereby granted" in (folder / "cytoscape.LICENSE").read_text()
    assert "Permission is hereby granted" in page(CIRCUITS["mha"])


def test_the_policy_allows_the_scripts_of_the_page_and_no_other():
    text = page(CIRCUITS["mha"])
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 2
    for script in scripts:
        assert source_hash(script) in policy


def test_labels_are_inert():
    text = page(hostile_circuit())
    assert [tag for tag, _ in Tags(text).found].count("script") == 3
    assert "<img" not in text and "\x00" not in text and "\u2028" not in text
    data = payload(text)
    assert HOSTILE in [box["name"] for box in data["boxes"]] and "a␀\\u2028b" in [box["name"] for box in data["boxes"]]
    assert data["example"][0] == ["clean", HOSTILE]
    script = (Path(viewer.__file__).parent / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)


def test_the_frame_is_sandboxed_and_holds_the_whole_page():
    text = embed(hostile_circuit())
    ((tag, attributes),) = Tags(text).found
    assert tag == "iframe" and attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == page(hostile_circuit())
    assert CIRCUITS["mha"]._repr_html_() == embed(CIRCUITS["mha"])


@pytest.mark.parametrize("name", CIRCUITS)
def test_the_data_agrees_with_the_circuit(name):
    circuit = CIRCUITS[name]
    data = payload(page(circuit))
    columns = data["edges"]
    assert {len(column) for column in columns.values()} == {len(circuit)}
    names = [
        f"{data['boxes'][s]['name']}->{data['readers'][r]}"
        for s, r in zip(columns["source"], columns["reader"], strict=True)
    ]
    assert sorted(names) == sorted(circuit.edge_names())
    strengths = [abs(score) for score in columns["score"]]
    assert strengths == sorted(strengths, reverse=True)
    assert len(data["places"]) == len(data["boxes"]) and len(data["slots"]) == len(circuit)


def test_the_header_says_what_was_measured():
    facts = {name: (value, detail) for name, value, detail in page_data(CIRCUITS["mha"])["facts"]}
    assert facts["faithfulness"] == ("0.91", "[0.84, 0.97]") and facts["random circuits"][0] == "0.07"
    undefined = replace(CIRCUITS["mha"], result=replace(CIRCUITS["mha"].result, faithfulness=None))
    assert ("faithfulness", "undefined", "") in page_data(undefined)["facts"]


def test_a_method_without_signs_claims_none():
    circuit = CIRCUITS["mha"]
    unsigned = replace(circuit, scores=replace(circuit.scores, signed=False))
    assert page_data(unsigned)["effects"] != page_data(circuit)["effects"]
    assert "supports" not in " ".join(page_data(unsigned)["effects"])


def test_scores_that_are_not_finite_become_null():
    circuit = replace(
        CIRCUITS["no result"], score=torch.tensor([float("nan")] + [1.0] * (len(CIRCUITS["no result"]) - 1))
    )
    assert payload(page(circuit))["edges"]["score"][-1] is None


def dumped(path: Path, profile: Path) -> str:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    command += [
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--timeout=20000",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=90, check=True)
    assert b"CONSOLE" not in done.stderr, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("name", [*CIRCUITS, "hostile"])
def test_it_opens_in_chromium_without_a_complaint(tmp_path, name):
    circuit = CIRCUITS.get(name) or hostile_circuit() if name != "empty" else CIRCUITS["empty"]
    text = dumped(write_page(circuit, tmp_path / "c.html"), tmp_path / "profile")
    assert re.search(r'data-ready="\d+"', text) and "data-owned" not in text
    visible = '<p id="nothing">' in text
    assert visible == (name == "empty")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_five_thousand_edges_open_in_seconds(tmp_path):
    path = write_page(circuit_on(transformer_graph(12, 12), 5000), tmp_path / "c.html")
    ready = int(re.search(r'data-ready="(\d+)"', dumped(path, tmp_path / "profile"))[1])
    assert path.stat().st_size < 2_000_000 and ready < 15_000
