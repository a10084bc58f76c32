"""What each step of an input added to one number that a recurrent network gave."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from circuitkit.drawing import PALETTE, visible
from circuitkit.errors import GraphError

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_CHANNELS, MOST_TICKS = 6, 40
COLOURS = ("#084b83", "#d97a1e", "#4c9a6a", "#a05195", "#6fb1e0", "#8a6d3b")


def effects_over_time(
    effects: Float[Tensor, "step channel"], constant: float, labels: Sequence[str], title: str
) -> go.Figure:
    """Bars of effects by step, channels stacked by sign; one bar for what comes from no step.

    Args:
        effects: of each channel of each step, in the target's units.
        constant: of everything that is the same for every input.
        labels: of the steps; labels may repeat.
        title: heading.

    Raises:
        GraphError: if there is not one label for each step.

    >>> import torch
    >>> figure = effects_over_time(torch.ones(3, 2), 0.5, ["a", "b", "a"], "effect on logits.0")
    >>> [bar.name for bar in figure.data], figure.layout.xaxis.title.text
    (['channel 0', 'channel 1', 'constants'], 'step')
    """
    import plotly.graph_objects as go

    if len(labels) != len(effects):
        raise GraphError(f"got {len(labels)} labels for {len(effects)} steps, expected one for each")
    figure, steps = go.Figure(), list(range(len(effects)))
    if effects.shape[1] > MOST_CHANNELS:
        effects = effects.sum(1, keepdim=True)
    n = effects.shape[1]
    for i, row in enumerate(effects.detach().double().cpu().T.tolist()):
        name = f"channel {i}" if n > 1 else "inputs"
        figure.add_bar(
            x=steps,
            y=row,
            name=name,
            marker={"color": COLOURS[i], "line": {"width": 0}},
            hovertemplate="step %{x}: %{y:+.4g}",
        )
    figure.add_bar(x=[-1], y=[constant], name="constants", marker={"color": PALETTE["muted"]})
    every = max(1, -(-len(steps) // MOST_TICKS))
    texts = [html.escape(visible(str(label)), quote=False) for label in labels]
    figure.update_layout(
        template="plotly_white",
        barmode="relative",
        font={"color": PALETTE["text"]},
        title={"text": html.escape(visible(title), quote=False), "x": 0.02, "xanchor": "left"},
        xaxis={
            "title": "step", "tickmode": "array", "tickvals": [-1, *steps[::every]],
            "ticktext": ["constants", *texts[::every]], "showgrid": False,
        },
        yaxis={"title": "effect, in units of the output", "zerolinecolor": PALETTE["text"]},
        margin={"l": 80, "r": 30, "t": 70, "b": 80},
        height=420,
    )  # fmt: skip
    return figure
