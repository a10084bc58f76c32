"""Circuits as sets of edges: the laws of sets, and whose scores are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError
from circuitkit.graph import chain_graph
from tests.toys_graph import circuit_on, transformer_graph

GRAPH = transformer_graph(1, 2)
NAMES = list(GRAPH.edge_names())


@st.composite
def circuits(draw):
    names = draw(st.sets(st.sampled_from(NAMES)))
    plain = Circuit.from_edges(GRAPH, sorted(names))
    score = draw(st.lists(st.integers(-9, 9), min_size=len(names), max_size=len(names)))
    return Circuit(GRAPH, plain.src, plain.dst, torch.tensor(score, dtype=torch.float))


def names(circuit):
    return set(circuit.edge_names())


@given(a=circuits(), b=circuits(), c=circuits())
@settings(max_examples=40, deadline=None)
def test_operators_are_those_of_sets(a, b, c):
    assert names(a | b) == names(a) | names(b)
    assert names(a & b) == names(a) & names(b)
    assert names(a - b) == names(a) - names(b)
    assert names(a - (b | c)) == names((a - b) & (a - c))
    assert names((a & b) | (a - b)) == names(a)
    assert len(a | b) + len(a & b) == len(a) + len(b)
    assert names(a | a) == names(a) == names(a & a) and len(a - a) == 0


@given(a=circuits(), b=circuits())
@settings(max_examples=40, deadline=None)
def test_the_left_circuits_scores_win_and_edges_stay_sorted(a, b):
    left, right = (dict(zip(x.edge_names(), x.score.tolist(), strict=True)) for x in (a, b))
    for both in (a | b, a & b, a - b):
        got = dict(zip(both.edge_names(), both.score.tolist(), strict=True))
        assert got == {name: left.get(name, right.get(name)) for name in got}
        strengths = both.score.abs().tolist()
        assert strengths == sorted(strengths, reverse=True)


def test_names_and_operators_agree_and_nothing_else_is_carried_over():
    a, b = circuit_on(GRAPH, 6), circuit_on(GRAPH, 6, seed=1)
    for named, operator in ((a.union(b), a | b), (a.intersection(b), a & b), (a.difference(b), a - b)):
        assert named.edge_names() == operator.edge_names()
        assert (operator.result, operator.scores, dict(operator.meta)) == (None, None, {})
    assert (a | b).stderr is not None
    assert torch.equal((a & a).stderr, a.stderr)
    assert (a | Circuit.from_edges(GRAPH, NAMES[:2])).stderr is None


def test_dangling_edges_are_kept():
    graph = chain_graph(1)
    whole = Circuit.from_edges(graph, ["input->m0", "m0->logits"])
    assert (whole - Circuit.from_edges(graph, ["m0->logits"])).edge_names() == ["input->m0"]


def test_circuits_of_two_graphs_are_refused():
    a, b = circuit_on(GRAPH, 3), circuit_on(transformer_graph(2, 2), 3)
    for combine in (Circuit.union, Circuit.intersection, Circuit.difference):
        with pytest.raises(GraphError, match="different graphs"):
            combine(a, b)
    with pytest.raises(TypeError):
        a | names(b)
