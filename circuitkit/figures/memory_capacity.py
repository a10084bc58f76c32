"""How well each lag can be read out of a state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitkit.analysis.memory_capacity import MemoryCapacity
from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go


def memory_capacity_figure(capacity: MemoryCapacity) -> go.Figure:
    """Squared correlation against the lag."""
    import plotly.graph_objects as go

    lags = list(range(1, len(capacity.squares) + 1))
    figure = go.Figure(
        go.Scatter(
            x=lags,
            y=capacity.squares.tolist(),
            mode="lines+markers",
            line={"color": PALETTE["positive"], "width": 2},
            marker={"size": 5},
            hovertemplate="lag %{x}: %{y:.3f}<extra></extra>",
        )
    )
    small = (
        f"sum {capacity.total:.2f} for {capacity.n_units} numbers of state, on {capacity.n_held_out:,} held-out steps"
    )
    dressed(figure, "memory capacity", small, x="lag (steps)", y="squared correlation with its read-out")
    return figure.update_yaxes(range=[0, 1.05])
