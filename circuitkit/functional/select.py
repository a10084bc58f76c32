"""From edge scores to a set of edges in which every edge lies on a path from the input to the logits.

``mask`` and ``chosen`` are [src, dst]; ``feeds`` is [dst, src]: which readers are inputs of which writers.
"""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Bool, Float, Int
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
    edges, feeds = chosen.float(), feeds.float()
    from_root, to_sink = ~feeds.any(0), ~feeds.any(1)
    while True:
        reads = (from_root.float() @ edges) > 0
        grown = from_root | ((reads.float() @ feeds) > 0)
        if torch.equal(grown, from_root):
            break
        from_root = grown
    while True:
        used = (edges @ to_sink.float()) > 0
        grown = to_sink | ((feeds @ used.float()) > 0)
        if torch.equal(grown, to_sink):
            break
        to_sink = grown
    return chosen & from_root[:, None] & to_sink[None, :]


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
    while low < high:
        middle = (low + high + 1) // 2
        if int(prune_dangling(first_edges(order, middle, mask), feeds).sum()) <= n:
            low = middle
        else:
            high = middle - 1
    return prune_dangling(first_edges(order, low, mask), feeds)


def grown_order(values: EdgeMatrix, mask: EdgeMask, feeds: Bool[Tensor, "dst src"], *, absolute: bool) -> Tensor:
    """Edges in best-first order from the sinks: only edges into readers already reached compete.

    Needed where scores are comparable within a reader only (Ferrando and Voita 2024, information flow routes).
    """
    strength = (values.abs() if absolute else values).tolist()
    into = [column.nonzero().flatten().tolist() for column in mask.T]
    inputs = [column.nonzero().flatten().tolist() for column in feeds.T]
    queue: list[tuple[float, int, int]] = []
    reached_reader, reached_writer = set[int](), set[int]()

    def open_reader(dst: int) -> None:
        if dst not in reached_reader:
            reached_reader.add(dst)
            for src in into[dst]:
                heapq.heappush(queue, (-strength[src][dst], src, dst))

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
    """A union of random walks from a sink back to a root with at most ``n`` edges: a baseline of equal size.

    Every edge lies on a complete path. Walks that would exceed ``n`` are dropped; after 50 in a row it stops.
    """
    chosen = torch.zeros_like(mask)
    sinks = (~feeds.any(1)).nonzero().flatten()
    count, rejected = 0, 0
    while count < n and rejected < 50:
        walk = _walk_to_root(sinks, mask, feeds, generator)
        fresh = [edge for edge in walk if not chosen[edge]]
        if not fresh or count + len(fresh) > n:
            rejected += 1
            continue
        rejected = 0
        for edge in fresh:
            chosen[edge] = True
        count += len(fresh)
    return chosen


def _walk_to_root(sinks: Tensor, mask: EdgeMask, feeds: Tensor, generator: torch.Generator) -> list[tuple[int, int]]:
    walk: list[tuple[int, int]] = []
    readers = sinks
    while len(readers) and len(walk) < len(mask):
        dst = _pick(readers, generator)
        src = _pick(mask[:, dst].nonzero().flatten(), generator)
        if (src, dst) not in walk:
            walk.append((src, dst))
        readers = feeds[:, src].nonzero().flatten()
    return walk


def _pick(items: Float[Tensor, " n"] | Tensor, generator: torch.Generator) -> int:
    return int(items[torch.randint(len(items), (1,), generator=generator)])
