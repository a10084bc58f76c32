"""The page of feature graphs: nothing from outside, labels inert, data as in the graph, and a state that comes back."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

import circuitkit as ck
import circuitkit.viewer.feature_page as viewer
from circuitkit.errors import FormatError, OptionError
from circuitkit.exporters.graph_json import write_graph_json
from circuitkit.exporters.graph_json_draft import View
from circuitkit.exporters.graph_json_read import graph_from_json, read_graph_json
from circuitkit.features.dashboards import Dashboard, Example, Histogram
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.functional.text import visible
from circuitkit.viewer.document import source_hash, text_of
from circuitkit.viewer.feature_layout import layout
from circuitkit.viewer.feature_page import feature_page, page_of_file, write_feature_page

HOSTILE = "</script><img src=x onerror=document.body.dataset.owned='yes'>"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def graph_of(nodes, edges, weights, tokens) -> FeatureGraph:
    """A graph from ``{(source, target): effect}``."""
    at = {node.name: i for i, node in enumerate(nodes)}
    targets = sorted({at[target] for _, target in edges} | {at[name] for name in weights})
    effects = torch.zeros(len(targets), len(nodes))
    for (source, target), effect in edges.items():
        effects[targets.index(at[target]), at[source]] = effect
    weight = torch.tensor([weights.get(node.name, 0.0) for node in nodes], dtype=torch.float64)
    return FeatureGraph(
        tuple(nodes), torch.tensor(targets, dtype=torch.long), effects, effects.sum(1), weight,
        torch.tensor(tokens, dtype=torch.long), "toy",
    )  # fmt: skip


def token(p):
    return FeatureNode(f"input@{p}", "token", -1, "resid-pre.0", p, 10 + p, 1.0, 0)


def latent(layer, index, p, site="mlp-in", stem="m"):
    return FeatureNode(f"{stem}{layer}.f{index}@{p}", "latent", layer, f"{site}.{layer}", p, index, 0.5, 1 + layer)


def small() -> FeatureGraph:
    nodes = [
        token(0), token(1), token(2), latent(0, 3, 1), latent(0, 4, 1), latent(1, 3, 2),
        FeatureNode("m0.error@2", "error", 0, "mlp-out.0", 2, None, 1.0, 1),
        FeatureNode("m0.bias", "bias", 0, "mlp-in.0", None, None, 1.0, 1),
        FeatureNode("logits.7@2", "logit", 2, "resid-pre.2", 2, 7, 0.75, 9),
        FeatureNode("logits.8@2", "logit", 2, "resid-pre.2", 2, 8, 0.25, 9),
    ]  # fmt: skip
    edges = {
        ("input@0", "m0.f3@1"): 1.1, ("input@1", "m0.f3@1"): -0.3, ("input@1", "m0.f4@1"): 0.7,
        ("m0.f3@1", "m1.f3@2"): 2.5,
        ("m0.f4@1", "m1.f3@2"): -1.5, ("m0.error@2", "m1.f3@2"): 0.1, ("m1.f3@2", "logits.7@2"): 3.0,
        ("m0.bias", "logits.7@2"): 1e-7, ("m1.f3@2", "logits.8@2"): -2.0, ("input@2", "logits.8@2"): 1 / 3,
    }  # fmt: skip
    return graph_of(nodes, edges, {"logits.7@2": 0.75, "logits.8@2": 0.25}, [10, 11, 12])


def recurrent() -> FeatureGraph:
    def unit(name, p, stage):
        return FeatureNode(f"{name}@{p}", "unit", 0, f"state.{name[:4]}", p, int(name[-1]), 0.1, stage)

    nodes = [FeatureNode("x0@0", "token", -1, "state.x", 0, None, 1.0, 0),
             FeatureNode("x1@0", "token", -1, "state.x", 0, None, 1.0, 0),
             *(unit(name, p, 1 + p) for p in (0, 1) for name in ("l0.c1", "l0.h1", "l0.h2")),
             FeatureNode("l0.bias", "bias", 0, "l0", None, None, 1.0, 0),
             FeatureNode("l0.h.start", "bias", 0, "state.l0.h", None, None, 1.0, 0),
             FeatureNode("logits.0@1", "direction", 1, "state.l0.h", 1, None, 0.2, 9)]  # fmt: skip
    edges = {("x0@0", "l0.h1@0"): 1.0, ("x1@0", "l0.h1@0"): 2.0, ("l0.h1@0", "l0.c1@1"): -1.0,
             ("l0.h1@0", "l0.h1@1"): 0.5,
             ("l0.h1@1", "logits.0@1"): 1.0, ("l0.c1@1", "logits.0@1"): 1.0, ("l0.bias", "l0.h1@1"): 0.25}  # fmt: skip
    return graph_of(nodes, edges, {"logits.0@1": 1.0}, [0, 1])


def merged() -> FeatureGraph:
    nodes = [FeatureNode("input", "token", -1, "resid-pre.0", None, None, 1.0, 0),
             FeatureNode("m0.f3", "latent", 0, "mlp-in.0", None, 3, 1.0, 1),
             FeatureNode("score.a1.h3", "score", 1, "resid-pre.1", None, None, 1.0, 3)]  # fmt: skip
    edges = {("input", "m0.f3"): 1.0, ("m0.f3", "score.a1.h3"): -1.0}
    return replace(graph_of(nodes, edges, {"score.a1.h3": 1.0}, []), counts=torch.tensor([4, 3, 4]))


def one_token() -> FeatureGraph:
    nodes = [token(0), FeatureNode("logits.7@0", "logit", 1, "resid-pre.1", 0, 7, 1.0, 1)]
    return graph_of(nodes, {("input@0", "logits.7@0"): 1.0}, {"logits.7@0": 1.0}, [10])


GRAPHS = {"small": small, "recurrent": recurrent, "merged": merged, "one token": one_token}
every = pytest.mark.parametrize("name", GRAPHS)


def board(latent=3, site="mlp-in.0", text="a") -> Dashboard:
    example = Example((1, 2), (text, "b"), (0.5, 0.0), 0, 4, 0)
    return Dashboard(
        latent, site, 0, 0.25, 0.1, 0.5, (example,), (("0.25 to 0.5", (example,)),),
        Histogram((0.0, 0.25, 0.5), (2, 1)),
        ((text, 1.5),), (("c", -0.5),),
    )  # fmt: skip


def payload(text: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


@every
def test_the_page_refers_to_nothing_outside(name):
    text = feature_page(GRAPHS[name](), dashboards=[board()])
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"<(link|iframe|object|embed|base|img)\b", text)
    assert not re.search(r"\s(src|href|action|srcset)=", text)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 3 and all(source_hash(script) in policy for script in scripts)
    for script in scripts:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|fetch\(", script
        )
    assert "url(" not in text_of("feature_page.css")


@every
def test_the_data_agrees_with_the_graph(name):
    graph = GRAPHS[name]()
    data = payload(feature_page(graph))
    edges, at = data["edges"], iter(range(graph.n_edges))
    found = {}
    for target, count in zip(edges["target"], edges["count"], strict=True):
        for _ in range(count):
            e = next(at)
            found[edges["source"][e], target] = edges["weight"][e]
    rows, columns = graph.effects.nonzero(as_tuple=True)
    ends = zip(columns.tolist(), graph.targets[rows].tolist(), strict=True)
    assert found.keys() == set(ends) and edges["left_out"] == 0
    for (source, target), weight in found.items():
        exact = graph.effect(graph.nodes[source].name, graph.nodes[target].name)
        assert torch.tensor(weight).item() == exact
    assert data["nodes"]["kind"] == [node.kind for node in graph.nodes]


@every
def test_nodes_stand_apart_in_their_column_and_layer(name):
    graph = GRAPHS[name]()
    places = layout(graph, graph.influence.tolist())
    assert len(set(zip(places.x, places.y, strict=True))) == len(graph)
    for i, node in enumerate(graph.nodes):
        position, middle, width = places.columns[places.column[i]]
        assert position == node.position and abs(places.x[i] - middle) <= width / 2
        label, middle, height = places.rows[places.row[i]]
        assert abs(places.y[i] - middle) <= height / 2
        assert label == {"token": "input"}.get(node.kind, label) and (label == "output") == (node.kind in viewer.FINALS)
    ends = [(middle - height / 2, middle + height / 2) for _, middle, height in places.rows]
    assert all(a[1] < b[0] for a, b in pairwise(ends))


def test_rows_of_several_parts():
    nodes = [token(0), latent(0, 1, 0, "attn-out", "a"), latent(0, 1, 0), latent(1, 1, 0)]
    nodes.append(FeatureNode("m0.error@0", "error", 0, "mlp-out.0", 0, None, 1.0, 1))
    nodes.append(FeatureNode("a1.bias", "bias", 1, "attn-out.1", None, None, 1.0, 1))
    graph = graph_of(nodes, {("input@0", "m0.f1@0"): 1.0}, {}, [3])
    places = layout(graph, [0.0] * len(nodes))
    assert [label for label, _, _ in places.rows] == ["input", "layer 0 attention", "layer 0 MLP", "layer 1"]
    assert places.row == (0, 1, 2, 3, 2, 3)  # an MLP's error beside its latents, a bias in a row that is there


def test_labels_are_inert():
    view = View(labels={"m0.f3@1": HOSTILE, "input@0": "a\x00\u202eb"}, supernodes=((HOSTILE, ("m0.f3@1",)),))
    text = feature_page(
        small(), texts=[HOSTILE, "\x00\u2028", "\u202eשלום"], target_tokens={7: HOSTILE}, view=view, title=HOSTILE,
        dashboards=[board(text=HOSTILE)],
    )  # fmt: skip
    assert text.count("</script>") == 4 and "<img" not in text and "\x00" not in text and "\u202e" not in text
    data = payload(text)
    assert data["title"] == HOSTILE and data["file"]["names"][3] == HOSTILE and data["file"]["names"][0] == "a␀\\u202eb"
    assert data["tokens"] == [HOSTILE, "␀\\u2028", "\\u202eשלום"] and data["boards"][0]["top"][0][0][0] == HOSTILE


def test_dashboards_of_nodes_that_are_there():
    data = payload(feature_page(small(), dashboards=[board(), board(9), board(3, "mlp-in.1")]))
    assert len(data["boards"]) == 2
    assert [i for i, found in enumerate(data["nodes"]["board"]) if found is not None] == [3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ["a"]}, "1 texts of tokens for a graph of 3"),
        ({"view": View(pins=("nobody",))}, "no node 'nobody'"),
        ({"node_threshold": 2.0}, "node_threshold"),
        ({"slug": "../x"}, "slug"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(OptionError, match=message):
        feature_page(small(), **options)
    with pytest.raises(FormatError, match="not finite"):
        feature_page(replace(small(), effects=small().effects / 0))


@pytest.mark.parametrize("suffix", ["json", "graphml", "html", "csv"])
def test_export_by_ending(suffix, tmp_path):
    path = ck.export(small(), tmp_path / f"a graph.{suffix}")
    assert path.stat().st_size > 100
    if suffix == "json":
        assert FeatureGraph.load(path).nodes == small().nodes and read_graph_json(path).slug == "a-graph"
    if suffix == "csv":
        lines = path.read_text().splitlines()
        assert len(lines) == 1 + small().n_edges and lines[0] == "source,target,effect,share"
        assert "m0.f3@1,m1.f3@2,2.5," in path.read_text()
    assert small().to_html(tmp_path / "x.html").exists() and small().save(tmp_path / "x.json").exists()
    with pytest.raises(FormatError, match=r"\.json, \.graphml, \.html, \.csv"):
        ck.export(small(), tmp_path / "x.gexf")


def large() -> FeatureGraph:
    positions, layers = 40, 12
    nodes = [token(p) for p in range(positions)]
    nodes += [latent(layer, i, p) for layer in range(layers) for p in range(positions) for i in range(10)]
    last = positions - 1
    nodes += [
        FeatureNode(f"logits.{i}@{last}", "logit", layers, f"resid-pre.{layers}", last, i, 0.1, 99) for i in range(10)
    ]
    stage, place = (torch.tensor([getattr(n, name) for n in nodes]) for name in ("stage", "position"))
    targets = torch.arange(positions, len(nodes))
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(len(targets), len(nodes), generator=generator) ** 3
    effects *= (stage[targets][:, None] > stage) & (place[targets][:, None] >= place)
    effects *= torch.rand(effects.shape, generator=generator) < 0.03
    weights = torch.tensor([0.1 * (n.kind == "logit") for n in nodes], dtype=torch.float64)
    return FeatureGraph(tuple(nodes), targets, effects, effects.sum(1), weights, torch.arange(positions), "big")


@pytest.fixture(scope="module")
def large_page(tmp_path_factory):
    graph, folder = large(), tmp_path_factory.mktemp("large")
    before = time.process_time()
    path = write_feature_page(graph, folder / "large.html")
    return graph, path, time.process_time() - before


def test_five_thousand_nodes_and_what_is_left_out(large_page):
    graph, path, seconds = large_page
    assert len(graph) == 4850 and graph.n_edges > 130_000 and path.stat().st_size < 5_000_000 and seconds < 10
    edges = payload(path.read_text())["edges"]
    assert 90_000 < len(edges["source"]) <= viewer.MOST_EDGES and edges["left_out"] == graph.n_edges - len(
        edges["source"]
    )
    assert f"{edges['left_out']:,} weakest" in path.read_text()
    start, most = 0, max(edges["count"])
    for row, count in enumerate(edges["count"]):
        strengths = graph.effects[row].abs().sort(descending=True).values
        wanted = strengths[: min(most, int((strengths > 0).sum()))]
        kept = torch.tensor(edges["weight"][start : start + count]).abs().sort(descending=True).values
        assert torch.equal(kept, wanted)
        assert edges["sum"][row] == pytest.approx(float(strengths.double().sum()), rel=1e-5)
        start += count


def dumped(path: Path, profile: Path, asked: str = "") -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--timeout=20000", "--dump-dom", path.as_uri() + asked,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=90, check=True)
    assert b"CONSOLE" not in done.stderr, done.stderr.decode()
    text = done.stdout.decode()
    assert re.search(r'data-ready="\d+"', text) and "data-owned" not in text
    return text


def link(**asked) -> str:
    parts = [
        f"{key}={quote(v if isinstance(v, str) else json.dumps(v))}" for key, values in asked.items() for v in values
    ]
    return "#" + "&".join([*parts, "saved"])


def saved(text: str) -> str:
    return html.unescape(re.search(r'<pre id="saved"[^>]*>(.*?)</pre>', text, re.S)[1])


def test_the_page_of_a_file(tmp_path):
    view = View(pins=("m0.f3@1",), labels={"m1.f3@2": "plural"}, clicked="m1.f3@2")
    path = write_graph_json(small(), tmp_path / "x.json", slug="x", scan="toy", prompt="a b c", prompt_tokens="abc",
                            target_tokens={7: ' "it"', 8: "(p="}, view=view, node_threshold=0.7)  # fmt: skip
    file = read_graph_json(path)
    assert file.graph.target_tokens == {7: ' "it"', 8: "( p="}
    page = payload(page_of_file(file))
    assert page["nodes"]["label"][8:] == ['“ "it"”', "“( p=”"] and page["threshold"] == 0.7
    assert page["title"] == "abc" and page["file"]["names"][5] == "plural"
    assert len(page["file"]["state"]["pinnedIds"]) == 1


def test_ids_stand_for_tokens_without_texts(tmp_path):
    for page in (feature_page(small()), page_of_file(read_graph_json(small().save(tmp_path / "x.json")))):
        data = payload(page)
        assert data["title"] == "10 11 12" and data["tokens"] == ["10", "11", "12"] and not data["texts"]
        assert [(text, position) for text, position, *_ in data["columns"][1:]] == [("10", 0), ("11", 1), ("12", 2)]
    assert payload(feature_page(recurrent()))["title"] == "feature graph"  # steps are no prompt


def test_contrasts_and_merged_graphs_have_texts():
    nodes = [FeatureNode("input.12", "token", -1, "resid-pre.0", 1, 12, 1.0, 0),
             FeatureNode("m0.f3", "latent", 0, "mlp-in.0", None, 3, 1.0, 1),
             FeatureNode("logits.7-8", "direction", 1, "resid-pre.1", None, None, 1.0, 3)]  # fmt: skip
    edges = {("input.12", "m0.f3"): 1.0, ("m0.f3", "logits.7-8"): -1.0}
    graph = replace(
        graph_of(nodes, edges, {"logits.7-8": 1.0}, [10, 12]), counts=torch.tensor([2, 3, 4]), texts=(" He", "."),
        target_tokens={7: " She", 8: " He"},
    )  # fmt: skip
    data = payload(feature_page(graph))
    assert data["nodes"]["label"] == ["“.”", "m0.f3", "“ She” - “ He”"] and data["merged"]
    assert data["title"] == "merged from 4 prompts"
    assert payload(feature_page(graph, target_tokens={7: " She"}))["nodes"]["label"][2] == "logits.7-8"


def test_scores_are_shown_where_all_is_explained():
    def named(graph):
        return [name for name, *_ in payload(feature_page(graph))["facts"]][2:]

    assert named(small()) == ["replacement score", "completeness score"] and named(merged()) == []
    nodes = [replace(n, name="pruned.m1.f3@2") if n.kind == "error" else n for n in small().nodes]
    assert named(replace(small(), nodes=tuple(nodes))) == []


def test_what_the_unembedding_adds_is_beside_the_logits():
    nodes = [replace(n, name="r2.bias", layer=2, site="resid-pre.2") if n.kind == "bias" else n for n in small().nodes]
    graph = replace(small(), nodes=tuple(nodes))
    places = layout(graph, graph.influence.tolist())
    labels = [label for label, *_ in places.rows]
    assert labels == ["input", "layer 0", "layer 1", "output"] and labels[places.row[7]] == "output"


@browser
def test_a_logit_shows_its_probability_not_its_weight(tmp_path):
    weights = torch.tensor([1.0 * (node.kind == "logit") for node in small().nodes], dtype=torch.float64)
    text = dumped(write_feature_page(replace(small(), weights=weights), tmp_path / "p.html"), tmp_path / "profile")
    assert "“7” 75.0%" in text and "“8” 25.0%" in text and "100%<" not in text.split('id="labels"')[1].split("</g>")[0]


@browser
def test_pins_groups_and_names_come_back_as_a_view(tmp_path):
    graph = small()
    before = View(pins=("input@0", "m0.error@2"), labels={"logits.7@2": "the (p= answer"}, places="0.1 0.2")
    path = write_feature_page(graph, tmp_path / "p.html", texts=["a", " b", "c"], target_tokens={7: " x"}, view=before)
    asked = link(
        pin=["m1.f3@2"], node=["m1.f3@2"],
        group=[["both 😀", "m0.f3@1", "m0.f4@1"], [HOSTILE, "input@1"], ["it", "nobody"]],
        name=[["m1.f3@2", "x\x00\u202ey"], ["input@1", "who"], ["m0.error@2", " "]],
    )  # fmt: skip
    found = dumped(path, tmp_path / "profile", asked)
    text = saved(found)
    file = graph_from_json(text)
    assert file.view == View(
        pins=("input@0", "m0.error@2", "m1.f3@2", "m0.f3@1", "m0.f4@1", "input@1"),
        supernodes=(("both 😀", ("m0.f3@1", "m0.f4@1")), (HOSTILE, ("input@1",))),
        labels={"logits.7@2": "the (p= answer", "m1.f3@2": visible("x\x00\u202ey"), "input@1": "who"},
        clicked="m1.f3@2",
        places="0.1 0.2",
    )
    # The graph comes back number for number, as from Python.
    for name in ("targets", "effects", "totals", "weights", "tokens"):
        one, other = getattr(graph, name), getattr(file.graph, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert file.graph.nodes == graph.nodes and file.prompt_tokens == ("a", " b", "c")
    answer = next(n for n in json.loads(text)["nodes"] if n["circuitkit"]["name"] == "logits.7@2")
    assert answer["clerp"] == "the ( p= answer (p=0.750)"
    # The panel and both pictures show it.
    assert 'class="mark latent pinned chosen"' in found and "x␀\\u202ey" in found and found.count('class="box') == 5
    # What the page saved, it draws again.
    again = write_feature_page(
        file.graph, tmp_path / "q.html", texts=["a", " b", "c"], target_tokens={7: " x"}, view=file.view
    )
    assert graph_from_json(saved(dumped(again, tmp_path / "profile", "#saved"))).view == file.view


@browser
@pytest.mark.parametrize("name", ["recurrent", "merged", "one token"])
def test_other_graphs_open_and_come_back(tmp_path, name):
    graph = GRAPHS[name]()
    path = write_feature_page(graph, tmp_path / "p.html", dashboards=[board(text=HOSTILE)])
    chosen = graph.nodes[-2].name
    file = graph_from_json(saved(dumped(path, tmp_path / "profile", link(node=[chosen], pin=[chosen]))))
    assert file.view == View(pins=(chosen,), clicked=chosen) and file.graph.nodes == graph.nodes
    assert torch.equal(file.graph.effects, graph.effects) and torch.equal(file.graph.tokens, graph.tokens)
    assert (file.graph.counts is None) == (graph.counts is None)


@browser
def test_five_thousand_nodes_open_in_seconds(large_page, tmp_path):
    text = dumped(large_page[1], tmp_path / "profile", "#nodes=1&node=m6.f3%4020")
    assert int(re.search(r'data-ready="(\d+)"', text)[1]) < 15_000
    assert text.count('class="mark ') == 4850 + 3 and "4,850 of 4,850" in text
    assert 'class="mark latent chosen"' in text and 10 < text.count('class="line"') < 1000
