"""A circuit as a layered figure: the input at the bottom, the output on top, an edge as wide as its score is large."""

from __future__ import annotations

import html
import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from circuitkit.circuit import Circuit
from circuitkit.drawing import (
    KIND_NAMES,
    PALETTE,
    Box,
    Curve,
    Drawing,
    draw,
    effect_names,
    headline,
    inner_name,
    visible,
)
from circuitkit.functional.routes import Point, along

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_EDGES = 2000
_WIDTHS = 6
_STEPS = 16  # straight pieces of a curve
_ARROW_AT = 10
_MOST_ARROWS = 200
_ROOM = 560  # pixels that boxes may take across, in a narrow figure
_LARGEST, _SMALLEST = 42, 7  # side of a box in pixels
_LETTERS = (11, 7)  # largest and smallest size of a label's letters


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
    if not all(_label(box, _side(drawing))[0] for box in drawing.boxes):
        second += " · names: point at a box"
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
    slanted = _tight(drawing)
    for text, across in drawing.spans:
        above = f"<b>{html.escape(visible(text), quote=False)}</b>"
        way = {"textangle": -60, "yanchor": "bottom"} if slanted else {}
        figure.add_annotation(x=across, y=drawing.height + 0.9, text=above, showarrow=False, **way)
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
        height=max(460, int(210 + 40 * slanted + (56 if _crowded(drawing) else 80) * drawing.height)),
        margin={"l": 30, "r": 30, "t": 120 if slanted else 80, "b": 30},
        hovermode="closest",
        # Below the plot, where it may break into lines: above, it would run into the title.
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "top", "itemsizing": "constant"},
        plot_bgcolor="white",
    )
    return figure


def _add_edges(figure: go.Figure, drawing: Drawing, effects: tuple[str, str]) -> None:
    """One trace per sign and width: a trace has one width, and thousands of traces would be slow."""
    import plotly.graph_objects as go

    if drawing.inner:
        points = [point for s, t in drawing.inner for point in (*_straight(drawing.boxes[s], drawing.boxes[t]), None)]
        inner = _line(points, PALETTE["neutral"], 1, 0.8, inner_name(drawing), dash="dot")
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

    side = _side(drawing)
    for kind in dict.fromkeys(box.kind for box in drawing.boxes):
        members = [(i, box) for i, box in enumerate(drawing.boxes) if box.kind == kind]
        figure.add_trace(
            go.Scatter(
                x=[box.x for _, box in members],
                y=[box.y for _, box in members],
                mode="markers+text",
                marker={
                    "symbol": "square",
                    "size": side,
                    "color": PALETTE.get(kind, PALETTE["error"]),
                    "line": {"color": PALETTE["muted"], "width": 1},
                    "opacity": 1,
                },
                text=[_label(box, side)[0] for _, box in members],
                textfont={"size": [_label(box, side)[1] for _, box in members], "color": PALETTE["text"]},
                hovertext=[_box_text(drawing, i) for i, _ in members],
                hovertemplate="%{hovertext}<extra></extra>",
                showlegend=False,
            )
        )
        sample = {"symbol": "square", "size": 12, "color": PALETTE.get(kind, PALETTE["error"])}
        sample["line"] = {"color": PALETTE["muted"], "width": 1}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=sample, name=KIND_NAMES.get(kind, kind)))


def _tight(drawing: Drawing) -> bool:
    """Whether the headings of columns would run into each other."""
    places, widest = sorted(across for _, across in drawing.spans), max((len(t) for t, _ in drawing.spans), default=0)
    gaps = [b - a for a, b in pairwise(places)]
    return 7.5 * widest > min(gaps, default=math.inf) * _ROOM / max(drawing.width, 1)


def _side(drawing: Drawing) -> int:
    """Side of a box in pixels, so that boxes side by side do not touch."""
    largest = 30 if _crowded(drawing) else _LARGEST
    return max(_SMALLEST, min(largest, int(0.85 * _ROOM / max(drawing.width, 1))))


def _label(box: Box, side: int) -> tuple[str, int]:
    """A box's label and the size of its letters, so that it stays in the box; no label where none can be read."""
    largest, smallest = _LETTERS
    for lines in _ways(box.label):
        # A letter is about 0.6 times as wide as its size.
        size = min(largest, int((side + 4) / (0.6 * max(map(len, lines)))), int(side / (1.2 * len(lines))))
        if size >= smallest:
            return "<br>".join(html.escape(visible(line), quote=False) for line in lines), size
    return "", smallest


def _ways(label: str) -> list[list[str]]:
    """A label in one line if it is short, in two (a unit and its gate, a state and its subspace), broken at its dot."""
    at = max(label.find("<"), label.find(":"))
    parts = [label[:at], label[at:]] if at > 0 else [label]
    head, dot, rest = parts[0].partition(".")
    return [*([[label]] if len(label) <= 6 else []), parts, [head + dot, rest, *parts[1:]] if dot else parts]


def _crowded(drawing: Drawing) -> bool:
    return drawing.width > 9 or drawing.height > 16


def _line(
    points: list[Point | None],
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


def _straight(source: Box, target: Box) -> list[Point]:
    return [(source.x, source.y), (target.x, target.y)]


def _bezier(drawing: Drawing, curve: Curve) -> list[Point]:
    return [_at(drawing, curve, float(t)) for t in np.linspace(0, 1, _STEPS + 1)]


def _at(drawing: Drawing, curve: Curve, t: float) -> Point:
    source, target = drawing.boxes[curve.source], drawing.boxes[curve.target]
    return along((source.x, source.y), curve.bend, (target.x, target.y), t)


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
