"""Overlap of circuits: counts by hand, chance by enumeration."""

from itertools import combinations

import pytest
import torch

from circuitkit.circuit import Circuit
from circuitkit.comparisons import Overlap
from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.overlap import overlap, strongest_overlap
from circuitkit.graph import chain_graph
from circuitkit.scores import Scores
from tests.toys_graph import transformer_graph

GRAPH = transformer_graph(2, 2)
A = ["input->a0.h0<v>", "a0.h0->a1.h1<k>", "a1.h1->logits", "input->m0", "m0->logits"]
B = ["input->a0.h0<v>", "a0.h0->m1", "m1->logits", "a0.h0->a1.h1<k>", "a1.h1->m1"]


def pair(level):
    return overlap({"a": Circuit.from_edges(GRAPH, A), "b": Circuit.from_edges(GRAPH, B)}, level=level)


def test_edges_nodes_and_heads_by_hand():
    edges = pair("edges")
    assert (edges.sizes, edges.shared, edges.n_possible) == ((5, 5), ((5, 2), (2, 5)), GRAPH.n_edges)
    assert (edges.jaccard(0, 1), edges.reuse(0, 1)) == (2 / 8, 2 / 5)
    nodes = pair("nodes")  # a0.h0, a1.h1, m0 and a0.h0, a1.h1, m1; the input is no component
    assert (nodes.sizes, nodes.shared[0][1], nodes.n_possible) == ((3, 3), 2, 6)
    heads = pair("heads")
    assert (heads.sizes, heads.shared[0][1], heads.n_possible) == ((2, 2), 2, 4)
    assert heads.jaccard(0, 1) == 1.0


def test_chance_by_enumeration():
    nodes = pair("nodes")
    shared = [len({0, 1, 2} & set(other)) for other in combinations(range(6), 3)]
    assert nodes.expected(0, 1) == pytest.approx(sum(shared) / len(shared))
    assert nodes.p_value(0, 1) == pytest.approx(sum(s >= 2 for s in shared) / len(shared))


def test_random_sets_have_p_values_that_are_not_too_small():
    """Under the null, P(p <= x) is at most x."""
    draw = torch.Generator().manual_seed(0)
    p_values = []
    for _ in range(300):
        a, b = (set(torch.randperm(40, generator=draw)[:12].tolist()) for _ in range(2))
        p_values.append(Overlap("edges", ("a", "b"), (12, 12), 40, ((12, len(a & b)), (len(a & b), 12))).p_value(0, 1))
    assert 0.01 < sum(p <= 0.1 for p in p_values) / 300 < 0.14


def test_the_strongest_heads_of_two_rankings():
    values = torch.zeros(GRAPH.mask.shape)
    values[GRAPH.edge("a0.h0->logits")], values[GRAPH.edge("a1.h1->logits")] = -3.0, 2.0
    other = torch.zeros(GRAPH.mask.shape)
    other[GRAPH.edge("a0.h0->m0")], other[GRAPH.edge("a0.h1->m0")] = 3.0, 2.0
    rankings = {"a": Scores(values, GRAPH, "x"), "b": Scores(other, GRAPH, "x")}
    one, two = (strongest_overlap(rankings, share=share) for share in (0.02, 0.5))
    assert (one.sizes, one.shared[0][1]) == ((1, 1), 1)
    assert (two.sizes, two.shared[0][1], two.reuse(0, 1)) == ((2, 2), 1, 0.5)
    assert strongest_overlap(rankings, share=1.0, level="edges").sizes == (GRAPH.n_edges,) * 2
    assert strongest_overlap(rankings, share=2 / GRAPH.n_edges, level="edges").shared[0][1] == 0


def test_empty_circuits_are_equal():
    nothing = Circuit.from_edges(GRAPH, [])
    found = overlap({"a": nothing, "b": nothing})
    assert (found.jaccard(0, 1), found.reuse(0, 1), found.p_value(0, 1)) == (1.0, 1.0, 1.0)


def test_the_file_and_the_figure():
    found = pair("edges")
    assert Overlap.from_json(found.to_json()) == found
    grid = found.plot().data[0]
    assert [list(row) for row in grid.z] == [[1.0, 0.25], [0.25, 1.0]]
    assert "40% of the row" in grid.customdata[0][1]


def test_what_is_refused():
    a, other = Circuit.from_edges(GRAPH, A), Circuit.from_edges(chain_graph(1), ["input->logits"])
    with pytest.raises(OptionError, match="at least two"):
        overlap({"a": a})
    with pytest.raises(OptionError, match="level = 'layers'"):
        overlap({"a": a, "b": a}, level="layers")
    with pytest.raises(GraphError, match="'b' is of another graph"):
        overlap({"a": a, "b": other})
    scores = Scores(torch.zeros(GRAPH.mask.shape), GRAPH, "x")
    with pytest.raises(OptionError, match="share = 0"):
        strongest_overlap({"a": scores, "b": scores}, share=0)
    with pytest.raises(GraphError, match="'b' is of another graph"):
        strongest_overlap({"a": scores, "b": Scores(torch.zeros(2, 2), chain_graph(1), "x")})
