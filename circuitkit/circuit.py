"""`Circuit`: the chosen edges with their scores, as arrays, and the ways to look at them and keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitkit.errors import GraphError
from circuitkit.graph import Graph
from circuitkit.result import Result
from circuitkit.shapes import EdgeMask

if TYPE_CHECKING:
    from pathlib import Path

    import networkx
    import pandas
    import plotly.graph_objects as go

    from circuitkit.scores import Scores


@dataclass(frozen=True, eq=False)
class Circuit:
    """The chosen edges with their scores, strongest first.

    Args:
        graph: the graph the edges belong to.
        src: row of each edge.
        dst: column of each edge.
        score: signed score of each edge.
        stderr: standard error of each score, or None.
        scores: the ranking it was cut from, if known (not written to the circuit's file).
        result: what the circuit was measured to do, once `evaluate` has run.
        meta: method, options, task, model and whatever else belongs in the file.

    >>> from circuitkit.graph import chain_graph
    >>> from circuitkit.scores import Scores
    >>> circuit = Scores(torch.ones(3, 3), chain_graph(2), "example").top(3)
    >>> circuit.edge_names()
    ['input->m0', 'input->logits', 'm0->logits']
    """

    graph: Graph
    src: Tensor
    dst: Tensor
    score: Tensor
    stderr: Tensor | None = None
    scores: Scores | None = None
    result: Result | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.src)

    @cached_property
    def mask(self) -> EdgeMask:
        """The chosen edges as a boolean matrix."""
        chosen = torch.zeros_like(self.graph.mask)
        chosen[self.src, self.dst] = True
        return chosen

    def edge_names(self) -> list[str]:
        """Names of the edges, strongest first."""
        names = self.graph
        return [
            f"{names.sources[s]}->{names.destinations[d]}"
            for s, d in zip(self.src.tolist(), self.dst.tolist(), strict=True)
        ]

    @classmethod
    def from_edges(cls, graph: Graph, names: list[str]) -> Circuit:
        """A circuit of named edges, each with score 1. Raises GraphError for an edge that cannot exist."""
        src, dst = graph.edge_mask(names).nonzero(as_tuple=True)
        return cls(graph, src, dst, torch.ones(len(src)))

    def union(self, other: Circuit) -> Circuit:
        """The edges of either circuit, as ``a | b`` writes it.

        Scores are the left circuit's where it has the edge, else the right one's; a standard error is known only if
        both circuits have them. The ranking, the result and the meta data belong to the operands and are left behind.

        Raises:
            GraphError: if the circuits are not of one graph.

        >>> from circuitkit.graph import chain_graph
        >>> a, b = (Circuit.from_edges(chain_graph(1), [name]) for name in ("input->m0", "m0->logits"))
        >>> (a | b).edge_names(), len(a & b), len(a - b)
        (['input->m0', 'm0->logits'], 0, 1)
        """
        return self._combined(other, self.mask | self._mask_of(other))

    def intersection(self, other: Circuit) -> Circuit:
        """The edges of both circuits, as ``a & b`` writes it; scores as in `union`. Raises GraphError."""
        return self._combined(other, self.mask & self._mask_of(other))

    def difference(self, other: Circuit) -> Circuit:
        """The edges of this circuit that the other lacks, as ``a - b`` writes it; scores as in `union`.

        Like the intersection, it may hold edges that lie on no path from the input to the logits: they are kept, so
        that set laws hold. `circuitkit.functional.select.prune_dangling` removes them from a mask.

        Raises:
            GraphError: if the circuits are not of one graph.
        """
        return self._combined(other, self.mask & ~self._mask_of(other))

    def __or__(self, other: Circuit) -> Circuit:
        return self.union(other) if isinstance(other, Circuit) else NotImplemented

    def __and__(self, other: Circuit) -> Circuit:
        return self.intersection(other) if isinstance(other, Circuit) else NotImplemented

    def __sub__(self, other: Circuit) -> Circuit:
        return self.difference(other) if isinstance(other, Circuit) else NotImplemented

    def _mask_of(self, other: Circuit) -> EdgeMask:
        if not self.graph.same_as(other.graph):
            raise GraphError(
                "the two circuits are of different graphs, so their edges cannot be compared; take two circuits of one "
                "model"
            )
        return other.mask

    def _combined(self, other: Circuit, chosen: EdgeMask) -> Circuit:
        """A circuit of the chosen edges, strongest first."""
        src, dst = chosen.nonzero(as_tuple=True)
        score = torch.where(self.mask, self._matrix(self.score), other._matrix(other.score))[src, dst]
        order = torch.sort(score.abs(), descending=True, stable=True).indices
        stderr = None
        if self.stderr is not None and other.stderr is not None:
            stderr = torch.where(self.mask, self._matrix(self.stderr), other._matrix(other.stderr))[src, dst][order]
        return Circuit(self.graph, src[order], dst[order], score[order], stderr)

    def _matrix(self, values: Tensor) -> Tensor:
        """One number per edge as a matrix, 0 elsewhere."""
        out = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        out[self.src, self.dst] = values
        return out

    def to_networkx(self) -> networkx.DiGraph:
        """A directed graph: nodes with kind, layer, head and slot; edges with score, stderr and weight = |score|.

        A head's inputs are nodes of their own (``a3.h5<q>``), tied to the head by edges of kind ``internal``; so are a
        unit's gates (``l0.h5<z>``). A recurrent graph has cycles, and a unit without gates may have a self-loop.
        """
        import networkx as nx

        out = nx.DiGraph()
        out.graph.update({k: v for k, v in self.meta.items() if isinstance(v, str | int | float)})
        writers = dict(zip(self.graph.sources, self.graph.source_nodes, strict=True))
        for s, d in zip(self.src.tolist(), self.dst.tolist(), strict=True):
            reader = self.graph.destination_nodes[d]
            # A unit reads and writes under one name: the node is what it writes.
            for node in (self.graph.source_nodes[s], writers.get(reader.name, reader)):
                attributes = {"label": node.name, "kind": node.kind, "layer": node.layer, "stage": node.stage}
                attributes |= {"head": -1 if node.index is None else node.index, "slot": node.slot or ""}
                attributes |= {} if node.span is None else {"span": node.span}
                out.add_node(node.name, **attributes)
        for i, name in enumerate(self.edge_names()):
            source, _, destination = name.partition("->")
            score = float(self.score[i])
            stderr = math.nan if self.stderr is None else float(self.stderr[i])
            slot = self.graph.destination_nodes[int(self.dst[i])].slot or ""
            out.add_edge(
                source,
                destination,
                id=name,
                kind="edge",
                slot=slot,
                score=score,
                stderr=stderr,
                weight=abs(score),
            )
        for reader, writer in self.graph.feeds.nonzero().tolist():
            inner, outer = self.graph.destinations[reader], self.graph.sources[writer]
            if inner != outer and inner in out and outer in out and not out.has_edge(inner, outer):
                slot = self.graph.destination_nodes[reader].slot or ""
                out.add_edge(
                    inner,
                    outer,
                    id=f"{inner}->{outer}",
                    kind="internal",
                    slot=slot,
                    score=0.0,
                    stderr=0.0,
                    weight=0.0,
                )
        return out

    def to_pandas(self) -> pandas.DataFrame:
        """One row per edge: source, destination, slot, score, stderr; strongest first."""
        import pandas as pd

        nodes = self.graph.destination_nodes
        return pd.DataFrame(
            {
                "source": [self.graph.sources[s] for s in self.src.tolist()],
                "destination": [self.graph.destinations[d] for d in self.dst.tolist()],
                "slot": [nodes[d].slot or "" for d in self.dst.tolist()],
                "score": self.score.tolist(),
                "stderr": [math.nan] * len(self) if self.stderr is None else self.stderr.tolist(),
            }
        )

    def plot(self) -> go.Figure:
        """The circuit as a layered plotly figure."""
        from circuitkit.figures.circuit import circuit_figure

        return circuit_figure(self)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page that needs no network; returns its path."""
        from circuitkit.viewer.page import write_page

        return write_page(self, path)

    def save(self, path: str | Path) -> None:
        """Write a JSON file with a versioned schema, atomically."""
        from circuitkit.runs.files import save_circuit

        save_circuit(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote. Raises FormatError for any other file."""
        from circuitkit.runs.files import load_circuit

        return load_circuit(path)

    def _repr_html_(self) -> str:
        from circuitkit.viewer.page import embed

        return embed(self)

    def __repr__(self) -> str:
        nodes = len(set(self.src.tolist()))
        tail = f", faithfulness {self.result.faithfulness:.3f}" if self.result and self.result.defined else ""
        return f"Circuit({len(self)} of {self.graph.n_edges} edges, {nodes} sources{tail})"
