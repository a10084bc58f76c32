"""One graph for many prompts: nodes of one feature become one node, effects are averaged.

    effect(s -> t) = 1 / prompts * sum over prompts, and over positions p of s and q of t, of effect(s@p -> t@q)

Tokens are one node for each id, biases, positions and errors one for each component. A prompt that lacks a node counts
as 0 for it. Sums and means are linear, so rows still add up: to the mean over prompts of the target's total at all of
its positions.

Wrong as a picture of any one prompt: two features that never meet in a prompt may both be strong, and what goes from
position to position is no longer seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.features.graph import FeatureGraph, FeatureNode


@dataclass(frozen=True, order=True)
class _Key:
    """What nodes that become one have in common; in the order of the merged graph."""

    stage: int
    layer: int
    kind: str
    site: str
    index: int
    stem: str


def merge(graphs: Sequence[FeatureGraph]) -> FeatureGraph:
    """The mean of several prompts' graphs, positions summed.

    Its ``tokens`` are the ids that occur, each once, and a token's ``position`` is its place among these; other nodes
    have none. ``value`` and ``weights`` are summed and averaged as effects are (so that a token's is how often it
    occurs), and ``counts`` says in how many prompts each node is.

    Args:
        graphs: of one model, made with the same dictionaries and options, one for each prompt.

    Raises:
        OptionError: for no graphs, for graphs of several models or with other stages, or merged ones.
    """
    graphs = list(graphs)
    _check(graphs)
    keys = [[_key(node) for node in graph.nodes] for graph in graphs]
    order = sorted({key for of_one in keys for key in of_one})
    column = {key: i for i, key in enumerate(order)}
    device = graphs[0].effects.device
    places = [torch.tensor([column[key] for key in of_one], device=device) for of_one in keys]
    targets = torch.cat([place[graph.targets] for place, graph in zip(places, graphs, strict=True)]).unique()
    row = torch.full((len(order),), -1, device=device)
    row[targets] = torch.arange(len(targets), device=device)
    effects = torch.zeros(len(targets), len(order), dtype=torch.float64, device=device)
    totals, weights, values = (
        effects.new_zeros(len(targets)),
        effects.new_zeros(len(order)),
        effects.new_zeros(len(order)),
    )
    counts = torch.zeros(len(order), dtype=torch.long, device=device)
    for place, graph in zip(places, graphs, strict=True):
        _add(effects, graph.effects, row[place[graph.targets]], place)
        totals.index_add_(0, row[place[graph.targets]], graph.totals.double())
        weights.index_add_(0, place, graph.weights.double())
        values.index_add_(0, place, torch.tensor([node.value for node in graph.nodes], device=device).double())
        counts[place.unique()] += 1
    n, like = len(graphs), graphs[0]
    tokens, texts = _tokens(graphs)
    nodes = _nodes(order, (values / n).tolist(), {int(token): i for i, token in enumerate(tokens)})
    return FeatureGraph(
        nodes, targets, (effects / n).to(like.effects), (totals / n).to(like.totals), weights / n, tokens, like.model,
        texts, counts, {token: text for graph in graphs for token, text in graph.target_tokens.items()},
    )  # fmt: skip


def _check(graphs: Sequence[FeatureGraph]) -> None:
    if not graphs:
        raise OptionError("got no graphs to merge, expected at least one")
    if len(models := sorted({graph.model for graph in graphs})) > 1:
        raise OptionError(f"got graphs of {', '.join(models)}, expected graphs of one model")
    if any(graph.counts is not None for graph in graphs):
        raise OptionError("got a graph that has been merged already, expected one graph for each prompt; merge those")
    stages: dict[_Key, int] = {}
    for key in {_key(node) for graph in graphs for node in graph.nodes}:
        if stages.setdefault(replace(key, stage=0), key.stage) != key.stage:
            raise OptionError(
                f"got graphs in which {key.stem} is computed at different stages; merge graphs that were made with the "
                "same dictionaries and options"
            )


def _key(node: FeatureNode) -> _Key:
    stem = node.name if node.position is None else node.name.rpartition("@")[0] or node.name
    stem = f"{stem}.{node.index}" if node.kind == "token" else stem
    return _Key(node.stage, node.layer, node.kind, node.site, -1 if node.index is None else node.index, stem)


def _add(
    out: Float[Tensor, "target node"],
    effects: Float[Tensor, "row column"],
    rows: Int[Tensor, " row"],
    columns: Int[Tensor, " column"],
) -> None:
    """Add a matrix to another, each row and column to its place; several may share one."""
    used, place = columns.unique(return_inverse=True)
    for some in torch.arange(len(rows), device=rows.device).split(1024):
        by_column = out.new_zeros(len(some), len(used)).index_add_(1, place, effects[some].double())
        whole = out.new_zeros(len(some), out.shape[1])
        whole[:, used] = by_column
        out.index_add_(0, rows[some], whole)


def _tokens(graphs: Sequence[FeatureGraph]) -> tuple[Int[Tensor, " pos"], tuple[str, ...]]:
    """Ids that occur, and their texts if all graphs have texts."""
    tokens = torch.cat([graph.tokens for graph in graphs]).unique()
    if not all(len(graph.texts) == len(graph.tokens) for graph in graphs):
        return tokens, ()
    texts = {t: text for graph in graphs for t, text in zip(graph.tokens.tolist(), graph.texts, strict=True)}
    return tokens, tuple(texts[token] for token in tokens.tolist())


def _nodes(order: Sequence[_Key], values: Sequence[float], places: dict[int, int]) -> tuple[FeatureNode, ...]:
    shared = Counter(key.stem for key in order)
    nodes = []
    for key, value in zip(order, values, strict=True):
        name = key.stem if shared[key.stem] == 1 else f"{key.stem}.{key.site}.{key.stage}"
        position = places[key.index] if key.kind == "token" else None
        index = None if key.index < 0 else key.index
        nodes.append(FeatureNode(name, key.kind, key.layer, key.site, position, index, value, key.stage))
    return tuple(nodes)
