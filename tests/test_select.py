"""Selection of edges: connected, monotone, and equal to networkx on reachability."""

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.errors import OptionError
from circuitkit.functional import select
from circuitkit.models.wiring import transformer_graph
from circuitkit.scores import Scores

GRAPHS = st.builds(
    lambda layers, heads, mlp, parallel: transformer_graph(layers, *heads, mlp=mlp, parallel=parallel and mlp),
    st.integers(1, 3), st.sampled_from([(1, 1), (2, 2), (4, 2)]), st.booleans(), st.booleans(),
)  # fmt: skip


def random_scores(graph, seed):
    values = torch.randn(graph.mask.shape, generator=torch.Generator().manual_seed(seed)) * graph.mask
    return Scores(values, graph, "random")


def on_a_path(graph, chosen):
    """Literal: edges whose ends networkx finds between the input and the logits."""
    network = nx.DiGraph()
    for s, d in chosen.nonzero().tolist():
        network.add_edge(("w", s), ("r", d))
    for d, s in graph.feeds.nonzero().tolist():
        network.add_edge(("r", d), ("w", s))
    roots = {("w", int(i)) for i in graph.roots.nonzero()} & set(network)
    sinks = {("r", int(i)) for i in graph.sinks.nonzero()} & set(network)
    after = set().union(*[nx.descendants(network, r) | {r} for r in roots]) if roots else set()
    before = set().union(*[nx.ancestors(network, s) | {s} for s in sinks]) if sinks else set()
    keep = torch.zeros_like(chosen)
    for s, d in chosen.nonzero().tolist():
        keep[s, d] = ("w", s) in after and ("r", d) in before
    return keep


@given(GRAPHS, st.floats(0, 1), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_pruning_keeps_exactly_the_edges_on_a_path(graph, share, seed):
    draw = torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(seed))
    chosen = (draw < share) & graph.mask
    pruned = select.prune_dangling(chosen, graph.feeds)
    assert torch.equal(pruned, on_a_path(graph, chosen))
    assert torch.equal(select.prune_dangling(pruned, graph.feeds), pruned)


@given(GRAPHS, st.integers(0, 999), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_top_and_grow_give_connected_circuits_of_at_most_n_edges(graph, seed, absolute, data):
    scores = random_scores(graph, seed)
    n = data.draw(st.integers(1, graph.n_edges))
    for circuit in (scores.top(n, absolute=absolute), scores.grow(n, absolute=absolute)):
        assert len(circuit) <= n
        assert torch.equal(circuit.mask, on_a_path(graph, circuit.mask))
    assert len(scores.top(graph.n_edges)) == graph.n_edges


@given(GRAPHS, st.integers(0, 999), st.data())
@settings(max_examples=40, deadline=None)
def test_top_is_the_longest_prefix_that_fits(graph, seed, data):
    scores = random_scores(graph, seed)
    n = data.draw(st.integers(1, graph.n_edges))
    order = select.ranked_edges(scores.values, graph.mask, absolute=True)
    prefixes = [
        select.prune_dangling(select.first_edges(order, k, graph.mask), graph.feeds) for k in range(len(order) + 1)
    ]
    fitting = [p for p in prefixes if int(p.sum()) <= n]
    assert torch.equal(scores.top(n).mask, fitting[-1])


@given(GRAPHS, st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_growth_only_reaches_from_what_is_reached(graph, seed):
    scores = random_scores(graph, seed)
    order = select.grown_order(scores.values, graph.mask, graph.feeds, absolute=True).tolist()
    assert len({tuple(e) for e in order}) == len(order) == graph.n_edges
    open_readers = set(graph.sinks.nonzero().flatten().tolist())
    for src, dst in order:
        assert dst in open_readers
        open_readers |= set(graph.feeds[:, src].nonzero().flatten().tolist())


@given(GRAPHS, st.integers(0, 999), st.data())
@settings(max_examples=40, deadline=None)
def test_random_circuits_are_connected_seeded_and_no_larger(graph, seed, data):
    n = data.draw(st.integers(1, graph.n_edges))

    def draw(s):
        return select.random_connected(n, graph.mask, graph.feeds, torch.Generator().manual_seed(s))

    mask = draw(seed)
    assert 0 < int(mask.sum()) <= n
    assert torch.equal(mask, on_a_path(graph, mask)) and torch.equal(mask, draw(seed))


def test_a_cycle_does_not_keep_itself_alive():
    """A recurrent unit that feeds itself, not reached from the input: its self-loop must go."""
    chosen = torch.tensor([[False, False], [True, True]])
    feeds = torch.tensor([[False, True], [False, False]])  # reader 0 feeds writer 1, which reader 0 reads
    assert not select.prune_dangling(chosen, feeds).any()


def test_thresholds_count_magnitudes_or_signs():
    scores = random_scores(transformer_graph(2, 2, 2), 0)
    for absolute in (True, False):
        circuit = scores.threshold(0.5, absolute=absolute)
        strength = circuit.score.abs() if absolute else circuit.score
        assert len(circuit) and float(strength.min()) >= 0.5


@pytest.mark.parametrize("n", [0, -1, 10**6, 2.5, "a", True])
def test_sizes_out_of_range_are_refused(n):
    scores = random_scores(transformer_graph(1, 1, 1), 0)
    for cut in (scores.top, scores.grow):
        with pytest.raises(OptionError, match="expected a whole number between 1 and"):
            cut(n)


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(OptionError, match="expected a number"):
        random_scores(transformer_graph(1, 1, 1), 0).threshold(float("nan"))


@pytest.mark.parametrize(
    ("layers", "heads", "sources", "destinations", "edges"),
    [(12, 12, 157, 445, 32_491), (24, 16, 409, 1_177, 231_877), (48, 25, 1_249, 3_649, 2_235_025)],
)
def test_edge_counts_are_the_published_ones(layers, heads, sources, destinations, edges):
    graph = transformer_graph(layers, heads, heads)
    assert (len(graph.sources), len(graph.destinations), graph.n_edges) == (sources, destinations, edges)
