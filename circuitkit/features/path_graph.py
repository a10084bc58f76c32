"""From paths to a graph: equal sources become one node, what flowed along equal edges is added up.

    flow(s -> t) = sum of contributions of all paths that end in  t <- s

in units of the final target. Whatever else flowed into t is kept apart in three nodes of its own:

    error.t    errors of transcoders, and MLPs without one
    bias.t     constants
    pruned.t   sources that no path was kept to

so that every row adds up to all that flowed out of t.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.path_search import Opened, Path
from circuitkit.features.transcoder_paths import Hop

REMAINDERS = (("error", "error"), ("bias", "bias"), ("pruned", "error"))


def path_graph(
    target: FeatureNode, total: float, paths: Sequence[Path], opened: Sequence[Opened], tokens: Tensor, model: str
) -> FeatureGraph:
    """Paths merged to a graph.

    Args:
        target: where all paths begin.
        total: its value.
        paths: all that were kept, in any round.
        opened: those that were taken apart, the target among them.
        tokens: the prompt.
        model: its name.
    """
    nodes = {target.name: target}
    flows: dict[tuple[str, str], float] = defaultdict(float)
    totals: dict[str, float] = defaultdict(float, {target.name: total})
    for path in paths:
        parent, child = _end(target, path.hops[:-1]), _end(target, path.hops)
        nodes[child.name] = child
        flows[parent.name, child.name] += path.contribution
        totals[child.name] += path.contribution
    parents = {(node := _end(target, one.path.hops)).name: node for one in opened}
    for one in opened:
        parent = _end(target, one.path.hops)
        flows[parent.name, f"error.{parent.name}"] += one.error
        flows[parent.name, f"bias.{parent.name}"] += one.bias
    shared: dict[str, float] = defaultdict(float)
    for (name, _), flow in flows.items():
        shared[name] += flow
    for name, parent in parents.items():
        flows[name, f"pruned.{name}"] = totals[name] - shared[name]
        for prefix, kind in REMAINDERS:
            rest = f"{prefix}.{name}"
            nodes[rest] = FeatureNode(rest, kind, parent.layer, parent.site, parent.position, None, 1.0, 0)
    return _matrix(target, nodes, list(parents), flows, totals, tokens, model)


def _end(target: FeatureNode, hops: Sequence[Hop]) -> FeatureNode:
    return hops[-1].node if hops else target


def _matrix(
    target: FeatureNode,
    nodes: dict[str, FeatureNode],
    parents: list[str],
    flows: dict[tuple[str, str], float],
    totals: dict[str, float],
    tokens: Tensor,
    model: str,
) -> FeatureGraph:
    ordered = sorted(nodes.values(), key=lambda node: (node.name == target.name, node.stage))
    numbers = {node.name: i for i, node in enumerate(ordered)}
    rows = {name: i for i, name in enumerate(parents)}
    effects = torch.zeros(len(parents), len(ordered), dtype=torch.float64)
    for (parent, child), flow in flows.items():
        effects[rows[parent], numbers[child]] = flow
    weights = torch.zeros(len(ordered), dtype=torch.float64)
    weights[-1] = 1.0
    return FeatureGraph(
        tuple(ordered), torch.tensor([numbers[name] for name in parents]), effects,
        torch.tensor([totals[name] for name in parents], dtype=torch.float64), weights, tokens.cpu(), model,
    )  # fmt: skip
