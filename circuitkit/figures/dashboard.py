"""A latent's dashboard: its activations, the logits that it moves, and where it is strongest."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from circuitkit.drawing import PALETTE
from circuitkit.figures.base import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitkit.features.dashboards import Dashboard, Example

EXAMPLES = 6
_AROUND = 6  # tokens on either side, so that a line fits


def dashboard_figure(board: Dashboard) -> go.Figure:
    """Histogram of activations beside direct logit effects; below, the strongest examples with their place in bold.

    >>> from circuitkit.features.dashboards import Dashboard, Histogram
    >>> empty = Dashboard(3, "mlp-in.0", 0, 0.0, 0.0, 0.0, (), (), Histogram((0.0, 1.0), (0,)), (("a", 1.0),), ())
    >>> dashboard_figure(empty).layout.xaxis.title.text
    'activation'
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    edges, counts = board.histogram.edges, board.histogram.counts
    figure = make_subplots(cols=2, horizontal_spacing=0.2)
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    bars = {"marker": {"color": "#8a5cc2"}, "showlegend": False}
    figure.add_trace(
        go.Bar(x=middles, y=[n or None for n in counts], width=edges[1] - edges[0] or None,
               hovertemplate="%{x:.3g}: %{y}<extra></extra>", **bars), 1, 1)  # fmt: skip
    logits = [*board.top_logits, *reversed(board.bottom_logits)]
    figure.add_trace(
        go.Bar(
            x=[value for _, value in logits],
            y=list(range(len(logits))),
            orientation="h",
            showlegend=False,
            marker={"color": [PALETTE["positive"] if value > 0 else PALETTE["negative"] for _, value in logits]},
            hovertemplate="%{x:+.3g}<extra></extra>",
        ),
        1,
        2,
    )
    shown = board.top[:EXAMPLES]
    small = f"active on {board.activation_frequency:.2%} of tokens · at most {board.act_max:.3g}"
    figure.update_layout(
        template="plotly_white", font={"color": PALETTE["text"]}, height=500 + 24 * len(shown), bargap=0,
        margin={"l": 70, "r": 30, "t": 80, "b": 100 + 24 * len(shown)},
        title={"text": f"latent {board.latent} of {plain(board.site)}<br><sup>{small}</sup>", "x": 0.02},
        xaxis={"title": "activation"}, yaxis={"title": "tokens (log scale)", "type": "log", "dtick": 1},
        xaxis2={"title": "direct effect on logits, less their mean", "zerolinecolor": PALETTE["muted"]},
        yaxis2={"tickvals": list(range(len(logits))), "ticktext": [f"“{plain(t)}”" for t, _ in logits],
                "autorange": "reversed", "title": "token"},
    )  # fmt: skip
    for line, example in enumerate(shown):
        figure.add_annotation(
            text=_sentence(example), xref="paper", yref="paper", x=0, y=0, yshift=-80 - 24 * line,
            xanchor="left", yanchor="top", showarrow=False, font={"size": 13},
        )  # fmt: skip
    return figure


def _sentence(example: Example) -> str:
    start = max(0, example.at - _AROUND)
    words = [plain(text) for text in example.texts[start : example.at + _AROUND + 1]]
    words[example.at - start] = f"<b>{words[example.at - start]}</b>"
    return f"{example.activations[example.at]:.3g}:  …{''.join(words)}…"
