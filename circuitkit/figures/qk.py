"""An attention score as a grid of pairs: what the query's position holds against what the key's position holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitkit.figures.heatmap import position_heatmap

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitkit.features.qk import QkAttribution


def pair_heatmap(found: QkAttribution, n: int = 20) -> go.Figure:
    """All pairs among the sources of the ``n`` strongest ones: those of the query down, those of the key across.

    Raises:
        OptionError: if n is below 1.
    """
    top, s = found.top(n), found.score
    number = {node.name: i for i, node in enumerate(found.nodes)}
    rows = list(dict.fromkeys(pair.query.name for pair in top))
    columns = list(dict.fromkeys(pair.key.name for pair in top))
    values = found.queries[[number[r] for r in rows]] @ found.keys[[number[c] for c in columns]].T
    where = f"a{s.layer}.h{s.head}, query at {s.query.position}, key at {s.key.position}"
    figure = position_heatmap(values, rows, columns, f"attention score by pairs · {where}", upward=False)
    figure.update_traces(colorbar_title_text="score", hovertemplate="%{customdata}<br>score %{z:+.4g}<extra></extra>")
    small = f"score {s.product:.4g}, of which {float(values.sum()):.4g} is shown · attention {s.attention:.2g}"
    figure.update_layout(
        title_text=f"{figure.layout.title.text}<br><sup>{small}</sup>",
        xaxis_title="source at the key's position",
        yaxis_title="source at the query's position",
        margin_l=60 + 8 * max(map(len, rows), default=0),
        margin_b=60 + 8 * max(map(len, columns), default=0),
    )
    return figure
