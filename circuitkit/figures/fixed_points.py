"""Fixed points of a recurrent network in the plane where it moves most, their spectra, and the graph between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.analysis.attractor_graph import AttractorGraph
from circuitkit.analysis.fixed_points import FixedPoints
from circuitkit.analysis.mode_ablation import ModeAblation
from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed, principal_axes

if TYPE_CHECKING:
    import plotly.graph_objects as go

# One mark for each kind; saddles with more unstable directions share the last of theirs.
_MARKS = {
    "stable": (PALETTE["positive"], "circle"),
    "saddle-1": (PALETTE["negative"], "diamond"),
    "saddle-2": ("#8a5a00", "square"),
    "saddle-3": ("#6b3fa0", "triangle-up"),
    "slow": (PALETTE["neutral"], "x-thin-open"),
}
_OBLIQUE = (0.3, 0.2)  # a cube seen from the front would hide half of its corners


def fixed_points_figure(points: FixedPoints) -> go.Figure:
    """Where the points are, over the visited states, beside the eigenvalues of their Jacobians.

    >>> from circuitkit.analysis.fixed_points import find_fixed_points
    >>> found = find_fixed_points(lambda h, x: torch.tanh(2 * h + x), torch.randn(32, 2), torch.zeros(2), n_starts=64)
    >>> [trace.name for trace in fixed_points_figure(found).data][:2]
    ['visited states', 'stable']
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=2, horizontal_spacing=0.12)
    plane = _plane(points.visited)
    at, visited, kinds = plane(points.states), plane(points.visited), points.kinds
    figure.add_trace(_dots(visited, "visited states", {"size": 4, "color": PALETTE["rule"]}, hover=False), 1, 1)
    for kind in points.counts:
        chosen = points.of(kind)
        colour, symbol = _mark(kind)
        marker = {"size": 10, "color": colour, "symbol": symbol, "line": {"width": 1, "color": colour}}
        notes = [
            f"point {i}: {kinds[i]}<br>speed {float(points.speeds[i]):.2g} per step<br>top eigenvalue "
            f"{complex(points.eigenvalues[i, 0]):.4g}<br>{int(points.found[i])} starts"
            for i in chosen.tolist()
        ]
        figure.add_trace(_dots(at[chosen], kind, marker, notes=notes, group=kind), 1, 1)
        values = points.eigenvalues[chosen].flatten()
        spectrum = torch.stack((values.real, values.imag), 1)
        small = marker | {"size": 5}
        figure.add_trace(_dots(spectrum, kind, small, group=kind, hover=False, legend=False), 1, 2)
    around = torch.linspace(0, 2 * torch.pi, 181)
    circle = go.Scatter(
        x=around.cos().tolist(), y=around.sin().tolist(), mode="lines", line={"color": PALETTE["muted"], "width": 1}
    )
    figure.add_trace(circle.update(showlegend=False, hoverinfo="skip"), 1, 2)
    counted = ", ".join(f"{n} {kind}" for kind, n in points.counts.items()) or "none"
    dressed(
        figure,
        "fixed points",
        f"{counted} · right: eigenvalues of their Jacobians, stable inside the circle",
        x="first principal component of visited states",
        y="second principal component",
        height=520,
    )
    grid = {"gridcolor": PALETTE["rule"], "zerolinecolor": PALETTE["muted"]}
    figure.update_xaxes(title="real part (per step)", **grid, col=2)
    return figure.update_yaxes(title="imaginary part (per step)", scaleanchor="x2", **grid, col=2)


def attractor_graph_figure(graph: AttractorGraph) -> go.Figure:
    """Stable points, the saddles between them, and lines from each saddle to its two ends."""
    import plotly.graph_objects as go

    nodes = graph.points.states[graph.stable]
    plane = _plane(nodes if len(nodes) > 2 else graph.points.states, oblique=_OBLIQUE)
    at, saddles = plane(nodes), plane(graph.points.states[graph.saddles])
    figure, lines = go.Figure(), list[Tensor]()
    gap = torch.full((1, 2), torch.nan, dtype=at.dtype)
    for saddle, pair in zip(saddles, graph.ends.tolist(), strict=True):
        for end in pair:
            if end >= 0:
                lines += [at[end][None], saddle[None], gap]
    path = torch.cat(lines) if lines else gap
    figure.add_trace(
        go.Scatter(
            x=path[:, 0].tolist(),
            y=path[:, 1].tolist(),
            mode="lines",
            line={"color": PALETTE["muted"], "width": 1.5},
            name="pushed off a saddle",
            hoverinfo="skip",
        )
    )
    colour, symbol = _MARKS["saddle-1"]
    notes = [
        f"saddle {point}: ends at {a} and {b}<br>top eigenvalue {float(graph.points.eigenvalues[point, 0].real):.4g}"
        for point, (a, b) in zip(graph.saddles.tolist(), graph.ends.tolist(), strict=True)
    ]
    figure.add_trace(_dots(saddles, "saddle-1", {"size": 9, "color": colour, "symbol": symbol}, notes=notes))
    figure.add_trace(
        go.Scatter(
            x=at[:, 0].tolist(),
            y=at[:, 1].tolist(),
            mode="markers+text",
            text=[str(i) for i in range(len(at))],
            textfont={"color": "#ffffff", "size": 12},
            marker={"size": 24, "color": PALETTE["positive"]},
            name="stable",
            hovertemplate="stable point %{text}<extra></extra>",
        )
    )
    share = graph.fraction_joining
    small = f"{len(nodes)} stable points, {len(saddles)} saddles" + (
        "" if share is None else f", {100 * share:.0f} % of them join two different points"
    )
    return dressed(
        figure,
        "stable points and the saddles between them",
        small,
        x=f"first principal component of the stable points + {_OBLIQUE[0]} of the third",
        y=f"second + {_OBLIQUE[1]} of the third",
        height=560,
    )


def mode_ablation_figure(ablation: ModeAblation) -> go.Figure:
    """How much each output changes when the modes are held still."""
    import plotly.graph_objects as go

    effect = ablation.effect.tolist()
    figure = go.Figure(
        go.Bar(
            x=[f"output {i}" for i in range(len(effect))],
            y=effect,
            marker={"color": PALETTE["positive"]},
            hovertemplate="%{x}: %{y:.3g}<extra></extra>",
        )
    )
    values = ", ".join(f"{complex(v):.4g}" if v.imag else f"{float(v.real):.4g}" for v in ablation.eigenvalues)
    return dressed(
        figure,
        "outputs without a mode",
        f"eigenvalue {values}, held still after every step",
        x="output",
        y="change (standard deviations of the output)",
    )


def _mark(kind: str) -> tuple[str, str]:
    return _MARKS.get(kind, _MARKS["saddle-3"])


def _plane(states: Float[Tensor, "point state"], oblique: tuple[float, float] = (0.0, 0.0)):  # type: ignore[no-untyped-def]
    """The map onto the first two principal components of some states, parts of the third added; missing ones are 0."""
    middle, axes = principal_axes(states, 3)
    axes = axes[:2] + axes.new_tensor(oblique)[:, None] * axes[2]
    return lambda x: (x - middle) @ axes.T


def _dots(
    at: Float[Tensor, "point 2"],
    name: str,
    marker: dict[str, object],
    *,
    notes: list[str] | None = None,
    group: str | None = None,
    hover: bool = True,
    legend: bool = True,
) -> go.Scatter:
    import plotly.graph_objects as go

    return go.Scatter(
        x=at[:, 0].tolist(),
        y=at[:, 1].tolist(),
        mode="markers",
        name=name,
        marker=marker,
        customdata=notes,
        hovertemplate="%{customdata}<extra></extra>" if notes else None,
        hoverinfo=None if hover else "skip",
        legendgroup=group,
        showlegend=legend,
    )
