"""Numbers on a grid, in colours that diverge from 0: blue supports the behaviour, orange opposes it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from circuitkit.drawing import PALETTE, visible
from circuitkit.errors import GraphError
from circuitkit.scores import Scores

if TYPE_CHECKING:
    import plotly.graph_objects as go

DIVERGING = ((0.0, "#a83f00"), (0.25, "#f2a65e"), (0.5, "#ffffff"), (0.75, "#6fb1e0"), (1.0, "#084b83"))
# A few edges are far stronger than the rest; colours saturate at this quantile of the magnitudes.
SATURATION = 0.995


def score_heatmap(scores: Scores) -> go.Figure:
    """All edge scores: sources down, destinations across; impossible edges are left grey.

    >>> import torch
    >>> from circuitkit.graph import chain_graph
    >>> figure = score_heatmap(Scores(torch.eye(3), chain_graph(2), "example"))
    >>> figure.data[0].z.shape
    (3, 3)
    """
    possible = scores.graph.mask.cpu().numpy()
    values = np.where(possible, scores.values.detach().double().cpu().numpy(), np.nan)
    shape = f"{scores.graph.n_edges:,} possible edges"
    figure = _grid(values, scores.graph.sources, scores.graph.destinations, "score")
    ends, largest = float(figure.data[0].zmax), float(np.nanmax(np.abs(values), initial=0.0))
    if largest > ends:
        shape += f" · colours end at ±{ends:.3g}, the largest score is {largest:.3g}"
    figure.update_layout(
        title=_title(f"edge scores by {scores.method}", f"{shape} · grey: no such edge"),
        xaxis_title="destination",
        yaxis_title="source",
    )
    return figure


def position_heatmap(
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    upward: bool = True,
    whole: str = "",
) -> go.Figure:
    """Effects by row (a layer or a component) and column (a token position); labels may repeat.

    Args:
        values: effects.
        rows: labels of the first axis.
        columns: labels of the second axis.
        title: heading.
        upward: the first row at the bottom, as layers are drawn, or on top.
        whole: what an effect of 1 is, in words; for small print, beside the largest effect.

    Raises:
        GraphError: if the labels do not fit the values.

    >>> import torch
    >>> position_heatmap(torch.ones(2, 3), ["0", "1"], ["the", "cat", "the"], "effects").layout.xaxis.ticktext
    ('the', 'cat', 'the')
    """
    if tuple(values.shape) != (len(rows), len(columns)):
        raise GraphError(
            f"got values of shape {tuple(values.shape)} for {len(rows)} rows and {len(columns)} columns; "
            "give one label per row and column"
        )
    figure = _grid(values.detach().double().cpu().numpy(), rows, columns, "effect", least_ticks=len(columns))
    largest = float(values.abs().nan_to_num(0).max()) if values.numel() else 0.0
    small = f"1 is {whole} · the largest effect here is {largest:.3g}" if whole else ""
    figure.update_layout(title=_title(title, small), yaxis_autorange=True if upward else "reversed")
    figure.update_traces(zmin=-(largest or 1.0), zmax=largest or 1.0)
    return figure


def _grid(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], what: str, least_ticks: int = 0
) -> go.Figure:
    import plotly.graph_objects as go

    down, across = ([html.escape(visible(str(label)), quote=False) for label in labels] for labels in (rows, columns))
    magnitudes = np.abs(values[np.isfinite(values)])
    largest = float(np.quantile(magnitudes, SATURATION)) if magnitudes.size else 0.0
    largest = largest or float(magnitudes.max(initial=0.0)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            colorscale=DIVERGING,
            zmid=0,
            zmin=-largest,
            zmax=largest,
            hoverongaps=False,
            customdata=np.array([[f"{source} → {target}" for target in across] for source in down], dtype=object),
            hovertemplate="%{customdata}<br>" + what + " %{z:+.4g}<extra></extra>",
            colorbar={"title": {"text": what, "side": "top"}, "thickness": 14, "outlinewidth": 0},
        )
    )
    figure.update_layout(
        template="plotly_white",
        font={"color": PALETTE["text"]},
        plot_bgcolor=PALETTE["blank"],
        margin={"l": 90, "r": 30, "t": 80, "b": 80},
        height=int(min(900, max(380, 190 + 22 * len(down)))),
        xaxis=_ticks(across, max(40, least_ticks)) | {"tickangle": -60 if max(map(len, across), default=0) > 3 else 0},
        yaxis=_ticks(down, 40) | {"autorange": "reversed"},
    )
    return figure


def _ticks(labels: list[str], most: int) -> dict[str, object]:
    """Ticks by number, because two columns may carry the same token; every k-th label if there are many."""
    step = max(1, -(-len(labels) // most))
    at = list(range(0, len(labels), step))
    return {
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [labels[i] for i in at],
        "showgrid": False,
        "zeroline": False,
    }


def _title(first: str, second: str) -> dict[str, object]:
    text = html.escape(visible(first), quote=False) + (
        f"<br><sup>{html.escape(second, quote=False)}</sup>" if second else ""
    )
    return {"text": text, "x": 0.02, "xanchor": "left"}
