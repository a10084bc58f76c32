"""A circuit as a layered figure: the input at the bottom, the output on top, an edge as wide as its score is large."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

from circuitkit.circuit import Circuit
from circuitkit.drawing import KIND_NAMES, PALETTE, Box, Curve, Drawing, draw, effect_names, headline, visible

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_EDGES = 2000
_WIDTHS = 6
_STEPS = 16  # straight pieces of a curve
_ARROW_AT = 10
_MOST_ARROWS = 200


def circuit_figure(circuit: Circuit, *, most: int = MOST_EDGES) -> go.Figure:
    """The circuit as a plotly figure; of more than ``most`` edges the strongest are drawn, and the title says so.

    >>> from circuitkit.graph import chain_graph
    >>> figure = circuit_figure(Circuit.from_edges(chain_graph(1), ["input->m0", "m0->logits"]))
    >>> "2 of 3 edges" in figure.layout.title.text
    True
    """
    import plotly.graph_objects as go

    drawing = draw(circuit, most=most)
    first, second = headline(circuit)
    if len(circuit) > most:
        second += f" · the {most:,} strongest are drawn"
    figure = go.Figure()
    _add_edges(figure, drawing, effect_names(circuit))
    _add_boxes(figure, drawing)
    # A circuit of few nodes keeps its natural distances instead of being stretched over the whole width.
    left = min([-3.0, *(box.x - 0.8 for box in drawing.boxes)])
    right = max([3.0, *(box.x + 0.8 for box in drawing.boxes)])
    for text, height in drawing.layers:
        figure.add_annotation(
            x=0,
            xref="paper",
            y=height,
            text=text,
            showarrow=False,
            xanchor="left",
            font={"color": PALETTE["muted"]},
        )
    for text, across in drawing.spans:
        above = f"<b>{html.escape(visible(text), quote=False)}</b>"
        figure.add_annotation(x=across, y=drawing.height + 0.9, text=above, showarrow=False)
    if not drawing.boxes:
        figure.add_annotation(text="this circuit has no edges", showarrow=False, font={"size": 16}, x=0, y=0)
    figure.update_layout(
        template="plotly_white",
        title={
            "text": f"{html.escape(first, quote=False)}<br><sup>{html.escape(second, quote=False)}</sup>",
            "x": 0.02,
            "xanchor": "left",
        },
        font={"color": PALETTE["text"]},
        xaxis={"visible": False, "range": [left - 0.1 * (right - left), right]},
        yaxis={"visible": False},
        height=max(420, int(170 + (56 if _crowded(drawing) else 80) * drawing.height)),
        margin={"l": 30, "r": 30, "t": 80, "b": 30},
        hovermode="closest",
        legend={
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1.0,
            "yanchor": "bottom",
            "itemsizing": "constant",
        },
        plot_bgcolor="white",
    )
    return figure


def _add_edges(figure: go.Figure, drawing: Drawing, effects: tuple[str, str]) -> None:
    """One trace per sign and width: a trace has one width, and thousands of traces would be slow."""
    import plotly.graph_objects as go

    if drawing.inner:
        points = [point for s, t in drawing.inner for point in (*_straight(drawing.boxes[s], drawing.boxes[t]), None)]
        inner = _line(points, PALETTE["neutral"], 1, 0.8, "key/value head of", dash="dot")
        figure.add_trace(inner.update(showlegend=True))
    largest = max((abs(curve.score) for curve in drawing.curves if math.isfinite(curve.score)), default=0.0) or 1.0
    bins: dict[tuple[bool, int], list[Curve]] = {}
    for curve in drawing.curves:
        share = abs(curve.score) / largest if math.isfinite(curve.score) else 0.0
        bins.setdefault((curve.score < 0, min(_WIDTHS - 1, int(share**0.5 * _WIDTHS))), []).append(curve)
    crowd = min(1.0, (150 / max(len(drawing.curves), 1)) ** 0.5)
    arrows = len(drawing.curves) <= _MOST_ARROWS
    for (negative, level), curves in sorted(bins.items(), key=lambda item: item[0][1]):
        share = (level + 0.5) / _WIDTHS
        points = [point for curve in curves for point in (*_bezier(drawing, curve), None)]
        opacity = min(0.95, (0.3 + 0.65 * share) * (crowd + (1 - crowd) * share))
        colour = PALETTE["negative" if negative else "positive"]
        figure.add_trace(_line(points, colour, 0.8 + 6.5 * share**1.6, opacity, effects[negative], arrows=arrows))
    for negative in sorted({negative for negative, _ in bins}):
        key = _line([None], PALETTE["negative" if negative else "positive"], 4, 1, effects[negative])
        figure.add_trace(key.update(showlegend=True))
    middles = [_at(drawing, curve, 0.5) for curve in drawing.curves]
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in middles],
            y=[y for _, y in middles],
            mode="markers",
            marker={"size": 12, "opacity": 0},
            text=[_edge_text(curve) for curve in drawing.curves],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
    )


def _add_boxes(figure: go.Figure, drawing: Drawing) -> None:
    import plotly.graph_objects as go

    crowded = _crowded(drawing)
    for kind in dict.fromkeys(box.kind for box in drawing.boxes):
        members = [(i, box) for i, box in enumerate(drawing.boxes) if box.kind == kind]
        figure.add_trace(
            go.Scatter(
                x=[box.x for _, box in members],
                y=[box.y for _, box in members],
                mode="markers+text",
                marker={
                    "symbol": "square",
                    "size": 30 if crowded else 42,
                    "color": PALETTE.get(kind, PALETTE["error"]),
                    "line": {"color": PALETTE["muted"], "width": 1},
                    "opacity": 1,
                },
                text=[html.escape(visible(box.label), quote=False) for _, box in members],
                textfont={"size": 9 if crowded else 11, "color": PALETTE["text"]},
                hovertext=[_box_text(drawing, i) for i, _ in members],
                hovertemplate="%{hovertext}<extra></extra>",
                showlegend=False,
            )
        )


def _crowded(drawing: Drawing) -> bool:
    return drawing.width > 9 or drawing.height > 16


def _line(
    points: list[tuple[float, float] | None],
    colour: str,
    width: float,
    opacity: float,
    name: str,
    *,
    dash: str = "solid",
    arrows: bool = False,
) -> go.Scatter:
    import plotly.graph_objects as go

    sizes = [4 + 2.2 * width if arrows and i % (_STEPS + 2) == _ARROW_AT else 0 for i in range(len(points))]
    marker = {"symbol": "arrow", "angleref": "previous", "size": sizes, "opacity": 1, "line": {"width": 0}}
    return go.Scatter(
        x=[None if point is None else point[0] for point in points],
        y=[None if point is None else point[1] for point in points],
        mode="lines+markers" if arrows else "lines",
        marker=marker if arrows else None,
        line={"color": colour, "width": width, "dash": dash, "backoff": 0},
        opacity=opacity,
        hoverinfo="skip",
        name=name,
        legendgroup=name,
        showlegend=False,
    )


def _straight(source: Box, target: Box) -> list[tuple[float, float]]:
    return [(source.x, source.y), (target.x, target.y)]


def _bezier(drawing: Drawing, curve: Curve) -> list[tuple[float, float]]:
    return [_at(drawing, curve, float(t)) for t in np.linspace(0, 1, _STEPS + 1)]


def _at(drawing: Drawing, curve: Curve, t: float) -> tuple[float, float]:
    source, target = drawing.boxes[curve.source], drawing.boxes[curve.target]
    if curve.source == curve.target:
        angle = 2 * math.pi * t - math.pi / 2
        return source.x + 0.16 * math.cos(angle), source.y + 0.42 + 0.22 * math.sin(angle)
    a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
    bend_x, bend_y = curve.bend
    return a * source.x + b * bend_x + c * target.x, a * source.y + b * bend_y + c * target.y


def _edge_text(curve: Curve) -> str:
    error = f" ± {curve.stderr:.2g}" if math.isfinite(curve.stderr) else ""
    source, _, _ = curve.name.partition("->")
    arrow = f"{html.escape(visible(source), quote=False)} → {html.escape(visible(curve.reader), quote=False)}"
    return f"<b>{arrow}</b><br>score {curve.score:+.4g}{error}"


def _box_text(drawing: Drawing, number: int) -> str:
    box = drawing.boxes[number]
    into = [curve.score for curve in drawing.curves if curve.target == number]
    out = [curve.score for curve in drawing.curves if curve.source == number]
    lines = [f"<b>{html.escape(visible(box.name), quote=False)}</b>", KIND_NAMES.get(box.kind, box.kind)]
    for way, scores in (("in", into), ("out", out)):
        if scores:
            lines.append(f"{len(scores)} {way}, scores sum to {sum(scores):+.4g}")
    return "<br>".join(lines)
