"""How well a ranking finds a known circuit: true against false positive rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from circuitkit.drawing import PALETTE
from circuitkit.errors import GraphError
from circuitkit.figures.base import dressed, plain
from circuitkit.functional.stats import roc_curve, trapezoid
from circuitkit.scores import Scores

if TYPE_CHECKING:
    import plotly.graph_objects as go


def roc_figure(rankings: Mapping[str, Scores], known: Iterable[str]) -> go.Figure:
    """The curve of each ranking by magnitude, from (0, 0) to (1, 1), with its area in the legend.

    Edges of equal score are taken together, so a tie is a straight line and the area is `auroc` exactly.

    Args:
        rankings: by the names of their curves, such as the methods.
        known: names of the edges of the known circuit.

    Raises:
        GraphError: if the graph lacks a known edge, or every edge or none is known.

    >>> import torch
    >>> from circuitkit.graph import chain_graph
    >>> scores = Scores(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), chain_graph(1), "a")
    >>> roc_figure({"a": scores}, ["input->m0", "m0->logits"]).data[0].name
    'a (1.000)'
    """
    import plotly.graph_objects as go

    figure, names = go.Figure(), tuple(known)
    told = "score at least %{customdata:.3g}<br>%{y:.1%} of the circuit, %{x:.1%} of the rest<extra></extra>"
    for name, scores in rankings.items():
        graph = scores.graph
        curve = roc_curve(scores.values[graph.mask].abs(), graph.edge_mask(names)[graph.mask])
        if curve is None:
            raise GraphError(f"got {len(names)} known edges of {graph.n_edges}; a curve needs known and other edges")
        false, true, thresholds = curve
        figure.add_trace(
            go.Scatter(
                x=false, y=true, customdata=thresholds, mode="lines", line={"width": 2.5},
                name=f"{plain(name)} ({trapezoid(true, false):.3f})",
                hovertemplate=told,
            )
        )  # fmt: skip
    line = {"color": PALETTE["muted"], "width": 1, "dash": "dot"}
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, name="chance", hoverinfo="skip"))
    small = f"{len(names):,} known edges; area under the curve in brackets"
    first = "is the known circuit ranked first?"
    return dressed(figure, first, small, x="share of other edges taken", y="share of the circuit taken")
