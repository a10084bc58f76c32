"""`Scores`: one number per possible edge, and the ways to cut a circuit from them.

The sign of a score, everywhere: ``M(clean) - M(clean, with this edge carrying its corrupt value)``; positive edges
support the behaviour. Mean over examples, sum over positions and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError, OptionError
from circuitkit.functional import select
from circuitkit.graph import Graph
from circuitkit.shapes import EdgeMask, EdgeMatrix

if TYPE_CHECKING:
    from pathlib import Path

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
        comparable: False if only scores into the same reader can be compared, as with information flow routes.
        selected: the edges that the method itself chose (ACDC, learned masks), or None if it only ranks.
        n_examples: how many examples the mean is over.
        provenance: task, model, corrupt value, versions, seconds.
    """

    values: EdgeMatrix
    graph: Graph
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stderr: EdgeMatrix | None = None
    signed: bool = True
    comparable: bool = True
    selected: EdgeMask | None = None
    n_examples: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.shape != self.graph.mask.shape:
            raise GraphError(f"scores have shape {tuple(self.values.shape)}, the graph {tuple(self.graph.mask.shape)}")

    def top(self, n: int, *, absolute: bool = True) -> Circuit:
        """The circuit of the ``n`` highest edges, every one on a path from the input to the logits.

        Edges are taken in order of score until ``n`` of them are connected, so the circuit has as close to
        ``n`` edges as the ranking allows. Where that would leave none of a recurrent network (a weak edge is the only
        way in, and with it more than ``n`` are connected at once), see `circuitkit.functional.select.with_ways`.

        Raises:
            OptionError: if n is not between 1 and the number of possible edges, or scores are not comparable.
        """
        self._check_size(n)
        self._check_comparable("top")
        order = select.ranked_edges(self.values, self.graph.mask, absolute=absolute)
        return self._cut(self._strongest(order, n))

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
        return self._cut(self._strongest(order, n))

    def own(self) -> Circuit:
        """The circuit that the method itself chose, dangling edges pruned.

        Raises:
            OptionError: if the method only ranks edges.
        """
        if self.selected is None:
            raise OptionError(f"{self.method} ranks edges and chooses none; use .top(n), .grow(n) or .threshold(t)")
        return self._cut(select.prune_dangling(self.selected & self.graph.mask, self.graph.feeds))

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

    def _strongest(self, order: Tensor, n: int) -> EdgeMask:
        chosen = select.largest_connected(order, n, self.graph.mask, self.graph.feeds)
        if bool(chosen.any()) or not self.graph.is_recurrent:
            return chosen
        return select.with_ways(order, n, self.graph.mask, self.graph.feeds)

    def _cut(self, chosen: EdgeMask) -> Circuit:
        src, dst = chosen.nonzero(as_tuple=True)
        order = torch.sort(self.values[src, dst].abs(), descending=True, stable=True).indices
        src, dst = src[order], dst[order]
        stderr = None if self.stderr is None else self.stderr[src, dst]
        return Circuit(self.graph, src, dst, self.values[src, dst], stderr, scores=self)

    def _check_comparable(self, verb: str) -> None:
        if not self.comparable:
            raise OptionError(
                f"scores of {self.method} compare writers of one reader only, so .{verb} over all edges would mix "
                "scales; use .grow(n)"
            )

    def _check_size(self, n: int) -> None:
        if type(n) is not int or not 1 <= n <= self.graph.n_edges:
            raise OptionError(
                f"got n = {n!r}, expected a whole number between 1 and the {self.graph.n_edges} possible edges"
            )

    def __repr__(self) -> str:
        return f"Scores({self.method}, {self.graph.n_edges} edges, {self.n_examples} examples)"
