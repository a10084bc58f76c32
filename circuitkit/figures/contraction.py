"""By how much each condition for contraction holds or fails."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from circuitkit.analysis.contraction import Contraction
from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go


def contraction_figure(contraction: Contraction) -> go.Figure:
    """The margin of every condition: to the right of 0 it holds. Those that do not apply are left empty."""
    import plotly.graph_objects as go

    shown = contraction.certificates[::-1]
    figure = go.Figure(
        go.Bar(
            x=[None if math.isnan(c.margin) else c.margin for c in shown],
            y=[c.name + (" (does not apply)" if math.isnan(c.margin) else "") for c in shown],
            orientation="h",
            marker={"color": [PALETTE["positive" if c.margin > 0 else "negative"] for c in shown]},
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )
    time = "in continuous time" if contraction.leak is None else f"step by step with leak {contraction.leak:g}"
    held = [c.name for c in contraction.certificates if c.holds]
    small = (
        f"certified {time} by {', '.join(held)}" if held else f"nothing certified {time}: not a proof of the contrary"
    )
    dressed(figure, "does the network forget where it began?", small, x="margin (1 - bound)", y="", height=360)
    return figure.update_layout(margin={"l": 200})
