"""Eigenvalues over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitkit.analysis.eigenvalues import EigenvalueTracks
from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLOURS = (PALETTE["positive"], PALETTE["negative"], "#2e7d32", "#6b3fa0", "#8a5a00")


def eigenvalue_tracks_figure(tracks: EigenvalueTracks, top: int = 5) -> go.Figure:
    """Paths of the top modes in the complex plane, a dot at the end, beside their magnitudes against the step.

    >>> from circuitkit.analysis.eigenvalues import track_eigenvalues
    >>> figure = eigenvalue_tracks_figure(track_eigenvalues([torch.eye(2), 2 * torch.eye(2)], [0, 10]))
    >>> figure.layout.xaxis2.title.text
    'training step'
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=2, horizontal_spacing=0.12)
    last, rest = tracks.values[-1], {"size": 4, "color": PALETTE["neutral"]}
    others = {"mode": "markers", "marker": rest, "hoverinfo": "skip", "name": "other modes, at the end"}
    figure.add_trace(go.Scatter(x=last.real[top:].tolist(), y=last.imag[top:].tolist(), **others), 1, 1)
    around = torch.linspace(0, 2 * torch.pi, 181)
    circle = {"mode": "lines", "line": {"color": PALETTE["muted"], "width": 1}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=around.cos().tolist(), y=around.sin().tolist(), showlegend=False, **circle), 1, 1)
    sizes = [4] * (len(tracks.steps) - 1) + [10]
    for mode in range(min(top, tracks.values.shape[1])):
        values, colour = tracks.values[:, mode], _COLOURS[mode % len(_COLOURS)]
        style = {
            "mode": "lines+markers",
            "line": {"color": colour, "width": 1.5},
            "marker": {"size": sizes, "color": colour},
            "legendgroup": f"{mode}",
            "customdata": list(tracks.steps),
        }
        note = "step %{customdata}: %{x:.4g} + %{y:.4g}i<extra></extra>"
        path = go.Scatter(x=values.real.tolist(), y=values.imag.tolist(), hovertemplate=note, **style)
        figure.add_trace(path.update(name=f"mode {mode}: {_said(complex(last[mode]))}"), 1, 1)
        note = "step %{x}: %{y:.4g}<extra></extra>"
        size = go.Scatter(x=list(tracks.steps), y=values.abs().tolist(), hovertemplate=note, showlegend=False, **style)
        figure.add_trace(size, 1, 2)
    dressed(
        figure,
        "eigenvalues over training",
        f"steps {tracks.steps[0]:,} to {tracks.steps[-1]:,} · large dots: the end · effective rank at the end "
        f"{float(tracks.effective_rank[-1]):.2f} of {tracks.values.shape[1]}",
        x="real part (per step)",
        y="imaginary part (per step)",
        height=520,
    )
    grid = {"gridcolor": PALETTE["rule"], "zerolinecolor": PALETTE["muted"]}
    # Beside the plots: above them, many modes would not fit in a line.
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}, margin={"r": 220})
    figure.update_yaxes(scaleanchor="x", col=1)
    figure.update_xaxes(title="training step", **grid, col=2)
    return figure.update_yaxes(title="magnitude (per step)", rangemode="tozero", **grid, col=2)


def _said(value: complex) -> str:
    return f"{value.real:.3f}" if abs(value.imag) < 5e-4 else f"{value.real:.3f} {value.imag:+.3f}i"
