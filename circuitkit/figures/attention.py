"""Attention maps of recurrent layers: where each step's value came from, and how far back heads look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitkit.drawing import PALETTE
from circuitkit.errors import OptionError
from circuitkit.figures.base import dressed, plain
from circuitkit.figures.heatmap import DIVERGING, SATURATION
from circuitkit.functional.heads import lag_curve

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitkit.analysis.attention_maps import AttentionMaps

# More than six pictures side by side are too small to read.
MOST, PER_ROW = 6, 3


def attention_maps(maps: AttentionMaps, *, example: int = 0, heads: Sequence[int] | None = None) -> go.Figure:
    """Weight of every source step in every later one, a picture per head, blue positive and orange negative.

    Complex maps are drawn by their real part.

    Raises:
        OptionError: if there is no such example or head, or if more than six heads are asked for.
    """
    from plotly.subplots import make_subplots

    chosen = _chosen(maps, heads)
    if not 0 <= example < len(maps.pattern):
        raise OptionError(f"the maps have examples 0 to {len(maps.pattern) - 1}, got {example}")
    pattern = _real(maps.pattern[example, chosen]).double().cpu()
    rows = -(-len(chosen) // PER_ROW)
    titles = [plain(maps.heads[i]) for i in chosen]
    figure = make_subplots(
        rows, min(len(chosen), PER_ROW), subplot_titles=titles, horizontal_spacing=0.07, vertical_spacing=0.28 / rows
    )
    magnitudes = pattern.abs()[pattern != 0]
    ends = float(magnitudes.quantile(SATURATION)) if len(magnitudes) else 1.0
    for i, weights in enumerate(pattern):
        row, column = i // PER_ROW + 1, i % PER_ROW + 1
        figure.add_trace(_picture(weights, ends, first=i == 0), row=row, col=column)
    part = " · real part" if maps.pattern.is_complex() else ""
    second = f"{maps.what}{part} · example {example} · colours end at ±{ends:.3g}"
    dressed(figure, f"which earlier steps does {maps.name} draw on?", second, x="", y="", height=130 + 300 * rows)
    every = -(-pattern.shape[-1] // 6)
    for i in range(len(chosen)):
        row, column = i // PER_ROW + 1, i % PER_ROW + 1
        figure.update_yaxes(scaleanchor=f"x{i + 1}" if i else "x", constrain="domain", row=row, col=column)
    figure.update_xaxes(title="source step s", showgrid=False, zeroline=False, dtick=every, constrain="domain")
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, dtick=every)
    figure.update_yaxes(title="step t", col=1)
    return figure.update_layout(plot_bgcolor=PALETTE["blank"])


def lag_curves(maps: AttentionMaps, *, heads: Sequence[int] | None = None) -> go.Figure:
    """Mean share of each head's weight by how many steps back the source is.

    Raises:
        OptionError: if there is no such head, or if more than six heads are asked for.
    """
    import plotly.graph_objects as go

    chosen = _chosen(maps, heads)
    curves = lag_curve(maps.pattern[:, chosen]).double().cpu()
    figure = go.Figure()
    for i, curve in zip(chosen, curves, strict=True):
        figure.add_trace(
            go.Scatter(
                x=list(range(len(curve))),
                y=curve.tolist(),
                name=plain(maps.heads[i]),
                mode="lines+markers",
                hovertemplate="%{x} steps back: %{y:.3f}<extra>" + plain(maps.heads[i]) + "</extra>",
            )
        )
    examples = f"{len(maps.pattern):,} example" + "s" * (len(maps.pattern) != 1)
    second = f"{maps.what} · each row's magnitudes divided by their sum · mean over {examples} and all steps"
    return dressed(
        figure, f"how far back does {maps.name} look?", second, x="lag t - s (steps)", y="share of the weight"
    )


def _picture(weights: Tensor, ends: float, *, first: bool) -> go.Heatmap:
    import plotly.graph_objects as go

    return go.Heatmap(
        z=weights.numpy(),
        colorscale=DIVERGING,
        zmid=0,
        zmin=-ends,
        zmax=ends,
        showscale=first,
        colorbar={"title": {"text": "weight", "side": "top"}, "thickness": 14, "outlinewidth": 0},
        hovertemplate="step %{y} from step %{x}<br>weight %{z:+.4g}<extra></extra>",
    )


def _chosen(maps: AttentionMaps, heads: Sequence[int] | None) -> list[int]:
    chosen = list(range(min(MOST, len(maps.heads)))) if heads is None else [int(i) for i in heads]
    wrong = [i for i in chosen if not 0 <= i < len(maps.heads)]
    if wrong or not 0 < len(chosen) <= MOST:
        raise OptionError(f"got heads {chosen}; give one to {MOST} numbers from 0 to {len(maps.heads) - 1}")
    return chosen


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x)[..., 0] if x.is_complex() else x
