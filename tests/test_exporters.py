"""Each format is read back by a reader that is not ours."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from dataclasses import replace

import networkx as nx
import pydot
import pytest
import torch
from defusedxml import ElementTree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuitkit.circuit import Circuit
from circuitkit.errors import FormatError, UnknownName
from circuitkit.exporters.base import EXPORTERS, export, format_of
from circuitkit.exporters.eap_ig import read_eap_ig
from circuitkit.exporters.table import table_of
from circuitkit.graph import Graph, Node, chain_graph
from tests.toys_graph import circuit_on, recurrent_graph, scores_on, transformer_graph

GRAPHS = {
    "chain": chain_graph(4),
    "mha": transformer_graph(2, 3),
    "gqa": transformer_graph(2, 4, 2),
    "rnn": recurrent_graph(),
}
NASTY = [
    "</script><img onerror=x>",
    "a\x00b",
    "a␀b",
    "\ud800",
    "ünï😀",
    'say "hi"\\',
    "\\",
    "two\nlines",
    "<q>",
    "\uffff",
    "\u202e",
]


def named_circuit(names: list[str]) -> Circuit:
    """Two MLPs with the given names between input and logits."""
    plain = chain_graph(len(names))
    sources = (plain.source_nodes[0], *(Node(n, "mlp", i, i + 1) for i, n in enumerate(names)))
    graph = Graph(sources, (*sources[1:], plain.destination_nodes[-1]), plain.mask, plain.feeds)
    return replace(scores_on(graph).threshold(0.0), meta={"model": names[0]})


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("suffix", ["graphml", "gexf"])
def test_xml_formats_by_networkx(tmp_path, name, suffix):
    circuit = circuit_on(GRAPHS[name], 12)
    path = export(circuit, tmp_path / f"c.{suffix}")
    back = {"graphml": nx.read_graphml, "gexf": nx.read_gexf}[suffix](path)
    truth = circuit.to_networkx()
    assert back.is_directed() and set(back.nodes) == set(truth.nodes) and set(back.edges) == set(truth.edges)
    for source, target, data in truth.edges(data=True):
        found = back.edges[source, target]
        assert (
            found["score"] == data["score"] and found["weight"] == abs(data["score"]) and found["slot"] == data["slot"]
        )
        assert found["kind"] == data["kind"]
    for node, data in truth.nodes(data=True):
        assert {key: back.nodes[node][key] for key in data} == data


@pytest.mark.parametrize("name", GRAPHS)
def test_ids_are_unique_and_columns_have_one_type(name):
    table = table_of(circuit_on(GRAPHS[name], 12))
    ids = [row["id"] for row in (*table.nodes, *table.edges)]
    assert len(set(ids)) == len(ids)
    for rows in (table.nodes, table.edges):
        for column in rows[0]:
            assert len({type(row[column]) for row in rows}) == 1
    places = [(row["x"], row["y"]) for row in table.nodes]
    assert len(set(places)) == len(places)


def test_graphml_declares_each_attribute_once(tmp_path):
    path = export(circuit_on(GRAPHS["gqa"], 20), tmp_path / "c.graphml")
    root = ElementTree.fromstring(path.read_bytes(), forbid_dtd=True)
    keys = [(key.get("for"), key.get("attr.name")) for key in root.iter() if key.tag.endswith("}key")]
    assert len(set(keys)) == len(keys) and ("edge", "weight") in keys
    ids = [edge.get("id") for edge in root.iter() if edge.tag.endswith("}edge")]
    assert None not in ids and len(set(ids)) == len(ids)


def test_gexf_carries_places_and_colours(tmp_path):
    path = export(circuit_on(GRAPHS["mha"], 12), tmp_path / "c.gexf")
    root = ElementTree.fromstring(path.read_bytes(), forbid_dtd=True)
    tags = [element.tag for element in root.iter()]
    nodes = sum(tag.endswith("}node") for tag in tags)
    assert nodes > 2 and sum(tag.endswith("}position") for tag in tags) == nodes


@pytest.mark.parametrize("name", GRAPHS)
def test_dot_by_pydot(tmp_path, name):
    circuit = circuit_on(GRAPHS[name], 12)
    path = export(circuit, tmp_path / "c.gv")
    graph = pydot.graph_from_dot_file(str(path), encoding="utf-8")[0]
    edges = {(e.get_source().strip('"'), e.get_destination().strip('"')) for e in graph.get_edges()}
    assert graph.get_type() == "digraph" and edges == set(circuit.to_networkx().edges)


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_dot_by_graphviz(tmp_path):
    path = export(named_circuit(NASTY), tmp_path / "c.dot")
    done = subprocess.run(["dot", "-Tjson", str(path)], capture_output=True, check=True, timeout=60)
    labels = [node["label"] for node in json.loads(done.stdout)["objects"]]
    assert 'say \\"hi\\"' in done.stdout.decode() or 'say "hi"\\' in labels
    assert len(labels) == len(NASTY) + 2


@pytest.mark.parametrize("name", GRAPHS)
def test_cytoscape_json(tmp_path, name):
    circuit = circuit_on(GRAPHS[name], 12)
    data = json.loads(export(circuit, tmp_path / "c.cyjs").read_text(), parse_constant=pytest.fail)
    truth, back = (
        circuit.to_networkx(),
        nx.cytoscape_graph({"directed": True, "multigraph": False, **data, "data": []}),
    )
    assert set(back.edges) == set(truth.edges)
    assert all({"x", "y"} == set(node["position"]) for node in data["elements"]["nodes"])
    assert all(edge["data"]["id"] and edge["data"]["weight"] >= 0 for edge in data["elements"]["edges"])


def test_own_format_is_the_circuit_file(tmp_path):
    circuit = circuit_on(GRAPHS["gqa"], 12)
    export(circuit, tmp_path / "c.circuit.json")
    assert torch.equal(Circuit.load(tmp_path / "c.circuit.json").score, circuit.score)


@pytest.mark.parametrize("suffix", ["graphml", "gexf", "dot", "cyjs", "circuit.json", "eap-ig.json"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(NASTY) | st.text(st.characters(), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_odd_labels_open_in_real_readers(tmp_path, suffix, names):
    if {"input", "logits"} & set(names) or any("->" in name for name in names):
        return
    circuit = named_circuit(names)
    if suffix == "eap-ig.json":
        with pytest.raises(FormatError):
            export(circuit, tmp_path / f"c.{suffix}")
        return
    path = export(circuit, tmp_path / f"c.{suffix}")
    n_nodes, n_edges = circuit.to_networkx().number_of_nodes(), len(circuit)
    if suffix == "graphml":
        back = nx.read_graphml(path)
        assert (back.number_of_nodes(), back.number_of_edges()) == (n_nodes, n_edges)
    elif suffix == "gexf":
        back = nx.read_gexf(path)
        assert (back.number_of_nodes(), back.number_of_edges()) == (n_nodes, n_edges)
    elif suffix == "dot":
        graph = pydot.graph_from_dot_file(str(path), encoding="utf-8")[0]
        assert len(graph.get_edges()) == n_edges
    elif suffix == "cyjs":
        assert len(json.loads(path.read_text())["elements"]["nodes"]) == n_nodes
    else:
        assert Circuit.load(path).edge_names() == circuit.edge_names()


@pytest.mark.parametrize("suffix", ["graphml", "gexf", "dot", "cyjs", "json", "eap-ig.json"])
def test_empty_circuits_and_scores_that_are_not_finite(tmp_path, suffix):
    graph = transformer_graph()
    assert export(Circuit.from_edges(graph, []), tmp_path / f"empty.{suffix}").stat().st_size > 0
    circuit = Circuit.from_edges(graph, ["input->a0.h0<q>", "a0.h0->logits"])
    circuit = replace(circuit, score=torch.tensor([float("nan"), 1.0]))
    if suffix == "eap-ig.json":
        with pytest.raises(FormatError, match="not finite"):
            export(circuit, tmp_path / f"c.{suffix}")
    else:
        text = export(circuit, tmp_path / f"c.{suffix}").read_text()
        assert not suffix.endswith("js") or ("NaN" not in text and '"nonfinite": true' in text)


def test_the_longest_ending_wins_and_unknown_ones_are_named(tmp_path):
    assert list(EXPORTERS) == ["cyjs", "dot", "eap-ig", "gexf", "graphml", "json"]
    assert [format_of(n) for n in ("a.json", "a.EAP-IG.json", "a.gv", "b.c.graphml")] == [
        "json",
        "eap-ig",
        "dot",
        "graphml",
    ]
    circuit = circuit_on(chain_graph(2), 3)
    with pytest.raises(FormatError, match=r"\.graphml"):
        export(circuit, tmp_path / "c.xyz")
    with pytest.raises(UnknownName, match="graphml"):
        export(circuit, tmp_path / "c.xyz", format="grafml")
    assert export(circuit, tmp_path / "c.xyz", format="gexf").read_bytes().startswith(b"<?xml")


def eap_ig_edge_names(n_layers: int, n_heads: int) -> set[str]:
    """Every edge of EAP-IG's graph of a sequential transformer, written down from its definition."""
    layers = [[f"a{i}.h{h}" for h in range(n_heads)] for i in range(n_layers)]
    groups = [
        ["input"],
        *itertools.chain.from_iterable((heads, [f"m{i}"]) for i, heads in enumerate(layers)),
        ["logits"],
    ]
    names: set[str] = set()
    for i, group in enumerate(groups[1:], 1):
        for source, reader in itertools.product(itertools.chain(*groups[:i]), group):
            slots = ("<q>", "<k>", "<v>") if reader.startswith("a") else ("",)
            names |= {f"{source}->{reader}{slot}" for slot in slots}
    return names


@pytest.mark.parametrize("n_kv", [4, 2, 1])
def test_eap_ig_file(tmp_path, n_kv):
    graph = transformer_graph(2, 4, n_kv)
    circuit = circuit_on(graph, 30)
    path = export(circuit, tmp_path / "c.eap-ig.json")
    data = json.loads(path.read_text())
    assert data["cfg"] == {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16}
    assert set(data["edges"]) == eap_ig_edge_names(2, 4)
    assert set(data["nodes"]) == {"input", "logits", "m0", "m1"} | {f"a{i}.h{h}" for i in range(2) for h in range(4)}
    assert all(isinstance(edge["score"], float) for edge in data["edges"].values())
    touched = {n.partition("<")[0] for name, e in data["edges"].items() if e["in_graph"] for n in name.split("->")}
    assert touched == {name for name, node in data["nodes"].items() if node["in_graph"]}
    total = sum(edge["score"] for edge in data["edges"].values())
    assert total == pytest.approx(float(circuit.scores.values.double().sum()))
    back = read_eap_ig(path, graph)
    assert set(back.edge_names()) == set(circuit.edge_names())
    assert torch.allclose(back.scores.values, circuit.scores.values)


def test_eap_ig_without_ranking_or_with_parallel_layers(tmp_path):
    graph = transformer_graph()
    plain = Circuit.from_edges(graph, ["input->a0.h0<v>", "a0.h0->logits"])
    data = json.loads(export(plain, tmp_path / "c.eap-ig.json").read_text())
    assert sorted(e["score"] for e in data["edges"].values())[-3:] == [0.0, 1.0, 1.0]
    mask = graph.mask.clone()
    for s, d in itertools.product(range(len(graph.sources)), range(len(graph.destinations))):
        source, reader = graph.source_nodes[s], graph.destination_nodes[d]
        mask[s, d] &= not (source.kind == "head" and reader.kind == "mlp" and source.layer == reader.layer)
    parallel = Circuit.from_edges(replace(graph, mask=mask), ["input->m0"])
    assert json.loads(export(parallel, tmp_path / "p.eap-ig.json").read_text())["cfg"]["parallel_attn_mlp"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not an EAP-IG file"),
        ('{"edges": {"a9.h9->logits": {"score": 1, "in_graph": true}}}', "this graph does not"),
        ('{"edges": {"input->m0": {"score": "1", "in_graph": true}}}', "numeric score"),
        ('{"edges": {"input->m0": {"score": NaN, "in_graph": true}}}', "NaN"),
    ],
)
def test_reading_a_bad_eap_ig_file(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_eap_ig(tmp_path / "x.json", transformer_graph())


def test_other_graphs_are_refused_by_eap_ig(tmp_path):
    for name in ("rnn", "chain"):
        with pytest.raises(FormatError, match="transformers only"):
            export(circuit_on(GRAPHS[name], 5), tmp_path / "c.eap-ig.json")
    assert list(tmp_path.iterdir()) == []
