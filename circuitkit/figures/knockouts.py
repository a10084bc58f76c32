"""A circuit under knock-outs: against the model for completeness, part by part for minimality."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed, plain
from circuitkit.measures import Completeness, Minimality

if TYPE_CHECKING:
    import plotly.graph_objects as go

SYMBOLS = {"nothing": "diamond", "random": "circle", "layer": "square", "greedy": "x"}
COLOURS = {"nothing": "text", "random": "neutral", "layer": "positive", "greedy": "negative"}
MOST_BARS = 60
MOST_NAMES = 12


def completeness_scatter(found: Completeness) -> go.Figure:
    """Metric of the circuit against that of the model, both without the same components; on the diagonal they agree."""
    import plotly.graph_objects as go

    figure = go.Figure()
    values = [found.clean, found.corrupt, *(v for k in found.knockouts for v in (k.circuit, k.model))]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 1.0
    ends = [low - room, high + room]
    line = {"color": PALETTE["muted"], "width": 1, "dash": "dot"}
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="circuit = model", hoverinfo="skip"))
    for how in dict.fromkeys(knockout.how for knockout in found.knockouts):
        points = [knockout for knockout in found.knockouts if knockout.how == how]
        figure.add_trace(
            go.Scatter(
                x=[point.model for point in points],
                y=[point.circuit for point in points],
                customdata=[_named(point.removed) for point in points],
                mode="markers",
                marker={"size": 9, "symbol": SYMBOLS.get(how, "circle"), "color": PALETTE[COLOURS.get(how, "neutral")]},
                name=plain("no knock-out" if how == "nothing" else how),
                hovertemplate="without %{customdata}<br>model %{x:.3g}, circuit %{y:.3g}<extra></extra>",
            )
        )
    small = f"{found.n_edges:,} edges · {found.n_examples:,} examples · worst {found.worst.incompleteness:.3g} apart"
    first = f"does the circuit break as the model does? {found.task}"
    return dressed(
        figure, first, small, x=f"{plain(found.metric)} of the model without K",
        y=f"{plain(found.metric)} of the circuit without K", height=520,
    )  # fmt: skip


def minimality_bars(found: Minimality) -> go.Figure:
    """The largest change each part makes, largest first, and a mark where it is removed alone."""
    import plotly.graph_objects as go

    parts = found.contributions[:MOST_BARS]
    names = [plain(part.name) for part in parts]
    figure = go.Figure(
        go.Bar(
            x=names,
            y=[part.score for part in parts],
            customdata=[_named(part.without) for part in parts],
            marker={"color": PALETTE["positive"]},
            name="largest change found",
            hovertemplate="%{x}: %{y:.3g}<br>without %{customdata}<extra></extra>",
        )
    )
    alone = {"symbol": "line-ew-open", "size": 12, "color": PALETTE["negative"], "line": {"width": 2}}
    figure.add_trace(
        go.Scatter(
            x=names, y=[part.alone for part in parts], mode="markers", marker=alone, name="removed alone",
            hovertemplate="%{x} alone: %{y:.3g}<extra></extra>",
        )
    )  # fmt: skip
    small = f"{found.n_edges:,} edges · {found.n_examples:,} examples"
    small += f" · clean {found.clean:.3g}, corrupt {found.corrupt:.3g}"
    if len(found.contributions) > MOST_BARS:
        small += f" · the first {MOST_BARS} of {len(found.contributions):,}"
    figure = dressed(
        figure, f"is every part needed? {found.task}", small, x="", y=f"change of {plain(found.metric)}", height=460
    )
    return figure.update_layout(xaxis={"tickangle": -60, "type": "category"}, margin={"b": 150})


def _named(names: tuple[str, ...]) -> str:
    if not names:
        return "nothing else"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return plain(", ".join(names[:MOST_NAMES])) + more
