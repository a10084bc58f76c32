"""What travels between the stages: `Scores` (every edge) and `Circuit` (the chosen edges).

The sign of a score, everywhere: ``M(clean) - M(clean, with this edge carrying its corrupt value)``; positive edges
support the behaviour. Mean over examples, sum over positions and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitkit.errors import GraphError, OptionError
from circuitkit.functional import select
from circuitkit.graph import Graph
from circuitkit.result import CurvePoint, NodeScores, Result
from circuitkit.shapes import EdgeMask, EdgeMatrix

__all__ = ["Circuit", "CurvePoint", "NodeScores", "Result", "Scores"]

if TYPE_CHECKING:
    from pathlib import Path

    import networkx
    import pandas
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per possible edge.

    Args:
        values: the scores, 0 where no edge is possible.
        graph: names of the rows and columns.
        method: the registered name.
        options: the method's options as used.
        stderr: standard error of each mean over examples, or None if the method gives none.
        signed: False if only magnitudes mean something.
        n_examples: how many examples the mean is over.
        provenance: task, model, corrupt value, versions, seconds.
    """

    values: EdgeMatrix
    graph: Graph
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stderr: EdgeMatrix | None = None
    signed: bool = True
    n_examples: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.shape != self.graph.mask.shape:
            raise GraphError(f"scores have shape {tuple(self.values.shape)}, the graph {tuple(self.graph.mask.shape)}")

    def top(self, n: int, *, absolute: bool = True) -> Circuit:
        """The circuit of the ``n`` highest edges, every one on a path from the input to the logits.

        Edges are taken in order of score until ``n`` of them are connected, so the circuit has as close to
        ``n`` edges as the ranking allows.

        Raises:
            OptionError: if n is not between 1 and the number of possible edges.
        """
        self._check_size(n)
        order = select.ranked_edges(self.values, self.graph.mask, absolute=absolute)
        return self._cut(select.largest_connected(order, n, self.graph.mask, self.graph.feeds))

    def threshold(self, t: float, *, absolute: bool = True) -> Circuit:
        """The circuit of the edges whose score (or magnitude) is at least ``t``, dangling ones pruned.

        Raises:
            OptionError: if t is not a number.
        """
        if not isinstance(t, int | float) or math.isnan(t):
            raise OptionError(f"got t = {t!r}, expected a number")
        strength = self.values.abs() if absolute else self.values
        return self._cut(select.prune_dangling((strength >= t) & self.graph.mask, self.graph.feeds))

    def grow(self, n: int, *, absolute: bool = True) -> Circuit:
        """The circuit of ``n`` edges added best first from the logits: only edges into what is reached compete.

        Raises:
            OptionError: if n is not between 1 and the number of possible edges.
        """
        self._check_size(n)
        order = select.grown_order(self.values, self.graph.mask, self.graph.feeds, absolute=absolute)
        return self._cut(select.largest_connected(order, n, self.graph.mask, self.graph.feeds))

    def to_pandas(self) -> pandas.DataFrame:
        """One row per possible edge: source, destination, score, stderr; strongest first."""
        return self._cut(self.graph.mask).to_pandas()

    def heatmap(self) -> go.Figure:
        """All scores as a picture: sources down, destinations across."""
        from circuitkit.figures.heatmap import score_heatmap

        return score_heatmap(self)

    def save(self, path: str | Path) -> None:
        """Write values, errors and graph to one safetensors file, atomically."""
        from circuitkit.runs.files import save_scores

        save_scores(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote. Raises FormatError for any other file."""
        from circuitkit.runs.files import load_scores

        return load_scores(path)

    def _cut(self, chosen: EdgeMask) -> Circuit:
        src, dst = chosen.nonzero(as_tuple=True)
        order = torch.sort(self.values[src, dst].abs(), descending=True, stable=True).indices
        src, dst = src[order], dst[order]
        stderr = None if self.stderr is None else self.stderr[src, dst]
        return Circuit(self.graph, src, dst, self.values[src, dst], stderr, scores=self)

    def _check_size(self, n: int) -> None:
        if type(n) is not int or not 1 <= n <= self.graph.n_edges:
            raise OptionError(
                f"got n = {n!r}, expected a whole number between 1 and the {self.graph.n_edges} possible edges"
            )

    def __repr__(self) -> str:
        return f"Scores({self.method}, {self.graph.n_edges} edges, {self.n_examples} examples)"


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

    def to_networkx(self) -> networkx.DiGraph:
        """A directed graph: nodes with kind, layer, head and slot; edges with score, stderr and weight = |score|.

        A head's inputs are nodes of their own (``a3.h5<q>``), tied to the head by edges of kind ``internal``.
        """
        import networkx as nx

        out = nx.DiGraph()
        out.graph.update({k: v for k, v in self.meta.items() if isinstance(v, str | int | float)})
        for s, d in zip(self.src.tolist(), self.dst.tolist(), strict=True):
            for node in (self.graph.source_nodes[s], self.graph.destination_nodes[d]):
                attributes = {"label": node.name, "kind": node.kind, "layer": node.layer, "stage": node.stage}
                attributes |= {"head": -1 if node.index is None else node.index, "slot": node.slot or ""}
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
            if inner != outer and inner in out and outer in out:
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
