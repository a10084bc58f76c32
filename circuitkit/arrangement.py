"""Which boxes some edges of a graph need, and where they stand.

A head's q, k and v readers are drawn at the head's own box, and a unit's gates at the unit's. A reader that feeds
several writers (a key/value head under grouped-query attention) or a whole gate has a box of its own, tied to what it
feeds by inner links. Rows follow the order of computation; the two directions of a recurrent layer share their rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from circuitkit.functional import routes
from circuitkit.functional.layout import in_columns, layered_x, wrap_rows
from circuitkit.graph import RECURRENT_KINDS, Graph, Node

WIDEST_ROW, WIDEST_COLUMN, TALLEST_COLUMN = 24, 3, 9
_LOWER = ("cell", "subspace")  # within a stage these stand below the units that they feed


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Boxes from the bottom up, and where they stand.

    Args:
        names: of the boxes.
        nodes: the writer or reader that each box is.
        lone: whether a box is no writer's, but feeds some.
        line: counted from the bottom.
        x, y: in node distances.
        ends: numbers of the boxes of each edge's source and target.
        inner: numbers of boxes of which the first is an input of the second.
        spans: names of the columns, in order.
    """

    names: tuple[str, ...]
    nodes: tuple[Node, ...]
    lone: tuple[bool, ...]
    line: Int[np.ndarray, "box"]
    x: Float[np.ndarray, "box"]
    y: Float[np.ndarray, "box"]
    ends: Int[np.ndarray, "edge two"]
    inner: tuple[tuple[int, int], ...]
    spans: tuple[str, ...]


def arrange(
    graph: Graph, src: Int[np.ndarray, "edge"], dst: Int[np.ndarray, "edge"], weight: Float[np.ndarray, "edge"]
) -> Arrangement:
    """The boxes of some edges, given by row and column of the edge matrix and how much they matter.

    >>> from circuitkit.graph import chain_graph
    >>> plan = arrange(chain_graph(1), np.array([0, 1]), np.array([0, 1]), np.ones(2))
    >>> plan.names, plan.ends.tolist()
    (('input', 'm0', 'logits'), [[0, 1], [1, 2]])
    """
    owner, lone = _owners(graph)
    found: dict[str, Node] = {}
    for s, d in zip(src.tolist(), dst.tolist(), strict=True):
        found.setdefault(graph.sources[s], graph.source_nodes[s])
        found.setdefault(*owner[d])
    stages = _stages(graph, found)
    fed = _fed(graph, owner)
    level = {name: (stages[name], name not in lone, _rank(node), name in fed) for name, node in found.items()}
    names = sorted(found, key=lambda name: (level[name], found[name].stage, found[name].index or 0))
    nodes, levels = [found[name] for name in names], sorted(set(level.values()))
    number = {name: i for i, name in enumerate(names)}
    pairs = [(number[graph.sources[s]], number[owner[d][0]]) for s, d in zip(src, dst, strict=True)]
    ends = np.array(pairs, dtype=int).reshape(-1, 2)
    inner = _inner(owner, graph, dst, number)
    row = np.array([levels.index(level[name]) for name in names], dtype=int)
    spans = tuple(span for span in dict.fromkeys(node.span for node in graph.source_nodes) if span is not None)
    x, part = _across(nodes, row, (ends, inner), weight, spans)
    line, y = routes.heights(row, part, np.array([node.layer for node in nodes], dtype=int), x, ends)
    alone = tuple(name in lone for name in names)
    # Where a norm makes each unit an input of all units beside it, a line through all of them would say nothing.
    inner = tuple((a, b) for a, b in inner if line[a] != line[b])
    return Arrangement(tuple(names), tuple(nodes), alone, line, x, y, ends, inner, spans)


def bare(node: Node) -> str:
    """A node's name without its span.

    >>> bare(Node("l0.h1@4-7", "unit", 0, 1, 1, span="4-7"))
    'l0.h1'
    """
    return node.name.removesuffix(f"@{node.span}")


def _owners(graph: Graph) -> tuple[list[tuple[str, Node]], set[str]]:
    """The box that each reader is drawn at, and the names of the boxes that are no writer's but feed some."""
    rows = {name: i for i, name in enumerate(graph.sources)}
    owners: list[tuple[str, Node]] = []
    lone: set[str] = set()
    for node, feeds in zip(graph.destination_nodes, graph.feeds, strict=True):
        fed = feeds.nonzero().flatten().tolist()
        name = node.name.replace(f"<{node.slot}>", "") if node.slot else node.name
        whole_gate = node.kind == "gate" and node.index is None and node.slot
        row = fed[0] if len(fed) == 1 else rows.get(name)
        if row is not None and not whole_gate:
            owners.append((graph.sources[row], graph.source_nodes[row]))
            continue
        name = node.name if whole_gate else name
        owners.append((name, node))
        lone |= {name} if fed else set()
    return owners, lone


def _stages(graph: Graph, found: dict[str, Node]) -> dict[str, int]:
    """The stage of each box: the same for copies in all windows, and for stages of a layer that do not read each other.

    The latter holds for recurrent layers only: their two directions.
    """
    first: dict[str, int] = {}
    for node in (*graph.source_nodes, *graph.destination_nodes):
        first[bare(node)] = min(node.stage, first.get(bare(node), node.stage))
    if not any(node.kind in RECURRENT_KINDS for node in found.values()):
        return {name: first[bare(node)] for name, node in found.items()}
    writes, reads = (np.array([first[bare(n)] for n in side]) for side in (graph.source_nodes, graph.destination_nodes))
    rows, columns = graph.mask.cpu().numpy().nonzero()
    most = int(reads.max()) + 1
    links = {divmod(int(code), most) for code in np.unique(writes[rows] * most + reads[columns])}
    layer = {first[bare(node)]: node.layer for node in (*graph.source_nodes, *graph.destination_nodes)}
    depth: dict[int, int] = {}
    for stage in sorted(layer):
        before = [depth[s] for s in depth if layer[s] == layer[stage] and (s, stage) in links]
        depth[stage] = max(before, default=-1) + 1
    rows_of = {n: [s for s in sorted(layer) if layer[s] == n] for n in layer.values()}
    beside = {stage: rows_of[layer[stage]][d] for stage, d in depth.items()}
    return {name: beside[first[bare(node)]] for name, node in found.items()}


def _fed(graph: Graph, owner: list[tuple[str, Node]]) -> set[str]:
    """Names of writers that a reader of another writer's box feeds number by number, as a rate is made of its state.

    They stand above it. Where a norm makes each unit an input of all units beside it, none does.
    """
    out = set()
    for (name, node), feeds in zip(owner, graph.feeds, strict=True):
        for writer in feeds.nonzero().flatten().tolist():
            other = graph.source_nodes[writer]
            same = (other.kind, other.index, other.stage, other.span) == (node.kind, node.index, node.stage, node.span)
            out |= {other.name} if same and other.name != name and node.index is not None else set()
    return out


def _rank(node: Node) -> int:
    """Within a stage: memory cells below units."""
    return _LOWER.index(node.kind) if node.kind in _LOWER else len(_LOWER)


def _across(
    nodes: list[Node],
    row: np.ndarray,
    links: tuple[np.ndarray, tuple[tuple[int, int], ...]],
    weight: np.ndarray,
    spans: tuple[str, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Where boxes stand from left to right, and the line of each within its row; inner links are kept short."""
    recurrent = any(node.kind in RECURRENT_KINDS for node in nodes)
    has_heads = not spans and any(node.kind == "head" for node in nodes)
    aside = np.array([has_heads and node.kind == "mlp" for node in nodes], dtype=bool)
    x, inside = np.zeros(len(nodes)), np.flatnonzero(~aside)
    ends, inner = links
    if recurrent:
        ends = np.concatenate([ends, np.array(inner, dtype=int).reshape(-1, 2)])
        weight = np.concatenate([weight, np.full(len(inner), 2 * weight.max(initial=1e-9))])
    kept = ~(aside[ends].any(1)) if len(ends) else np.zeros(0, dtype=bool)
    renumbered = np.cumsum(~aside) - 1
    x[inside] = layered_x(row[inside], renumbered[ends[kept]], weight[kept])
    if spans and nodes:
        column = np.array([spans.index(str(node.span)) for node in nodes])
        if not recurrent:
            return in_columns(x, row, column, WIDEST_COLUMN)
        same = np.unique([bare(node) for node in nodes], return_inverse=True)[1]
        return in_columns(x, row, column, _widest(int(same.max()) + 1, len(spans)), same)
    x, line = wrap_rows(x, row, WIDEST_ROW)
    # A column of their own keeps the MLPs out of the way of the edges between heads.
    x[aside] = (np.abs(x[inside]).max() if len(inside) else 0.0) + 1.3
    return x, line


def _widest(n_nodes: int, n_windows: int) -> int:
    """Boxes of a window side by side: one above the other if they are few, so that each state has a line of its own."""
    if n_windows < 3:
        return WIDEST_ROW // n_windows
    return 1 if n_nodes <= TALLEST_COLUMN else WIDEST_COLUMN


def _inner(
    owner: list[tuple[str, Node]], graph: Graph, dst: np.ndarray, number: dict[str, int]
) -> tuple[tuple[int, int], ...]:
    """From the box of each reader that is drawn to the boxes of the writers that it feeds."""
    links: set[tuple[int, int]] = set()
    for reader in set(dst.tolist()):
        for writer in graph.feeds[reader].nonzero().flatten().tolist():
            ends = owner[reader][0], graph.sources[writer]
            if ends[0] != ends[1] and ends[1] in number:
                links.add((number[ends[0]], number[ends[1]]))
    return tuple(sorted(links))
