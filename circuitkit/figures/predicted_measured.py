"""What an attribution graph predicts against what was measured, and what its circuit keeps of the behaviour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitkit.evaluation.edge_agreement import EdgeAgreement
    from circuitkit.evaluation.feature_graphs import Checked, Verification
    from circuitkit.evaluation.feature_shares import FeatureFaithfulness

LOOKS = {"free": ("negative", "circle"), "frozen": ("positive", "square"), "constrained": ("text", "x-thin-open")}


def predicted_measured(found: Verification) -> go.Figure:
    """Predicted against measured, largest edges on the left, nodes on the right; right predictions lie on the diagonal.

    In the legend: Spearman and R2 of the largest edges.
    """
    from plotly.subplots import make_subplots

    titles = (f"{len(found.edges)} largest edges", f"{len(found.nodes)} nodes, all paths to the final target")
    figure = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=titles)
    for column, part in enumerate((found.edges, found.nodes), 1):
        _diagonal(figure, part, column)
        for mode, (colour, symbol) in LOOKS.items():
            if mode in part.measured:
                _points(figure, part, mode, column, colour, symbol)
    second = (
        f"{found.model} · {found.n_tokens} tokens · replacement {found.replacement_score:.2f} · completeness "
        f"{found.completeness_score:.2f} · legend: Spearman, R2 of edges; of nodes"
    )
    figure = dressed(figure, "do the graph's numbers come true?", second, x="", y="", height=560)
    figure.update_layout(legend={"y": -0.2, "yanchor": "top"}, margin={"t": 120, "b": 130})
    for column, target in ((1, "target"), (2, "final target")):
        grid = {"gridcolor": PALETTE["rule"], "zerolinecolor": PALETTE["muted"], "row": 1, "col": column}
        figure.update_xaxes(title="predicted (units of the target)", **grid)
        figure.update_yaxes(title=f"{target} less without the source", **grid)
    return figure


def scores_measured(found: EdgeAgreement) -> go.Figure:
    """Scores of the largest and of random edges against what cutting each alone did."""
    from plotly.subplots import make_subplots

    figure = make_subplots()
    widest = max((found.largest, found.random), key=lambda part: max(map(abs, part.predicted), default=0.0))
    _diagonal(figure, widest, 1)
    (mode,) = found.largest.measured
    for name, part, colour, symbol in (
        ("random edges", found.random, "negative", "square"), ("largest edges", found.largest, "positive", "circle"),
    ):  # fmt: skip
        _points(figure, part, mode, 1, colour, symbol)
        figure.data[-1].name = f"{name}: {part.spearman(mode):.2f}, {part.r_squared(mode):.2f}"
    second = f"{found.method} on {found.task} · legend: Spearman, R2"
    figure = dressed(figure, "do the scores come true?", second, x="score", y="metric less with the edge cut alone")
    return figure.update_layout(legend={"y": -0.2, "yanchor": "top"}, margin={"b": 120})


def _diagonal(figure: go.Figure, part: Checked, column: int) -> None:
    import plotly.graph_objects as go

    values = [*part.predicted, *(v for measured in part.measured.values() for v in measured)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.05 * (high - low) or 1.0
    ends = [low - room, high + room]
    line = {"color": PALETTE["muted"], "width": 1, "dash": "dot"}
    trace = go.Scatter(
        x=ends, y=ends, mode="lines", line=line, name="measured = predicted", showlegend=column == 1, hoverinfo="skip"
    )
    figure.add_trace(trace, row=1, col=column)


def _points(figure: go.Figure, part: Checked, mode: str, column: int, colour: str, symbol: str) -> None:
    import plotly.graph_objects as go

    marker = {"size": 7, "symbol": symbol, "color": PALETTE[colour], "opacity": 0.75, "line": {"width": 1}}
    if symbol.endswith("open"):
        marker["line"] = {"width": 1.5, "color": PALETTE[colour]}
    where = "edges" if column == 1 else "nodes"
    trace = go.Scatter(
        x=list(part.predicted),
        y=list(part.measured[mode]),
        customdata=[plain(name) for name in part.names],
        mode="markers",
        marker=marker,
        name=f"{mode}, {where}: {part.spearman(mode):.2f}, {part.r_squared(mode):.2f}",
        hovertemplate="%{customdata}<br>predicted %{x:.3g}, measured %{y:.3g}<extra></extra>",
    )
    figure.add_trace(trace, row=1, col=column)


def faithfulness_strip(found: FeatureFaithfulness) -> go.Figure:
    """Shares of the metric: with the circuit alone, without it, and with random circuits of its size."""
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = (
        ("circuit alone", [found.faithfulness], found.faithfulness_interval, "positive", "circle"),
        ("all but the circuit", [found.completeness], found.completeness_interval, "negative", "square"),
        ("random circuits", list(found.random_faithfulness), None, "random", "diamond"),
    )
    for name, values, interval, colour, symbol in rows:
        known = [value for value in values if value is not None]
        error = None
        if interval is not None and known:
            up, down = interval[1] - known[0], known[0] - interval[0]
            error = {"type": "data", "symmetric": False, "array": [up], "arrayminus": [down]}
        trace = go.Scatter(
            x=known, y=[name] * len(known), error_x=error, mode="markers", name=name, showlegend=False,
            marker={"size": 11, "symbol": symbol, "color": PALETTE[colour], "opacity": 0.8},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(trace)
    for level in (0, 1):
        figure.add_vline(x=level, line={"color": PALETTE["muted"], "width": 1, "dash": "dot"})
    second = (
        f"{len(found.clean)} prompts · {sum(found.n_latents):,} of {sum(found.n_active):,} latents · "
        f"replacement {found.replacement_score:.2f}, completeness {found.completeness_score:.2f} · {found.verdict}"
    )
    x = "share of the metric: 0 with all latents ablated, 1 for the model"
    figure = dressed(figure, "what the circuit keeps", second, x=x, y="latents that work", height=360)
    return figure.update_layout(margin={"l": 150}).update_yaxes(autorange="reversed")
