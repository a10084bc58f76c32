"""Faithfulness and completeness over the number of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitkit.evaluation.node_curves import NodeCurves


def node_curves_figure(curves: NodeCurves) -> go.Figure:
    """Both curves, over the number of writers; 0, which has no place on a logarithmic axis, is left out.

    So are sizes where they are undefined.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    lines = (
        ("faithfulness: these nodes alone", curves.faithfulness, "positive", "circle"),
        ("completeness: all but these", curves.completeness, "negative", "square"),
    )
    for name, values, colour, symbol in lines:
        points = [(n, value) for n, value in zip(curves.sizes, values, strict=True) if n and value is not None]
        figure.add_trace(
            go.Scatter(
                x=[size for size, _ in points],
                y=[value for _, value in points],
                mode="lines+markers",
                line={"color": PALETTE[colour], "width": 2.5},
                marker={"size": 8, "symbol": symbol},
                name=name,
                hovertemplate="%{x:,} nodes: %{y:.3f}<extra></extra>",
            )
        )
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": PALETTE["muted"], "width": 1, "dash": "dot"})
    second = f"{curves.n_nodes:,} nodes besides the input; ablated ones carry: {curves.corrupt_value}"
    title = "The strongest nodes alone, and all others without them"
    figure = dressed(figure, title, second, x="nodes (logarithmic)", y="share of the behaviour")
    return figure.update_xaxes(type="log", dtick=1)
