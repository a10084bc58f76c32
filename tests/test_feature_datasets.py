"""Graphs of many prompts as one, groups of latents that do the same, and groups as nodes."""

from dataclasses import replace

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import OptionError
from circuitkit.exporters.graph_json_draft import View
from circuitkit.features.attribution import attribution_graphs
from circuitkit.features.collapse import collapse
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.merge import merge
from circuitkit.features.supernodes import complete_link, supernodes
from circuitkit.testing import tiny_model
from tests.test_attribution_graphs import SETS, tokens_of


@pytest.fixture(scope="module")
def graphs():
    model = tiny_model()
    prompts = [tokens_of(model, n, seed) for seed, n in enumerate((5, 5, 4, 6))]
    return attribution_graphs(model, SETS["attention and transcoders"](8), prompts, progress=False)


def literal_merge(graphs):
    """Effects, totals and counts by name, one edge after the other."""

    def stem(graph, i):
        node = graph.nodes[i]
        cut = node.name.split("@")[0]
        return f"{cut}.{node.index}" if node.kind == "token" else cut

    effects, totals, prompts = {}, {}, {}
    for number, graph in enumerate(graphs):
        for i in range(len(graph)):
            prompts.setdefault(stem(graph, i), set()).add(number)
        for row, target in enumerate(graph.targets.tolist()):
            t = stem(graph, target)
            totals[t] = totals.get(t, 0) + float(graph.totals[row]) / len(graphs)
            for i in range(len(graph)):
                key = stem(graph, i), t
                effects[key] = effects.get(key, 0) + float(graph.effects[row, i]) / len(graphs)
    return effects, totals, {name: len(found) for name, found in prompts.items()}


def test_merging_is_the_literal_mean_of_sums_over_positions(graphs):
    merged = merge(graphs)
    effects, totals, counts = literal_merge(graphs)
    assert {node.name for node in merged.nodes} == set(counts)
    assert {node.name: int(n) for node, n in zip(merged.nodes, merged.counts, strict=True)} == counts
    assert {merged.nodes[i].name for i in merged.targets.tolist()} == set(totals)
    for row, target in enumerate(merged.targets.tolist()):
        name = merged.nodes[target].name
        assert abs(float(merged.totals[row]) - totals[name]) < 1e-9
        for i, node in enumerate(merged.nodes):
            assert abs(float(merged.effects[row, i]) - effects.get((node.name, name), 0.0)) < 1e-9


def test_rows_of_a_merged_graph_add_up_and_its_stages_hold(graphs):
    merged = merge(graphs)
    assert float(merged.remainder.abs().max()) <= 1e-9 * float(merged.totals.abs().max())
    row, column = merged.effects.nonzero(as_tuple=True)
    assert bool((merged.stages[column] < merged.stages[merged.targets[row]]).all())
    assert abs(float(merged.weights.sum()) - sum(float(g.weights.sum()) for g in graphs) / len(graphs)) < 1e-12
    pruned = merged.prune(0.8, 0.95)
    assert 0 < len(pruned) < len(merged) and len(pruned.counts) == len(pruned)
    assert 0 < merged.replacement_score < 1 and pruned.to_networkx().number_of_edges() == pruned.n_edges
    assert merged.tokens.tolist() == sorted({t for graph in graphs for t in graph.tokens.tolist()})
    for node in merged.nodes:
        assert node.kind != "token" or int(merged.tokens[node.position]) == node.index


def test_merging_one_graph_sums_positions_and_merging_it_twice_changes_nothing(graphs):
    once, twice = merge(graphs[:1]), merge([graphs[0], graphs[0]])
    assert torch.allclose(once.effects.sum(), graphs[0].effects.sum())
    assert [node.name for node in once.nodes] == [node.name for node in twice.nodes]
    torch.testing.assert_close(once.effects, twice.effects, rtol=1e-12, atol=1e-14)
    assert torch.equal(twice.counts, 2 * once.counts)


@given(order=st.permutations(range(4)))
@settings(max_examples=6, deadline=None)
def test_the_order_of_prompts_changes_nothing(graphs, order):
    straight, mixed = merge(graphs), merge([graphs[i] for i in order])
    assert [n.name for n in straight.nodes] == [n.name for n in mixed.nodes]
    assert torch.equal(straight.targets, mixed.targets) and torch.equal(straight.counts, mixed.counts)
    torch.testing.assert_close(straight.effects, mixed.effects, rtol=1e-10, atol=1e-12)


def planted():
    """Token 1 lights two latents of layer 0 that do the same, token 2 two others; each pair lights one of layer 1."""
    names = ["input@0", "input@1", "m0.f0@1", "m0.f1@1", "m0.f2@1", "m0.f3@1", "m1.f0@1", "m1.f1@1", "logits.3@1"]
    kinds = ["token"] * 2 + ["latent"] * 6 + ["logit"]
    layers, stages = [-1, -1, 0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1, 2, 2, 3]
    nodes = tuple(
        FeatureNode(name, kind, layer, f"mlp-in.{max(layer, 0)}", 0 if name == "input@0" else 1,
                    int(name.split("@")[0][-1]) if kind != "token" else i, 1.0, stage)
        for i, (name, kind, layer, stage) in enumerate(zip(names, kinds, layers, stages, strict=True))
    )  # fmt: skip
    effects = torch.zeros(7, 9, dtype=torch.float64)
    effects[0, 0], effects[1, 0], effects[2, 1], effects[3, 1] = 2.0, 3.0, 1.0, 4.0
    effects[4, 2], effects[4, 3], effects[5, 4], effects[5, 5] = 1.0, 1.5, 2.0, 1.0
    effects[6, 6], effects[6, 7] = 2.0, -1.0
    weights = torch.zeros(9, dtype=torch.float64)
    weights[8] = 1.0
    return FeatureGraph(
        nodes, torch.arange(2, 9), effects, effects.sum(1), weights, torch.tensor([5, 6]), "toy", ("cat", "dog")
    )


def test_planted_duplicates_are_grouped_and_nothing_else():
    graph = planted()
    groups = supernodes(graph)
    assert {frozenset(names) for _, names in groups} == {
        frozenset({"m0.f0@1", "m0.f1@1"}), frozenset({"m0.f2@1", "m0.f3@1"})}  # fmt: skip
    labels = {label for label, _ in groups}
    assert labels == {'m0.f1@1 +1 "cat"', 'm0.f2@1 +1 "dog"'}
    View(supernodes=groups)


def test_decoders_have_a_say():
    graph = planted()
    coder = SparseCoder(4, 4, 4).double().requires_grad_(False)
    coder.W_dec[0] = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 1.0, 0.1, 0]])
    dictionary = Dictionary(coder, Site("mlp-in", 0), (Site("mlp-out", 0),))
    assert [set(names) for _, names in supernodes(graph, [dictionary])] == [{"m0.f2@1", "m0.f3@1"}]


def test_collapsing_keeps_totals():
    graph = planted()
    small = collapse(graph, supernodes(graph))
    assert len(small) == 7 and float(small.remainder.abs().max()) < 1e-12
    assert small.effect("input@0", 'm0.f1@1 +1 "cat"') == 5.0
    assert small.effect('m0.f1@1 +1 "cat"', "m1.f0@1") == 2.5
    assert float(small.totals.sum()) == float(graph.totals.sum())
    assert abs(float(small.influence.sum()) - float(graph.influence.sum())) < 1e-12  # rows have one sign here


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_groups_of_real_graphs_have_no_cycles_and_rows_add_up(graphs, threshold):
    for graph in (merge(graphs), graphs[0].prune(0.7, 0.9), graphs[1]):
        groups = supernodes(graph, SETS["attention and transcoders"](8), threshold=threshold)
        members = [name for _, names in groups for name in names]
        assert len(set(members)) == len(members) and all(len(names) > 1 for _, names in groups)
        small = collapse(graph, groups)
        assert len(small) == len(graph) - len(members) + len(groups)
        torch.testing.assert_close(small.remainder.sum(), graph.remainder.sum(), rtol=1e-9, atol=1e-9)
        row, column = small.effects.nonzero(as_tuple=True)
        assert bool((small.stages[column] < small.stages[small.targets[row]]).all())


def test_groups_across_layers_do_not_swallow_a_way_through_others():
    chain = torch.zeros(3, 3, dtype=torch.bool)
    chain[0, 1] = chain[1, 2] = True
    alike = torch.eye(3)
    alike[0, 2] = alike[2, 0] = 0.9
    assert complete_link(alike, chain, 0.5) == []
    chain[1, 2] = False
    assert complete_link(alike, chain, 0.5) == [[0, 2]]


@given(seed=st.integers(0, 999), n=st.integers(3, 12), threshold=st.floats(-0.5, 0.8))
@settings(max_examples=60, deadline=None)
def test_groups_are_alike_pair_by_pair_and_make_no_cycle(seed, n, threshold):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.rand(n, n, generator=generator).triu(1) > 0.7
    alike = torch.rand(n, n, generator=generator) * 2 - 1
    alike = (alike + alike.T) / 2
    groups = complete_link(alike, edges, threshold)
    of = {i: i for i in range(n)} | {i: min(group) for group in groups for i in group}
    assert all(float(alike[i, j]) >= threshold for group in groups for i in group for j in group if i < j)
    drawn = nx.DiGraph((of[i], of[j]) for i, j in edges.nonzero().tolist() if of[i] != of[j])
    assert nx.is_directed_acyclic_graph(drawn)


def test_what_members_give_each_other_is_taken_off_the_total():
    graph = planted()
    small = collapse(graph, [("chain", ("m0.f0@1", "m1.f0@1"))])
    assert small.effect("input@0", "chain") == 2.0 and small.effect("m0.f1@1", "chain") == 1.5
    assert float(small.remainder.abs().max()) < 1e-12
    row = small.targets.tolist().index(small.node("chain"))
    assert float(small.totals[row]) == 3.5


def test_bad_input(graphs):
    graph = planted()
    with pytest.raises(OptionError, match="no graphs"):
        merge([])
    with pytest.raises(OptionError, match="one model"):
        merge([graph, graphs[0]])
    with pytest.raises(OptionError, match="merged already"):
        merge([merge(graphs)])
    moved = replace(graph, nodes=tuple(replace(n, stage=n.stage + (n.stage > 0)) for n in graph.nodes))
    with pytest.raises(OptionError, match="different stages"):
        merge([graph, moved])
    with pytest.raises(OptionError, match="threshold"):
        supernodes(graph, threshold=2.0)
    for groups, message in (
        ([("a", ("m9.f9@1",))], "no node"), ([("a", ())], "no nodes in the group"),
        ([("a", ("m0.f0@1",)), ("b", ("m0.f0@1",))], "two groups"), ([("a", ("m0.f0@1", "input@0"))], "kinds"),
        ([("input@0", ("m0.f0@1",))], "label"),
        ([("a", ("m0.f0@1", "m1.f1@1")), ("b", ("m0.f2@1", "m1.f0@1"))], "circle"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            collapse(graph, groups)
