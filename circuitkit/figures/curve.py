"""Faithfulness against the size of the circuit."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from circuitkit.drawing import PALETTE, visible
from circuitkit.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def faithfulness_curve(result: Result) -> go.Figure:
    """Faithfulness of the strongest edges by share of all edges, for signed and absolute rankings.

    The measured circuit is a diamond with its bootstrap interval, random connected circuits of its size a grey cross
    with their range; points where faithfulness is undefined are left out.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for absolute, name, dash in (
        (False, "ranked by signed score", "solid"),
        (True, "ranked by magnitude", "dash"),
    ):
        points = [
            p for p in result.curve_points if p.absolute is absolute and p.faithfulness is not None and p.fraction > 0
        ]
        if points:
            points.sort(key=lambda point: point.fraction)
            colour = PALETTE["negative" if absolute else "positive"]
            figure.add_trace(
                go.Scatter(
                    x=[100 * point.fraction for point in points],
                    y=[point.faithfulness for point in points],
                    customdata=[point.n_edges for point in points],
                    mode="lines+markers",
                    line={"color": colour, "width": 2.5, "dash": dash},
                    marker={"size": 8, "symbol": "square" if absolute else "circle"},
                    name=name,
                    hovertemplate="%{x:.3g} %: %{customdata:,} connected edges<br>faithfulness %{y:.3f}<extra></extra>",
                )
            )
    size = 100 * result.n_edges / max(result.n_possible, 1)
    if result.faithfulness is not None and size > 0:
        name = f"this circuit ({result.n_edges:,} edges)"
        figure.add_trace(
            _point(size, result.faithfulness, result.faithfulness_interval, name, PALETTE["text"], "diamond")
        )
    if result.random_faithfulness is not None and size > 0:
        name = "random circuits of that size"
        figure.add_trace(_point(size, result.random_faithfulness, result.random_interval, name, PALETTE["random"], "x"))
        figure.add_hline(y=result.random_faithfulness, line={"color": PALETTE["random"], "width": 1, "dash": "dot"})
    figure.add_hline(
        y=1,
        line={"color": PALETTE["muted"], "width": 1},
        annotation={"text": "whole model", "font": {"color": PALETTE["muted"], "size": 11}},
        annotation_position="top left",
    )
    if not figure.data:
        figure.add_annotation(
            text="faithfulness is undefined here: no point to draw",
            showarrow=False,
            x=0.5,
            y=0.5,
            xref="paper",
            yref="paper",
        )
    _dress(figure, result)
    return figure


def _point(x: float, y: float, interval: tuple[float, float] | None, name: str, colour: str, symbol: str) -> go.Scatter:
    import plotly.graph_objects as go

    bars = None
    if interval is not None:
        low, high = max(0.0, y - interval[0]), max(0.0, interval[1] - y)
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [high],
            "arrayminus": [low],
            "thickness": 1.5,
            "width": 5,
        }
    return go.Scatter(
        x=[x],
        y=[y],
        error_y=bars,
        mode="markers",
        marker={"size": 12, "symbol": symbol, "color": colour},
        name=name,
        hovertemplate=f"{name}<br>faithfulness %{{y:.3f}}<extra></extra>",
    )


def _dress(figure: go.Figure, result: Result) -> None:
    areas = [
        f"{name} {value:.3f}"
        for name, value in (("CPR", result.cpr), ("CMD", result.cmd), ("log area", result.log_area))
        if value is not None
    ]
    second = " · ".join(
        [
            visible(result.metric),
            f"{result.n_examples:,} examples",
            f"{visible(result.corrupt_value)} values",
            *areas,
        ]
    )
    first = f"how faithful are the strongest edges? {visible(result.task)}"
    figure.update_layout(
        template="plotly_white",
        font={"color": PALETTE["text"]},
        title={
            "text": f"{html.escape(first, quote=False)}<br><sup>{html.escape(second, quote=False)}</sup>",
            "x": 0.02,
            "xanchor": "left",
        },
        xaxis={
            "title": "edges kept (% of all possible, log scale)",
            "type": "log",
            "tickvals": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100],
            "gridcolor": PALETTE["rule"],
        },
        yaxis={
            "title": "faithfulness",
            "gridcolor": PALETTE["rule"],
            "zerolinecolor": PALETTE["muted"],
            "rangemode": "tozero",
        },
        height=460,
        margin={"l": 70, "r": 30, "t": 80, "b": 110},
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
    )
