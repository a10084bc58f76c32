"""Graphs with positions: every writer and reader once for each span of the prompt, and attention as edges of its own.

A span is a named run of neighbouring positions ("subject", "verb", ...); a single position is a span of length one.
What a position-free graph has in one piece becomes

    a1.h0 -> a2.h3<k>     for every span s          a1.h0@s -> a2.h3<k>@s                    (same span)
    a2.h3<k>, a2.h3<v>    for spans j up to i       a2.h3<k>@j -> a2.h3@i, a2.h3<v>@j -> a2.h3@i
    a2.h3<q>              for every span i          a2.h3<q>@i -> a2.h3@i                     (inside attention)

so information changes its place along edges that can be scored and cut like all others. What a reader ``a2.h3<k>@j``
made of the stream is a writer of the same name; the reader ``a2.h3@i`` gathers queries, keys and values and feeds the
writer ``a2.h3@i``. Edges from which no answer can be reached are not possible edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.errors import GraphError
from circuitkit.functional.select import prune_dangling
from circuitkit.graph import Graph, Node
from circuitkit.shapes import EdgeMask, EdgeMatrix

SLOTS = ("q", "k", "v")
MOST_ENTRIES = 400_000_000  # of the edge matrix, which grows with the square of the number of spans


def positional_graph(base: Graph, spans: Sequence[str], read_at: Iterable[int], *, causal: bool = True) -> Graph:
    """A graph's copy for every span.

    Args:
        base: the position-free graph.
        spans: their names, in the order in which they tile a prompt.
        read_at: numbers of the spans in which an answer is read; only these have logits.
        causal: whether keys and values reach only their own span and later ones.

    Raises:
        GraphError: for names that cannot be told apart in the name of an edge, or so many spans that the edge matrix
            would not fit any memory.

    >>> from circuitkit.graph import chain_graph
    >>> graph = positional_graph(chain_graph(1), ["a", "b"], [1])
    >>> graph.sources, graph.n_edges
    (('input@a', 'input@b', 'm0@a', 'm0@b'), 3)
    """
    _check_names(base, spans)
    n, nodes, answered = len(spans), base.destination_nodes, set(read_at)
    attention = [c for c, node in enumerate(nodes) if node.slot in SLOTS]
    heads = base.feeds[attention].any(0).nonzero().flatten().tolist()
    if any(base.source_nodes[row].kind != "head" for row in heads):
        raise GraphError(
            "attention is written by a dictionary's latents here, and which head carries what from span to span is lost"
            " among them; leave dictionaries of attn-out out of a graph with positions"
        )
    sources = _ordered(base, range(len(base.sources)), attention, n)
    destinations = _ordered(base, heads, range(len(nodes)), n)
    destinations = [e for e in destinations if e.is_row or nodes[e.number].kind != "logits" or e.span in answered]
    # Numbers of the copies: of writers and what they carry inside attention, of what heads gather and other readers.
    writer, carrier = _numbers(base, sources, n)
    gather, reader = _numbers(base, destinations, n)
    mask = torch.zeros(len(sources), len(destinations), dtype=torch.bool)
    feeds = torch.zeros(len(destinations), len(sources), dtype=torch.bool)
    plain = base.feeds.clone()
    plain[attention] = False
    for s in range(n):
        _set(mask, writer[:, s], reader[:, s], base.mask)
        _set(feeds, reader[:, s], writer[:, s], plain)
    feeds[reader[attention].flatten(), carrier[attention].flatten()] = True
    feeds[gather[heads].flatten(), writer[heads].flatten()] = True
    every = torch.ones(n, n, dtype=torch.bool)
    for c in attention:
        # Key span first: which spans of queries see a span of keys or values, or have a query of their own.
        pairs = every.triu().tril() if nodes[c].slot == "q" else every.triu() if causal else every
        j, i = pairs.nonzero(as_tuple=True)
        mask[carrier[c, j][:, None], gather[base.feeds[c]][:, i].T] = True
    writers, readers = (tuple(_copy(base, e, spans[e.span]) for e in side) for side in (sources, destinations))
    return Graph(writers, readers, prune_dangling(mask, feeds), feeds)


def _check_names(base: Graph, spans: Sequence[str]) -> None:
    if not spans or len(set(spans)) < len(spans):
        raise GraphError(f"got the spans {', '.join(spans) or 'none'}, expected at least one, all different")
    for name in spans:
        if not name or "->" in name or "@" in name:
            raise GraphError(f"got a span named {name!r}, expected a name without '->' and '@'; rename it")
    attention = sum(node.slot in SLOTS for node in base.destination_nodes)
    entries = (len(spans) * (len(base.sources) + attention)) ** 2
    if entries > MOST_ENTRIES:
        raise GraphError(
            f"{len(spans)} spans of {len(base.sources)} writers make an edge matrix of {entries:,} entries, at most "
            f"{MOST_ENTRIES:,} are held; give a schema of fewer and longer spans"
        )


class _Entry(NamedTuple):
    """A copy of a node: a row of the base graph or a column; sorts by order of computation."""

    stage: int
    is_row: bool
    number: int
    span: int


def _ordered(base: Graph, rows: Iterable[int], columns: Iterable[int], n: int) -> list[_Entry]:
    """A copy of each row and column for every span; what a head reads comes before what it makes of it."""
    sources, nodes = base.source_nodes, base.destination_nodes
    entries = [_Entry(2 * sources[u].stage, True, u, s) for u in rows for s in range(n)]
    for c in columns:
        entries += [_Entry(2 * nodes[c].stage - (nodes[c].slot in SLOTS), False, c, s) for s in range(n)]
    return sorted(entries)


def _numbers(base: Graph, entries: list[_Entry], n: int) -> tuple[Tensor, Tensor]:
    """Number of each copy, by row and span and by column and span; -1 where there is none."""
    rows, columns = torch.full((len(base.sources), n), -1), torch.full((len(base.destinations), n), -1)
    for i, entry in enumerate(entries):
        (rows if entry.is_row else columns)[entry.number, entry.span] = i
    return rows, columns


def _set(matrix: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write a matrix at the given rows and columns, leaving out those that do not exist (-1)."""
    r, c = rows >= 0, columns >= 0
    matrix[rows[r][:, None], columns[c][None]] = values[r][:, c]


def _copy(base: Graph, entry: _Entry, span: str) -> Node:
    node = base.source_nodes[entry.number] if entry.is_row else base.destination_nodes[entry.number]
    return replace(node, name=f"{node.name}@{span}", stage=entry.stage, span=span)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which edge of a graph with positions is which of the position-free one.

    Args:
        base: the position-free graph.
        spans: names of the spans, in order.
        shape: of the edge matrix with positions.
        row, column: of every possible edge, in matrix order.
        inside: which of these are inside attention.
        same: span, row and column in the base graph of the others.
        across: slot (0 q, 1 k, 2 v), row of the head, span of the key and of the query of those inside attention.
    """

    base: Graph
    spans: tuple[str, ...]
    shape: tuple[int, int]
    row: Int[Tensor, " edge"]
    column: Int[Tensor, " edge"]
    inside: Bool[Tensor, " edge"]
    same: tuple[Tensor, Tensor, Tensor]
    across: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, graph: Graph) -> Layout:
        """The layout of a graph that `positional_graph` made, from its nodes alone.

        Raises:
            GraphError: if the graph has no positions.
        """
        if not is_positional(graph):
            raise GraphError("this graph has no positions; make one with circuitkit.positions.positional_graph")
        sources, destinations = graph.source_nodes, graph.destination_nodes
        spans = tuple(dict.fromkeys(str(node.span) for node in sources))
        rows = _without_spans([node for node in sources if node.slot not in SLOTS])
        columns = _without_spans([node for node in destinations if not _is_gathering(node)])
        row_of, column_of = ({name: i for i, name in enumerate(nodes)} for nodes in (rows, columns))
        of_source = torch.tensor([(column_of if n.slot in SLOTS else row_of)[_bare(n)] for n in sources])
        of_destination = torch.tensor([(row_of if _is_gathering(n) else column_of)[_bare(n)] for n in destinations])
        at_source, at_destination = (
            torch.tensor([spans.index(str(n.span)) for n in s]) for s in (sources, destinations)
        )
        slot = torch.tensor([SLOTS.index(n.slot) if n.slot in SLOTS else -1 for n in sources])
        row, column = graph.mask.nonzero(as_tuple=True)
        inside = slot[row] >= 0
        (r, ri), (c, ci) = ((t[~inside], t[inside]) for t in (row, column))
        same = (at_source[r], of_source[r], of_destination[c])
        across = (slot[ri], of_destination[ci], at_source[ri], at_destination[ci])
        mask = torch.zeros(len(rows), len(columns), dtype=torch.bool)
        mask[same[1:]] = True
        feeds = torch.zeros(len(columns), len(rows), dtype=torch.bool)
        feeds[of_source[ri], of_destination[ci]] = True
        for reader, writer in graph.feeds.nonzero().tolist():
            if sources[writer].slot not in SLOTS and not _is_gathering(destinations[reader]):
                feeds[of_destination[reader], of_source[writer]] = True
        base = Graph(tuple(rows.values()), tuple(columns.values()), mask, feeds)
        return cls(base, spans, (len(sources), len(destinations)), row, column, inside, same, across)

    def split(
        self, chosen: Bool[Tensor, "circuit src dst"]
    ) -> tuple[Bool[Tensor, "circuit span row column"], Bool[Tensor, "circuit slot row key query"]]:
        """Sets of edges as two small tensors: edges within a span, edges inside attention."""
        n, (rows, columns) = len(self.spans), self.base.mask.shape
        picked = chosen[:, self.row, self.column]
        same = chosen.new_zeros(len(chosen), n, rows, columns)
        across = chosen.new_zeros(len(chosen), len(SLOTS), rows, n, n)
        same[(slice(None), *self.same)] = picked[:, ~self.inside]
        across[(slice(None), *self.across)] = picked[:, self.inside]
        return same, across

    def join(
        self, same: Float[Tensor, "batch span row column"], across: Float[Tensor, "batch slot row key query"]
    ) -> Float[Tensor, "batch edge"]:
        """The inverse of `split` for numbers: one for each possible edge, in matrix order."""
        out = same.new_empty(len(same), len(self.row))
        out[:, self.inside.to(out.device)] = across[(slice(None), *self.across)].to(out.dtype)
        out[:, ~self.inside.to(out.device)] = same[(slice(None), *self.same)]
        return out

    def matrix(self, values: Float[Tensor, " edge"]) -> EdgeMatrix:
        """Numbers of the possible edges as an edge matrix, zero elsewhere."""
        out = values.new_zeros(self.shape)
        out[self.row, self.column] = values
        return out

    def collapse(self, chosen: EdgeMask) -> EdgeMask:
        """The edges of the position-free graph that are chosen in any span."""
        return self.split(chosen[None])[0][0].any(0)

    def largest(self, values: EdgeMatrix) -> EdgeMatrix:
        """For every edge of the position-free graph its largest magnitude over spans."""
        out = values.new_zeros(len(self.spans), *self.base.mask.shape)
        out[self.same] = values[self.row, self.column][~self.inside].abs()
        return out.amax(0)


def is_positional(graph: Graph) -> bool:
    """Whether the nodes of a graph stand for spans of positions."""
    return any(node.span is not None for node in graph.source_nodes)


def _is_gathering(node: Node) -> bool:
    """Whether a reader is a head's output, which queries, keys and values go into."""
    return node.kind == "head" and node.slot is None


def _without_spans(nodes: list[Node]) -> dict[str, Node]:
    """Position-free nodes by name, in order."""
    found: dict[str, Node] = {}
    for node in nodes:
        stage = (node.stage + (node.slot in SLOTS)) // 2
        found.setdefault(_bare(node), replace(node, name=_bare(node), stage=stage, span=None))
    return found


def _bare(node: Node) -> str:
    return node.name.removesuffix(f"@{node.span}")
