"""The graph of one model: which components write, which read, and which edges can exist.

Writers (sources) are the rows, readers (destinations) the columns of every edge matrix. A reader belongs to the
writers that it feeds: the reader ``a3.h5<q>`` feeds the writer ``a3.h5``; ``a3.kv1<k>`` feeds every head of its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from circuitkit.errors import GraphError
from circuitkit.shapes import EdgeMask

RECURRENT_KINDS = frozenset({"unit", "cell", "gate", "layer", "subspace"})  # of nodes that only recurrent networks have


@dataclass(frozen=True)
class Node:
    """A writer or a reader.

    Args:
        name: unique among writers and among readers; ``input``, ``a3.h5``, ``m3``, ``a3.h5<q>``, ``logits``.
        kind: ``input``, ``head``, ``kv``, ``mlp``, ``neuron``, ``logits``, ``latent``, ``error``; of recurrent networks
            ``unit``, ``cell``, ``gate``, ``layer``, ``subspace``.
        layer: 0-based layer; -1 for the input, the number of layers for the logits.
        stage: order of computation; an edge always goes to a later stage (or, in a recurrent layer, a later step).
        index: which head, unit or latent of the layer; None if it is the only one.
        slot: what a reader reads for: ``q``, ``k``, ``v``, a gate's name, or None.
        span: which positions it stands for (see `circuitkit.positions`); None for all of them.
    """

    name: str
    kind: str
    layer: int
    stage: int
    index: int | None = None
    slot: str | None = None
    span: str | None = None


@dataclass(frozen=True, eq=False)
class Graph:
    """Names, kinds and layers of a model's writers and readers, and the mask of possible edges.

    Args:
        source_nodes: the writers, in order of computation.
        destination_nodes: the readers, in order of computation.
        mask: ``mask[src, dst]`` is True where an edge can exist.
        feeds: ``feeds[dst, src]`` is True where a reader is an input of a writer.

    Raises:
        GraphError: if the shapes disagree or a name occurs twice.

    >>> graph = chain_graph(2)
    >>> graph.sources, graph.destinations, graph.n_edges
    (('input', 'm0', 'm1'), ('m0', 'm1', 'logits'), 6)
    """

    source_nodes: tuple[Node, ...]
    destination_nodes: tuple[Node, ...]
    mask: EdgeMask
    feeds: Tensor

    def __post_init__(self) -> None:
        shape = (len(self.source_nodes), len(self.destination_nodes))
        if tuple(self.mask.shape) != shape or tuple(self.feeds.shape) != shape[::-1]:
            raise GraphError(
                f"mask {tuple(self.mask.shape)} and feeds {tuple(self.feeds.shape)} do not fit "
                f"{shape[0]} sources and {shape[1]} destinations"
            )
        for names in (self.sources, self.destinations):
            if len(set(names)) != len(names):
                raise GraphError(f"node names occur twice: {sorted(n for n in set(names) if names.count(n) > 1)}")

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the writers, in order."""
        return tuple(node.name for node in self.source_nodes)

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names of the readers, in order."""
        return tuple(node.name for node in self.destination_nodes)

    @cached_property
    def n_edges(self) -> int:
        """Number of possible edges."""
        return int(self.mask.count_nonzero())

    @cached_property
    def is_recurrent(self) -> bool:
        """Whether it is the graph of a recurrent network."""
        return any(node.kind in RECURRENT_KINDS for node in (*self.source_nodes, *self.destination_nodes))

    @cached_property
    def roots(self) -> Tensor:
        """Writers that nothing feeds (the input), as a boolean vector over sources."""
        return ~self.feeds.any(0)

    @cached_property
    def sinks(self) -> Tensor:
        """Readers that feed nothing (the logits), as a boolean vector over destinations."""
        return ~self.feeds.any(1)

    @cached_property
    def _source_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.sources)}

    @cached_property
    def _destination_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.destinations)}

    def edge(self, name: str) -> tuple[int, int]:
        """Row and column of an edge written ``source->destination``.

        Raises:
            GraphError: if the text is not an edge, or this graph has no such edge.

        >>> chain_graph(2).edge("input->m1")
        (0, 1)
        """
        source, arrow, destination = name.partition("->")
        if not arrow:
            raise GraphError(f"got {name!r}, expected an edge written 'source->destination'")
        if source not in self._source_index:
            raise GraphError(f"no source {source!r} in this graph; sources are {_some(self.sources)}")
        if destination not in self._destination_index:
            raise GraphError(
                f"no destination {destination!r} in this graph; destinations are {_some(self.destinations)}"
            )
        row, column = self._source_index[source], self._destination_index[destination]
        if not self.mask[row, column]:
            raise GraphError(f"{name!r} is not a possible edge: {destination} does not read what {source} writes")
        return row, column

    def edge_mask(self, names: Iterable[str]) -> EdgeMask:
        """Boolean edge matrix with the named edges set. Raises GraphError for an edge that cannot exist."""
        chosen = torch.zeros_like(self.mask)
        for name in names:
            chosen[self.edge(name)] = True
        return chosen

    def edge_names(self, chosen: EdgeMask | None = None) -> Iterator[str]:
        """Names of the chosen (default: all possible) edges, in matrix order."""
        for row, column in (self.mask if chosen is None else chosen).nonzero().tolist():
            yield f"{self.sources[row]}->{self.destinations[column]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file; `from_dict` restores it exactly."""
        return {
            "sources": [_plain(node) for node in self.source_nodes],
            "destinations": [_plain(node) for node in self.destination_nodes],
            "mask": ["".join("01"[bit] for bit in row) for row in self.mask.int().tolist()],
            "feeds": self.feeds.nonzero().tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Graph:
        """The graph that `to_dict` wrote."""
        sources = tuple(Node(**node) for node in data["sources"])
        destinations = tuple(Node(**node) for node in data["destinations"])
        mask = torch.tensor([[bit == "1" for bit in row] for row in data["mask"]], dtype=torch.bool)
        feeds = torch.zeros(len(destinations), len(sources), dtype=torch.bool)
        for row, column in data["feeds"]:
            feeds[row, column] = True
        return cls(sources, destinations, mask.reshape(len(sources), len(destinations)), feeds)

    def same_as(self, other: Graph) -> bool:
        """Whether two graphs have the same nodes in the same order and the same possible edges."""
        return (
            self.source_nodes == other.source_nodes
            and self.destination_nodes == other.destination_nodes
            and torch.equal(self.mask, other.mask)
        )


def chain_graph(n_layers: int) -> Graph:
    """The graph of a residual network of ``n_layers`` MLPs: every component reads all earlier ones."""
    last = n_layers + 1
    sources = (Node("input", "input", -1, 0), *(Node(f"m{i}", "mlp", i, i + 1) for i in range(n_layers)))
    destinations = (
        *(Node(f"m{i}", "mlp", i, i + 1) for i in range(n_layers)),
        Node("logits", "logits", n_layers, last),
    )
    mask = torch.ones(last, last, dtype=torch.bool).triu()
    feeds = torch.zeros(last, last, dtype=torch.bool)
    feeds[torch.arange(n_layers), torch.arange(1, last)] = True
    return Graph(sources, destinations, mask, feeds)


def _plain(node: Node) -> dict[str, Any]:
    """A node's fields; a graph without positions says nothing of spans, so its files are what they always were."""
    return {name: value for name, value in vars(node).items() if name != "span" or value is not None}


def _some(names: tuple[str, ...], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
