"""Cycles of a driven network, and the outputs that they carry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitkit.analysis.limit_cycles import LimitCycles, PhaseMemory
from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed, principal_axes

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLOURS = (PALETTE["positive"], PALETTE["negative"], "#2e7d32", "#6b3fa0", "#8a5a00", PALETTE["neutral"])


def limit_cycles_figure(cycles: LimitCycles) -> go.Figure:
    """The cycles in the plane of the first two principal components of all their states; a dot begins the period.

    >>> from circuitkit.analysis.limit_cycles import find_limit_cycles
    >>> drive = torch.tensor([[1.0], [-1.0]])
    >>> len(limit_cycles_figure(find_limit_cycles(lambda h, x: 0.5 * h + x, torch.zeros(1, 1), drive)).data)
    2
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    if len(cycles.orbits):
        middle, axes = principal_axes(cycles.orbits, 2)
    for i, orbit in enumerate(cycles.orbits):
        at = (torch.cat((orbit, orbit[:1])) - middle) @ axes.T
        colour, top = _COLOURS[i % len(_COLOURS)], float(cycles.multipliers[i, 0].abs())
        name = f"cycle {i} ({'stable' if cycles.stable[i] else 'not stable'}, multiplier {top:.2g})"
        line = {"x": at[:, 0].tolist(), "y": at[:, 1].tolist(), "mode": "lines", "line": {"color": colour, "width": 2}}
        figure.add_trace(go.Scatter(**line, name=name, hoverinfo="skip"))
        dot = {"x": at[:1, 0].tolist(), "y": at[:1, 1].tolist(), "mode": "markers"}
        figure.add_trace(go.Scatter(**dot, marker={"color": colour, "size": 9}, showlegend=False, hoverinfo="skip"))
    return dressed(
        figure,
        "limit cycles",
        f"{len(cycles)} found, locked to a drive of {len(cycles.drive)} steps · dots: the first step of the period",
        x="first principal component",
        y="second principal component",
    )


def phase_memory_figure(memory: PhaseMemory) -> go.Figure:
    """The output over one period after each stimulus, solid, and the wanted one, dotted."""
    import plotly.graph_objects as go

    figure, steps = go.Figure(), list(range(len(memory.cycles.drive)))
    for i, output in enumerate(memory.outputs):
        colour = _COLOURS[i % len(_COLOURS)]
        name, r = f"after stimulus {i}", float(memory.correlations[i])
        line = {"x": steps, "mode": "lines", "legendgroup": name}
        figure.add_trace(
            go.Scatter(y=output.tolist(), name=f"{name} (r = {r:.2f})", line={"color": colour, "width": 2}, **line)
        )
        wanted = {"color": colour, "width": 1.5, "dash": "dot"}
        figure.add_trace(go.Scatter(y=memory.targets[i].tolist(), name=f"wanted after {i}", line=wanted, **line))
    small = "remembers the stimulus" if memory.works else "; ".join(memory.problems)
    dressed(figure, "what the phase of the output remembers", small, x="step of the period", y="output")
    return figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}, margin={"r": 220})
