"""Size against faithfulness of the circuits that one method chose with several values of an option."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuitkit.drawing import PALETTE, visible
from circuitkit.result import ParetoPoint

if TYPE_CHECKING:
    import plotly.graph_objects as go


def pareto_figure(points: Sequence[ParetoPoint]) -> go.Figure:
    """Edges of each circuit, on a log scale, against its faithfulness and against the metric that judged it.

    Two panels, one above the other, with one marker per circuit; hovering gives the option's value. Circuits without an
    edge have no place on a log scale and are left out, as are points where faithfulness is undefined.
    """
    from plotly.subplots import make_subplots

    judge = points[0].objective if points else "fidelity"
    titles = ("faithfulness", "KL divergence from the model, nats" if judge == "kl" else visible(judge))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    panels = (
        [(p, p.faithfulness) for p in points if p.faithfulness is not None],
        [(p, -p.fidelity if judge == "kl" else p.fidelity) for p in points],
    )
    for row, (panel, title, colour) in enumerate(zip(panels, titles, ("positive", "negative"), strict=True), start=1):
        drawn = sorted(((p, float(y)) for p, y in panel if p.n_edges), key=lambda pair: pair[0].n_edges)
        if drawn:
            figure.add_trace(_line(drawn, title, PALETTE[colour]), row=row, col=1)
        figure.update_yaxes(title=title, gridcolor=PALETTE["rule"], rangemode="tozero", row=row, col=1)
    figure.add_hline(y=1, line={"color": PALETTE["muted"], "width": 1}, row=1, col=1)
    figure.update_xaxes(type="log", gridcolor=PALETTE["rule"])
    figure.update_xaxes(title="edges in the circuit (log scale)", row=2, col=1)
    if not figure.data:
        figure.add_annotation(
            text="no circuit has an edge: nothing to draw", showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper"
        )
    figure.update_layout(
        template="plotly_white",
        font={"color": PALETTE["text"]},
        title={"text": html.escape(_title(points), quote=False), "x": 0.02, "xanchor": "left"},
        showlegend=False,
        height=560,
        margin={"l": 70, "r": 30, "t": 60, "b": 60},
    )
    return figure


def _line(drawn: list[tuple[ParetoPoint, float]], title: str, colour: str) -> go.Scatter:
    import plotly.graph_objects as go

    return go.Scatter(
        x=[point.n_edges for point, _ in drawn],
        y=[y for _, y in drawn],
        customdata=[f"{visible(point.option)} = {point.value:.4g}" for point, _ in drawn],
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        marker={"size": 8},
        name=title,
        hovertemplate="%{customdata}: %{x:,} edges<br>" + html.escape(title, quote=False) + " %{y:.4g}<extra></extra>",
    )


def _title(points: Sequence[ParetoPoint]) -> str:
    scores = points[0].circuit.scores if points else None
    about = [] if scores is None else [scores.method, str(scores.provenance.get("task", ""))]
    return visible(", ".join(["size and faithfulness", *filter(None, about)]))
