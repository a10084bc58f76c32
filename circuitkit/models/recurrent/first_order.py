"""First-order edge scores of a recurrent network.

    score(u -> v) = W[v, u] * sum over steps t of the edge's window, and numbers, of
                    (a_u(clean) - a_u(corrupt))(t - lag) * dM/dr_v(t)

The gradient at every pre-activation comes from one backward pass through the steps; then all edges of a link are one
matrix product over the steps. Weight-tied edges have the sum of their steps' scores, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import MetricError
from circuitkit.models.recurrent.parts import FEATURES, Link, Slot, Stage, Weights
from circuitkit.models.recurrent.stepper import Values, rows_of, run_network, shifted
from circuitkit.models.recurrent.view import View, links_of


def slot_slopes(
    view: View,
    x: Float[Tensor, "row step size"],
    objective: Callable[[Tensor], Tensor],
    *,
    segment: int | None = None,
) -> tuple[Values, dict[Slot, Float[Tensor, "row step _"]]]:
    """All writes of a run, and the gradient of an objective at every pre-activation.

    Args:
        objective: from what the read-out reads to one number.
        segment: steps between checkpoints of the backward pass, or None for none.

    Raises:
        MetricError: if the objective does not depend on what the network gives.
    """
    network = view.network
    slots = [slot for _, stage in network.stages for slot in stage.slots]
    with torch.enable_grad():
        probes = {slot: x.new_zeros(*x.shape[:2], slot.size, requires_grad=True) for slot in slots}
        values = run_network(network, x, probes=probes, segment=segment)
        goal = objective(values[FEATURES])
        if not goal.requires_grad:
            raise MetricError("the metric does not depend on the logits, so it has no gradient")
        found = torch.autograd.grad(goal, list(probes.values()), allow_unused=True, materialize_grads=True)
    return {name: value.detach() for name, value in values.items()}, dict(zip(slots, found, strict=True))


def add_scores(
    view: View,
    scores: Float[Tensor, "batch src dst"],
    delta: Mapping[str, Float[Tensor, "_ _ _"]],
    slopes: Mapping[Slot, Float[Tensor, "_ _ _"]],
) -> None:
    """Add the score of every edge on every example.

    Args:
        delta: clean minus corrupt writes, in the basis of their writers.
        slopes: the gradient at every slot.
    """
    weights = Weights.of(view.network, next(iter(delta.values())))
    out = scores.unflatten(1, view.shape[:2]).unflatten(3, view.shape[2:])
    for block, stage, link in links_of(view.network):
        gap = delta[link.source]
        gap = shifted(gap, link.lag, torch.zeros_like(gap[0, 0]), reverse=block.reverse)
        slope = torch.cat([slopes[stage.slot(name)] for name in link.slots], -1)
        for ws, wd, steps in view.pairs(gap.shape[1], link.lag, reverse=block.reverse):
            whole = len(steps) == gap.shape[1]
            part = (gap, slope) if whole else (gap[:, steps], slope[:, steps])
            _add_link(view, stage, link, *part, weights, out[:, ws, :, wd])


def _add_link(
    view: View,
    stage: Stage,
    link: Link,
    gap: Tensor,
    slope: Tensor,
    weights: Weights,
    out: Float[Tensor, "batch src dst"],
) -> None:
    """Add the scores of a link's edges in one pair of windows, summed within nodes."""
    matrix = weights.links[link]
    rows = view.writer_of[link.source]
    if link.source in view.bases:
        basis = view.bases[link.source].T.to(gap)
        matrix = basis if matrix is None else basis @ matrix
    for slot, part in rows_of(stage, link):
        columns = view.reader_of[slot]
        if matrix is None:
            own = (gap * slope[..., part]).sum(1)
            place = (rows * out.shape[2] + columns).to(gap.device)
            flat = torch.zeros_like(out).flatten(1).index_add_(1, place, own.to(out.dtype))
            out += flat.view(out.shape)
            continue
        each = (gap.transpose(1, 2) @ slope[..., part]) * matrix[:, part]
        _spread(out, rows, columns, each.to(out.dtype))


def _spread(out: Tensor, rows: Tensor, columns: Tensor, each: Float[Tensor, "batch number number"]) -> None:
    """Add numbers at their nodes; where every number is a node of its own they are simply laid down."""
    if _in_order(rows) and _in_order(columns):
        out[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] += each
        return
    narrow = each.new_zeros(len(each), out.shape[1], each.shape[2]).index_add_(1, rows.to(each.device), each)
    out.index_add_(2, columns.to(each.device), narrow)


def _in_order(numbers: Tensor) -> bool:
    return int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1 and bool((numbers.diff() == 1).all())
