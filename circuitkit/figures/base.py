"""How every figure looks: fonts, colours, a title of two lines."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.drawing import PALETTE, visible

if TYPE_CHECKING:
    import plotly.graph_objects as go


def plain(text: object) -> str:
    """Text as a figure shows it: no markup, no invisible characters."""
    return html.escape(visible(str(text)), quote=False)


def principal_axes(
    states: Float[Tensor, "*row state"], n: int
) -> tuple[Float[Tensor, " state"], Float[Tensor, "axis state"]]:
    """The mean of some states and their first n principal axes; 0 where there are fewer.

    >>> principal_axes(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), 2)[0]
    tensor([0., 2.])
    """
    flat = states.flatten(0, -2)
    middle = flat.mean(0)
    axes = torch.linalg.svd(flat - middle, full_matrices=False).Vh[:n]
    return middle, torch.cat((axes, axes.new_zeros(n - len(axes), axes.shape[1])))


def dressed(figure: go.Figure, first: str, second: str, *, x: str, y: str, height: int = 460) -> go.Figure:
    """The figure with our looks, a title of a heading and a line of small print, and named axes."""
    return figure.update_layout(
        template="plotly_white",
        font={"color": PALETTE["text"]},
        title={"text": f"{plain(first)}<br><sup>{plain(second)}</sup>", "x": 0.02, "xanchor": "left"},
        xaxis={"title": x, "gridcolor": PALETTE["rule"], "zerolinecolor": PALETTE["muted"]},
        yaxis={"title": y, "gridcolor": PALETTE["rule"], "zerolinecolor": PALETTE["muted"]},
        height=height,
        margin={"l": 70, "r": 30, "t": 110, "b": 90},
        # Above the plot: below it, slanted labels would be covered.
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
    )
