"""A graph whose nodes are groups of nodes.

    effect(S -> T) = sum over s in S, t in T of effect(s -> t)        total(T) = sum over t in T of total(t)

What members of a group give to each other is taken off its total, so that rows still add up: a group's total is what
it got from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.features.graph import FeatureGraph, FeatureNode


def collapse(graph: FeatureGraph, supernodes: Sequence[tuple[str, Sequence[str]]]) -> FeatureGraph:
    """The graph with each group as one node, called by the group's label; what is in no group stays as it is.

    A group has the place of its member of most influence; its ``value`` and weight are sums, its count the largest.

    Args:
        graph: of one prompt or merged.
        supernodes: labels and names of members, as `circuitkit.features.supernodes.supernodes` gives them.

    Raises:
        OptionError: for a node that is not there or in two groups, an empty group, a label that is taken, members of
            several kinds, or groups that feed each other in a circle.
    """
    groups = [(label, [graph.node(name) for name in members]) for label, members in supernodes]
    _check(graph, groups)
    leader = torch.arange(len(graph), device=graph.effects.device)
    for _, members in groups:
        strongest = max(members, key=lambda i: (float(graph.influence[i]), -i))
        leader[torch.tensor(members, device=leader.device)] = strongest
    kept, place = leader.unique(return_inverse=True)
    labels = {int(leader[members[0]]): label for label, members in groups}
    targets, row = place[graph.targets].unique(return_inverse=True)
    effects = _summed(graph.effects, row, place, len(targets), len(kept))
    own = effects[torch.arange(len(targets), device=row.device), targets].clone()
    effects[torch.arange(len(targets), device=row.device), targets] = 0
    totals = effects.new_zeros(len(targets)).index_add_(0, row, graph.totals.double()) - own
    weights = effects.new_zeros(len(kept)).index_add_(0, place, graph.weights.double())
    values = [sum(graph.nodes[i].value for i in members) for _, members in groups]
    value_of = {label: value for (label, _), value in zip(groups, values, strict=True)}
    counts = None
    if graph.counts is not None:
        counts = graph.counts.new_zeros(len(kept)).scatter_reduce_(0, place, graph.counts, "amax")
    stages = _stages(effects, targets, torch.tensor([graph.nodes[i].stage for i in kept.tolist()]), labels, kept)
    nodes = [
        _renamed(graph.nodes[i], labels.get(i), value_of, stage)
        for i, stage in zip(kept.tolist(), stages.tolist(), strict=True)
    ]
    return replace(
        graph, nodes=tuple(nodes), targets=targets, effects=effects.to(graph.effects), totals=totals.to(graph.totals),
        weights=weights, counts=counts,
    )  # fmt: skip


def _check(graph: FeatureGraph, groups: Sequence[tuple[str, Sequence[int]]]) -> None:
    grouped = [i for _, members in groups for i in members]
    if twice := [graph.nodes[i].name for i in grouped if grouped.count(i) > 1]:
        raise OptionError(f"got {twice[0]} in two groups or twice in one, expected each node once")
    left = {node.name for i, node in enumerate(graph.nodes) if i not in set(grouped)}
    labels = [label for label, _ in groups]
    for label, members in groups:
        if not members:
            raise OptionError(f"got no nodes in the group {label!r}, expected at least one")
        if len(kinds := sorted({graph.nodes[i].kind for i in members})) > 1:
            raise OptionError(f"got a group {label!r} of kinds {', '.join(kinds)}; group nodes of one kind")
        if label in left or labels.count(label) > 1:
            raise OptionError(f"got the label {label!r}, which another node or group has; choose one of its own")


def _summed(
    effects: Float[Tensor, "row column"],
    rows: Int[Tensor, " row"],
    columns: Int[Tensor, " column"],
    n_rows: int,
    n_columns: int,
) -> Float[Tensor, "_ _"]:
    by_column = torch.zeros(len(effects), n_columns, dtype=torch.float64, device=effects.device)
    by_column.index_add_(1, columns, effects.double())
    return by_column.new_zeros(n_rows, n_columns).index_add_(0, rows, by_column)


def _stages(
    effects: Float[Tensor, "target node"],
    targets: Int[Tensor, " target"],
    before: Int[Tensor, " node"],
    labels: dict[int, str],
    kept: Int[Tensor, " node"],
) -> Int[Tensor, " node"]:
    """Stages at which every edge leads to a later one: those there were, raised where groups ask for it."""
    stages, edges = before.to(effects.device), effects != 0
    for _ in range(len(stages) + 1):
        earliest = torch.where(edges, stages + 1, 0).amax(1)
        raised = stages.clone()
        raised[targets] = torch.maximum(stages[targets], earliest)
        if torch.equal(raised, stages):
            return stages
        stages = raised
    circle = [
        labels[i] for i, stage in zip(kept.tolist(), stages.tolist(), strict=True) if i in labels and stage > len(kept)
    ]
    raise OptionError(f"got groups that feed each other in a circle, {', '.join(circle) or 'all'}; split one of them")


def _renamed(node: FeatureNode, label: str | None, values: dict[str, float], stage: int) -> FeatureNode:
    return replace(node, stage=stage) if label is None else replace(node, name=label, value=values[label], stage=stage)
