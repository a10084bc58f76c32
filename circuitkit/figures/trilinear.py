"""Trilinear coefficients of a gated recurrent network, and how long its units remember."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitkit.drawing import PALETTE
from circuitkit.figures.base import dressed
from circuitkit.figures.heatmap import position_heatmap

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitkit.analysis.trilinear import Trilinear
    from circuitkit.analysis.unit_importance import UnitImportance


def coefficient_maps(form: Trilinear) -> go.Figure:
    """All coefficients as one grid: outputs and queries down, pairs of inputs in the memory across.

    >>> import torch
    >>> from circuitkit.analysis.trilinear import Trilinear
    >>> coefficient_maps(Trilinear(torch.ones(1, 2, 2, 2))).data[0].z.shape
    (2, 3)
    """
    outputs, d = form.coefficients.shape[:2]
    pairs = [(i, j) for i in range(d) for j in range(i, d)]
    values = form.coefficients.detach()[:, [i for i, _ in pairs], [j for _, j in pairs]]
    rows = [f"y{o} · x{k}(t)" for o in range(outputs) for k in range(d)]
    columns = [f"x{i} x{j}" for i, j in pairs]
    figure = position_heatmap(values.transpose(1, 2).flatten(0, 1), rows, columns, "trilinear coefficients")
    figure.update_traces(colorbar_title_text="coefficient")
    figure.update_layout(xaxis_title="product in the memory, summed over steps s ≤ t", yaxis_title="output · query")
    return figure


def coefficients_against(form: Trilinear, teacher: Trilinear) -> go.Figure:
    """Each coefficient against the teacher's, with the line on which they are equal.

    >>> import torch
    >>> from circuitkit.analysis.trilinear import Trilinear
    >>> form = Trilinear(torch.ones(1, 2, 2, 2))
    >>> len(coefficients_against(form, form).data[1].x)
    8
    """
    import plotly.graph_objects as go

    x, y = (f.coefficients.detach().flatten().double().cpu() for f in (teacher, form))
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(x=ends, y=ends, mode="lines", name="equal", line={"color": PALETTE["muted"], "width": 1})
    )
    figure.add_trace(
        go.Scatter(
            x=x.tolist(),
            y=y.tolist(),
            mode="markers",
            name="coefficient",
            marker={"color": PALETTE["positive"], "size": 7, "opacity": 0.7},
            hovertemplate="teacher %{x:.4f}<br>student %{y:.4f}<extra></extra>",
        )
    )
    error = form.relative_error(teacher)
    second = f"cosine {form.cosine(teacher):.5f} · relative error {error:.2g} · the form's R² {form.r2:.5f}"
    return dressed(
        figure, "is it attention? trilinear coefficients", second, x="teacher's coefficient", y="fitted coefficient"
    )


def decay_histogram(units: UnitImportance, *, bins: int = 20) -> go.Figure:
    """Share of the units, and of the importance, by how much of the state is kept from step to step.

    >>> import torch
    >>> from circuitkit.analysis.unit_importance import UnitImportance
    >>> units = UnitImportance(("a", "b"), torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]), 0.0)
    >>> decay_histogram(units, bins=2).data[1].y
    (0.25, 0.75)
    """
    import plotly.graph_objects as go

    edges, counted, weighed = units.histogram(bins)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    figure = go.Figure()
    for name, shares, colour in (
        ("units, counted", counted, PALETTE["random"]),
        ("units, weighted by importance", weighed, PALETTE["positive"]),
    ):
        bar = "decay %{x:.3f}: %{y:.3f}<extra>" + name + "</extra>"
        figure.add_trace(go.Bar(x=middles, y=shares.tolist(), name=name, marker={"color": colour}, hovertemplate=bar))
    second = f"{len(units.names):,} units · importance: rise of the NMSE without the unit · NMSE {units.nmse:.2g}"
    figure = dressed(
        figure,
        "how long do the units that matter remember?",
        second,
        x="decay |λ| (share of the state kept per step)",
        y="share",
    )
    return figure.update_xaxes(range=[0, 1])
