"""Methods side by side on models whose circuit is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from circuitkit.drawing import PALETTE
from circuitkit.errors import GraphError
from circuitkit.figures.heatmap import DIVERGING

if TYPE_CHECKING:
    import plotly.graph_objects as go


def methods_figure(
    methods: Sequence[str],
    models: Sequence[str],
    auroc: Sequence[Sequence[float | None]],
    seconds: Sequence[float | None],
) -> go.Figure:
    """AUROC of every method (down) on every model (across), and beside it the seconds of all models together.

    White is chance; an empty field is a refusal.

    Raises:
        GraphError: if the numbers do not fit the names.

    >>> methods_figure(["exact", "eap"], ["a model"], [[1.0], [None]], [0.2, 0.1]).data[0].z.shape
    (2, 1)
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    values = np.array([[math.nan if v is None else v for v in row] for row in auroc], dtype=float)
    if values.shape != (len(methods), len(models)) or len(seconds) != len(methods):
        raise GraphError(
            f"got values of shape {values.shape} and {len(seconds)} times for {len(methods)} methods and "
            f"{len(models)} models; give one per method and model"
        )
    figure = make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        column_widths=[0.74, 0.26],
        horizontal_spacing=0.02,
        subplot_titles=("AUROC against the known circuit", "seconds, all models"),
    )
    text = [["" if math.isnan(v) else f"{v:.2f}" for v in row] for row in values]
    grid = go.Heatmap(
        z=values, x=list(models), y=list(methods), text=text, texttemplate="%{text}", textfont={"size": 11},
        colorscale=DIVERGING, zmin=0, zmid=0.5, zmax=1, showscale=False, xgap=1, ygap=1, hoverongaps=False,
        hovertemplate="%{y} on %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    bars = go.Bar(
        x=list(seconds), y=list(methods), orientation="h", marker={"color": PALETTE["neutral"]}, showlegend=False,
        text=["" if s is None else f"{s:,.0f}" if s >= 10 else f"{s:.2g}" for s in seconds],
        hovertemplate="%{y}: %{x:.3g} s<extra></extra>",
    )  # fmt: skip
    figure.add_trace(grid, row=1, col=1)
    figure.add_trace(bars, row=1, col=2)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(tickangle=-40, showgrid=False, row=1, col=1)
    figure.update_xaxes(type="log", dtick=1, gridcolor=PALETTE["rule"], row=1, col=2)
    figure.update_layout(
        template="plotly_white",
        font={"color": PALETTE["text"]},
        plot_bgcolor="white",
        title={"text": "methods where the circuit is known<br><sup>empty: refused</sup>", "x": 0.02, "xanchor": "left"},
        height=260 + 26 * len(methods),
        width=1100,
        margin={"l": 190, "r": 30, "t": 100, "b": 150},
    )
    return figure
