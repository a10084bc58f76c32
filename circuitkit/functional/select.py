"""From edge scores to a set of edges in which every edge lies on a path from the input to the logits.

``mask`` and ``chosen`` are [src, dst]; ``feeds`` is [dst, src]: which readers are inputs of which writers.
"""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.shapes import EdgeMask, EdgeMatrix


def prune_dangling(chosen: EdgeMask, feeds: Bool[Tensor, "dst src"]) -> EdgeMask:
    """Keep the edges that lie on a path from a root (a writer nothing feeds) to a sink (a reader feeding nothing).

    Reachability from both ends, to a fixed point; so a cycle of a recurrent graph cannot keep itself alive.

    >>> feeds = torch.tensor([[False, True], [False, False]])            # reader 0 feeds writer 1; reader 1 is the sink
    >>> prune_dangling(torch.tensor([[True, False], [False, False]]), feeds).any().item()
    False
    >>> prune_dangling(torch.tensor([[True, False], [False, True]]), feeds).sum().item()
    2
    """
    edges = chosen.nonzero()
    kept = edges[_connected(edges, feeds.nonzero(), chosen)]
    return first_edges(kept, len(kept), chosen)


def _connected(edges: Int[Tensor, "edge two"], fed: Int[Tensor, "pair two"], like: EdgeMask) -> Bool[Tensor, " edge"]:
    """Which edges lie on a path from a root to a sink; ``fed`` are (reader, writer) pairs.

    Lists, not matrices: a graph with positions has tens of millions of entries and a few hundred thousand edges.
    """
    (src, dst), (reader, writer) = edges.T, fed.T
    from_root, to_sink = like.new_ones(like.shape[0]), like.new_ones(like.shape[1])
    from_root[writer] = False
    to_sink[reader] = False
    reads, used = torch.zeros_like(to_sink), torch.zeros_like(from_root)
    count = -1
    while count < (count := int(from_root.sum())):
        reads[dst[from_root[src]]] = True
        from_root[writer[reads[reader]]] = True
    count = -1
    while count < (count := int(to_sink.sum())):
        used[src[to_sink[dst]]] = True
        to_sink[reader[used[writer]]] = True
    return from_root[src] & to_sink[dst]


def ranked_edges(values: EdgeMatrix, mask: EdgeMask, *, absolute: bool) -> Int[Tensor, "edge two"]:
    """Possible edges from the highest score (or magnitude) down; ties keep matrix order."""
    edges = mask.nonzero()
    strength = values[edges[:, 0], edges[:, 1]]
    strength = strength.abs() if absolute else strength
    return edges[torch.sort(strength, descending=True, stable=True).indices]


def first_edges(order: Int[Tensor, "edge two"], n: int, mask: EdgeMask) -> EdgeMask:
    """The first ``n`` edges of an order, as a matrix."""
    chosen = torch.zeros_like(mask)
    chosen[order[:n, 0], order[:n, 1]] = True
    return chosen


def largest_connected(
    order: Int[Tensor, "edge two"], n: int, mask: EdgeMask, feeds: Bool[Tensor, "dst src"]
) -> EdgeMask:
    """The longest prefix of ``order`` of which at most ``n`` edges survive pruning, pruned.

    Pruning a prefix never removes what pruning a shorter one kept, so bisection finds it. Taking exactly the first
    ``n`` and then pruning (as MIB does) can leave no edge at all.
    """
    low, high = min(n, len(order)), len(order)
    fed = feeds.nonzero()
    while low < high:
        middle = (low + high + 1) // 2
        if int(_connected(order[:middle], fed, mask).sum()) <= n:
            low = middle
        else:
            high = middle - 1
    kept = order[:low][_connected(order[:low], fed, mask)]
    return first_edges(kept, len(kept), mask)


def with_ways(order: Int[Tensor, "edge two"], n: int, mask: EdgeMask, feeds: Bool[Tensor, "dst src"]) -> EdgeMask:
    """At most ``n`` edges, connected: the first of ``order``, each with a short way from a root and on to a sink.

    For rankings of which no prefix leaves between 1 and ``n`` edges: where a weak edge is the only way in, as in a
    recurrent network that is told something once, a prefix without it is not connected at all, and the shortest one
    with it is already too large. All edges are taken from that one.

    >>> mask = torch.tensor([[True, True], [False, True]])               # input->0, input->sink; unit->sink
    >>> feeds = torch.tensor([[False, True], [False, False]])
    >>> with_ways(torch.tensor([[1, 1], [0, 0], [0, 1]]), 2, mask, feeds).tolist()
    [[True, False], [False, True]]
    """
    fed, low, high = feeds.nonzero(), 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if bool(_connected(order[:middle], fed, mask).any()):
            high = middle
        else:
            low = middle + 1
    edges = [(int(s), int(d)) for s, d in order[:low][_connected(order[:low], fed, mask)].tolist()]
    from_root = _ways([(s, d) for s, d in edges], fed.tolist(), (~feeds.any(0)).nonzero().flatten().tolist())
    backward = _ways([(d, s) for s, d in edges], fed.flip(1).tolist(), (~feeds.any(1)).nonzero().flatten().tolist())
    chosen: set[tuple[int, int]] = set()
    for src, dst in edges:
        way = {(src, dst), *from_root[src], *((s, d) for d, s in backward[dst])}
        chosen |= way if len(chosen | way) <= n else set()
    out = torch.zeros_like(mask)
    out[tuple(torch.tensor(sorted(chosen), dtype=torch.long).reshape(-1, 2).T)] = True
    return out


def _ways(edges: list[tuple[int, int]], fed: list[list[int]], roots: list[int]) -> dict[int, list[tuple[int, int]]]:
    """The edges of a shortest way from a root to each writer; edges are (writer, reader), ``fed`` (reader, writer)."""
    out_of: dict[int, list[int]] = {}
    for src, dst in edges:
        out_of.setdefault(src, []).append(dst)
    fed_by: dict[int, list[int]] = {}
    for reader, writer in fed:
        fed_by.setdefault(reader, []).append(writer)
    ways: dict[int, list[tuple[int, int]]] = {root: [] for root in roots}
    queue = list(roots)
    for src in queue:
        for dst in out_of.get(src, ()):
            for writer in fed_by.get(dst, ()):
                if writer not in ways:
                    ways[writer] = [*ways[src], (src, dst)]
                    queue.append(writer)
    return ways


def grown_order(values: EdgeMatrix, mask: EdgeMask, feeds: Bool[Tensor, "dst src"], *, absolute: bool) -> Tensor:
    """Edges in best-first order from the sinks: only edges into readers already reached compete.

    Needed where scores are comparable within a reader only (Ferrando and Voita 2024, information flow routes).
    """
    values, into, inputs = values.abs() if absolute else values, _by_column(mask), _by_column(feeds)
    strength = [values[rows, column].tolist() for column, rows in enumerate(into)]
    queue: list[tuple[float, int, int]] = []
    reached_reader, reached_writer = set[int](), set[int]()

    def open_reader(dst: int) -> None:
        if dst not in reached_reader:
            reached_reader.add(dst)
            for src, value in zip(into[dst], strength[dst], strict=True):
                heapq.heappush(queue, (-value, src, dst))

    for dst in (~feeds.any(1)).nonzero().flatten().tolist():
        open_reader(dst)
    order: list[tuple[int, int]] = []
    while queue:
        _, src, dst = heapq.heappop(queue)
        order.append((src, dst))
        if src not in reached_writer:
            reached_writer.add(src)
            for reader in inputs[src]:
                open_reader(reader)
    return torch.tensor(order, dtype=torch.long).reshape(-1, 2)


def random_connected(n: int, mask: EdgeMask, feeds: Bool[Tensor, "dst src"], generator: torch.Generator) -> EdgeMask:
    """A random circuit of ``n`` edges (fewer only where no connected circuit has so many): a baseline of equal size.

    A random ranking is cut as a real one would be. Where that falls apart, as small cuts of large graphs do, random
    walks from a sink back to a root are joined, then filled up with random edges between what they connect.
    """
    possible = mask.nonzero()
    order = possible[torch.randperm(len(possible), generator=generator)]
    chosen = largest_connected(order, n, mask, feeds)
    if int(chosen.count_nonzero()) >= 0.95 * n:
        return chosen
    edges, rejected = set[tuple[int, int]](), 0
    into = _by_column(mask)
    # In a graph with windows some readers read nothing: there is no state before the first step.
    inputs = [[reader for reader in readers if into[reader]] for readers in _by_column(feeds)]
    sinks = (~feeds.any(1) & mask.any(0)).nonzero().flatten().tolist()
    while rejected < 20 and len(edges) < n:
        joined = edges.union(_walk_to_root(sinks, into, inputs, generator))
        rejected += len(joined) > n or joined == edges
        edges = joined if len(joined) <= n else edges
    chosen = torch.zeros_like(mask)
    chosen[tuple(torch.tensor(sorted(edges), dtype=torch.long).reshape(-1, 2).T)] = True
    return _fill(chosen, n, order, feeds)


def _walk_to_root(
    sinks: list[int], into: list[list[int]], inputs: list[list[int]], generator: torch.Generator
) -> list[tuple[int, int]]:
    walk: list[tuple[int, int]] = []
    readers = sinks
    while readers and len(walk) < len(inputs):
        dst = _pick(readers, generator)
        src = _pick(into[dst], generator)
        walk.append((src, dst))
        readers = inputs[src]
    return walk


def _fill(chosen: EdgeMask, n: int, order: Int[Tensor, "edge two"], feeds: Bool[Tensor, "dst src"]) -> EdgeMask:
    """Add edges in the given order between writers and readers that are connected already, up to ``n``."""
    writers = chosen.any(1) | ~feeds.any(0)
    readers = chosen.any(0) | ~feeds.any(1)
    new = order[writers[order[:, 0]] & readers[order[:, 1]] & ~chosen[order[:, 0], order[:, 1]]]
    new = new[: n - int(chosen.count_nonzero())]
    chosen = chosen.clone()
    chosen[new[:, 0], new[:, 1]] = True
    return prune_dangling(chosen, feeds)


def _by_column(matrix: Bool[Tensor, "row column"]) -> list[list[int]]:
    """The rows that are set in each column."""
    rows, columns = matrix.nonzero(as_tuple=True)
    columns, order = columns.sort(stable=True)
    counts = torch.bincount(columns, minlength=matrix.shape[1]).tolist()
    return [part.tolist() for part in rows[order].split(counts)]


def _pick(items: list[int], generator: torch.Generator) -> int:
    return items[int(torch.randint(len(items), (1,), generator=generator))]
