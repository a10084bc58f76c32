"""Activity over units and steps, and its spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitkit.analysis.waves import Waves
from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed
from circuitkit.figures.heatmap import DIVERGING

if TYPE_CHECKING:
    import plotly.graph_objects as go


def waves_figure(waves: Waves) -> go.Figure:
    """Space against time, beside the power spectrum with the line of the dominant velocity."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=2, horizontal_spacing=0.24)
    bar = {"thickness": 12, "outlinewidth": 0, "title": {"side": "right"}}
    largest = float(waves.activity.abs().max()) or 1.0
    activity = go.Heatmap(z=waves.activity.tolist(), colorscale=DIVERGING, zmin=-largest, zmax=largest)
    activity.colorbar = bar | {"x": 0.39, "title": {"text": "activity - mean", "side": "right"}}
    activity.hovertemplate = "unit %{x}, step %{y}: %{z:.3g}<extra></extra>"
    figure.add_trace(activity, 1, 1)
    share = (100 * waves.power / waves.power.sum().clamp_min(1e-300)).tolist()
    k, f = waves.wavenumbers.tolist(), waves.frequencies.tolist()
    spectrum = go.Heatmap(x=k, y=f, z=share, colorscale="Blues")
    spectrum.colorbar = bar | {"x": 1.0, "title": {"text": "power (%)", "side": "right"}}
    spectrum.hovertemplate = "%{x:.3g} turns per unit, %{y:.3g} per step: %{z:.3g} %<extra></extra>"
    figure.add_trace(spectrum, 1, 2)
    velocity = waves.velocity
    if velocity is not None:
        # Inside the box of frequencies only: the line f = -velocity k leaves it at a side or at the top.
        ends = max(abs(x) for x in k), max(abs(x) for x in f)
        reach = min(ends[0], ends[1] / abs(velocity))
        line = {"color": PALETTE["negative"], "width": 1.5, "dash": "dash"}
        track = go.Scatter(x=[-reach, reach], y=[velocity * reach, -velocity * reach], mode="lines", line=line)
        figure.add_trace(track.update(showlegend=False, hoverinfo="skip"), 1, 2)
    small = f"{100 * waves.moving:.0f} % of the power moves, direction {waves.direction:+.2f}" + (
        "" if velocity is None else f" · dashed: {velocity:+.3g} units per step"
    )
    dressed(figure, "activity in space and time", small, x="unit", y="step", height=480)
    figure.update_yaxes(autorange="reversed", col=1)
    figure.update_xaxes(title="turns per unit", col=2)
    return figure.update_yaxes(title="turns per step", col=2)
