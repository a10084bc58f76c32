"""Circuits side by side: found again, found for other tasks, found where there is nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from circuitkit.comparisons import Controls, Overlap, Stability
from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_BARS = 80
SHADES = ((0.0, "#ffffff"), (1.0, "#084b83"))
VARIED = {"examples": "resampled examples", "task-seed": "fresh examples", "method-seed": "other seeds of the method"}


def stability_bars(found: Stability) -> go.Figure:
    """How often each edge is chosen, most often first; edges of the original circuit in blue."""
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = list(zip(found.edges, found.frequency, found.in_reference, strict=True))[:MOST_BARS]
    for inside, name in ((True, "in the circuit of the task as given"), (False, "not in it")):
        chosen = [(edge, share) for edge, share, there in rows if there is inside]
        figure.add_trace(
            go.Bar(
                x=[plain(edge) for edge, _ in chosen], y=[share for _, share in chosen], name=name,
                marker={"color": PALETTE["positive" if inside else "negative"]},
                hovertemplate="%{x}: %{y:.0%}<extra></extra>",
            )
        )  # fmt: skip
    low, _, high = found.jaccard_quantiles
    small = f"mean Jaccard {found.jaccard:.2f} (pairs {low:.2f} to {high:.2f}), of random edges {found.chance:.2f}"
    small += f" · {found.times} circuits of {found.n_edges:,} edges, {VARIED.get(found.vary, found.vary)}"
    if len(found.edges) > MOST_BARS:
        small += f" · the first {MOST_BARS} of {len(found.edges):,} edges"
    figure = dressed(
        figure, f"is it the same circuit again? {found.method} on {found.task}", small, x="", y="share of circuits"
    )
    order = {"categoryorder": "array", "categoryarray": [plain(edge) for edge, _, _ in rows]}
    axis = {"tickangle": -60, "type": "category"} | order
    return figure.update_layout(xaxis=axis, yaxis={"range": [0, 1.02], "tickformat": ".0%"}, margin={"b": 170})


def overlap_heatmap(found: Overlap) -> go.Figure:
    """Jaccard indices of all pairs; the small print of a field tells the rest."""
    import plotly.graph_objects as go

    places = range(len(found.names))
    names = [f"{plain(name)} ({size:,})" for name, size in zip(found.names, found.sizes, strict=True)]
    values = [[found.jaccard(a, b) for b in places] for a in places]
    told = [
        [
            f"{found.shared[a][b]:,} shared, by chance {found.expected(a, b):.3g} (p = {found.p_value(a, b):.2g})"
            f"<br>{found.reuse(a, b):.0%} of the row is in the column"
            for b in places
        ]
        for a in places
    ]
    figure = go.Figure(
        go.Heatmap(
            z=values, x=names, y=names, customdata=told, text=[[f"{v:.2f}" for v in row] for row in values],
            texttemplate="%{text}" if len(names) <= 15 else None, colorscale=SHADES, zmin=0, zmax=1,
            hovertemplate="%{y} and %{x}: %{z:.3f}<br>%{customdata}<extra></extra>",
            colorbar={"title": {"text": "Jaccard", "side": "top"}, "thickness": 14, "outlinewidth": 0},
        )
    )  # fmt: skip
    figure = dressed(
        figure, f"what do circuits share? {found.level}", f"of {found.n_possible:,} possible; sizes in brackets", x="",
        y="", height=max(420, 200 + 28 * len(names)),
    )  # fmt: skip
    grid = {"showgrid": False, "zeroline": False, "type": "category"}
    axis = grid | {"autorange": "reversed"}
    return figure.update_layout(xaxis=grid | {"tickangle": -40}, yaxis=axis, margin={"l": 190, "b": 150})


def controls_strip(found: Controls) -> go.Figure:
    """Faithfulness of the real circuit with its interval, of each control and of random circuits."""
    import plotly.graph_objects as go

    figure = go.Figure()
    if found.faithfulness is not None:
        low, high = found.faithfulness_interval or (found.faithfulness, found.faithfulness)
        bars = {
            "type": "data", "symmetric": False, "array": [max(0.0, high - found.faithfulness)],
            "arrayminus": [max(0.0, found.faithfulness - low)],
        }  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=["the real task"], y=[found.faithfulness], error_y=bars, mode="markers", name="the real task",
                marker={"size": 12, "symbol": "diamond", "color": PALETTE["text"]},
                hovertemplate="%{y:.3f}<extra></extra>",
            )
        )  # fmt: skip
    groups: dict[str, list[tuple[float, str]]] = {}
    for control in found.controls:
        if control.faithfulness is not None:
            text = f"seed {control.seed}, Jaccard {control.jaccard:.2f}, scores {control.strength:.2f} of the real ones"
            text += f"<br>on its own task: {plain(control.verdict)}"
            groups.setdefault(f"{control.shuffled} shuffled", []).append((control.faithfulness, text))
    groups["random circuits"] = [(value, "") for value in found.random]
    for name, points in groups.items():
        colour = PALETTE["random" if name == "random circuits" else "negative"]
        figure.add_trace(
            go.Scatter(
                x=[name] * len(points), y=[value for value, _ in points], customdata=[text for _, text in points],
                mode="markers", marker={"size": 9, "color": colour, "opacity": 0.7}, name=name,
                hovertemplate="%{y:.3f}<br>%{customdata}<extra></extra>",
            )
        )  # fmt: skip
    low = -math.inf if found.faithfulness is None else found.faithfulness
    as_good = sum((c.faithfulness or 0.0) >= low for c in found.controls)
    small = (
        f"{found.n_edges:,} edges by {found.method} · {found.n_examples:,} examples · against random: {found.verdict}"
    )
    small += f" · {as_good} of {len(found.controls)} controls are as faithful"
    first = f"is there more than in nothing? {found.task}"
    figure = dressed(figure, first, small, x="circuit found on", y="faithfulness on the task")
    return figure.update_layout(showlegend=False)
