"""Shared by the gradient methods: first-order edge scores with the gradient averaged along a path of inputs.

    score(u -> v) = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * sum_k w_k dM/dx_v at e_k
    e_k           = e(corrupt) + alpha_k (e(clean) - e(corrupt))      e: what the input writes to the stream

Cost: one forward pass for each of clean and corrupt, and one forward and backward pass per node of the path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import MetricError
from circuitkit.functional.norms import at_least_float32
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import (
    CorruptWrites,
    backward_bytes,
    clean_and_corrupt,
    corrupt_writes,
    finished,
    matrix_bytes,
    with_reference,
)
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task

SMALL = 1e-3  # scores below this are compared with the metric's own change


def path_scores(
    model: Model,
    task: Task,
    plan: Plan,
    *,
    alphas: list[float],
    weights: list[float],
    corrupt_value: str,
    gradients: Callable[..., Any] | None = None,
) -> Scores:
    """Edge scores with the gradient taken at the given points of the path and averaged with the given weights.

    Args:
        gradients: what takes the gradient: the model's ``edge_slopes``, or another backward pass of a transformer.

    Raises:
        MetricError: if the metric has no gradient, or a zero one although corrupting the input changes it.
    """
    refuse_without_gradient(task, at_clean=alphas == [1.0])
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    at_once = max(1, min(len(alphas), plan.rows(backward_bytes(model, task.batches[0]), model.device)))
    moments, changes = Moments(), list[tuple[float, float]]()

    def size(batch: Batch) -> float:
        return matrix_bytes(model, batch) + at_once * backward_bytes(model, batch)

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, tuple[float, float] | None]:
        steps = min(at_once, plan.rows(backward_bytes(model, batch), model.device))
        return _chunk_scores(model, task, batch, corrupt_of, alphas, weights, steps, gradients)

    for chunk, change in plan.over(task, model.device, "edge scores", size, one_chunk):
        moments.add(chunk)
        changes += [] if change is None else [change]
    if changes:
        refuse_flat(task, changes)
    return finished(model, moments)


def refuse_without_gradient(task: Task, *, at_clean: bool, instead: Sequence[str] = ("eap-ig", "exact")) -> None:
    """Refuse a metric that has no gradient anywhere, or, for methods that use no other, none at the clean run.

    Args:
        at_clean: whether the only gradient that the method takes is at the clean run.
        instead: names of methods that do without it; the last one needs no gradient at all.

    Raises:
        MetricError: naming the metric and what to do.
    """
    if not task.metric.differentiable:
        raise MetricError(
            f"metric {task.metric.name!r} has no useful gradient; use another metric, or the method {instead[-1]!r}"
        )
    if at_clean and "reference" in task.metric.needs:
        raise MetricError(
            f"the gradient of {task.metric.name!r} at the clean run is zero by definition: it compares with that run; "
            f"use {', '.join(map(repr, instead))}, or another metric"
        )


def _chunk_scores(
    model: Model,
    task: Task,
    batch: Batch,
    corrupt_of: CorruptWrites,
    alphas: list[float],
    weights: list[float],
    at_once: int,
    gradients: Callable[..., Any] | None,
) -> tuple[Float[Tensor, "batch src dst"], tuple[float, float] | None]:
    run, corrupt, clean = _ends(model, task, batch, corrupt_of, alphas)
    batch = with_reference(model, task, batch, run)
    begin, end = corrupt[0].flatten(2), clean[0].flatten(2)
    delta, scores = None, torch.empty(0)
    for first in range(0, len(alphas), at_once):
        part = slice(first, first + at_once)
        x = torch.stack([begin + alpha * (end - begin) for alpha in alphas[part]])
        objective = partial(_objective, task, batch, weights[part])
        take = model.edge_slopes if gradients is None else partial(gradients, model)
        writes, slopes = take(run, x, batch.positions, objective)
        if delta is None:
            delta = model.write_difference(writes if len(clean) == 1 else clean, corrupt)
            scores = at_least_float32(x[:0]).new_zeros(len(batch), *model.graph.mask.shape)
        model.add_scores(scores, delta, slopes)
    if alphas != [1.0]:
        return scores, None
    largest = max(abs(float(end)) for end in scores.aminmax())
    if largest > SMALL:
        return scores, (largest, 0.0)
    if len(clean) > 1:
        nothing = torch.zeros(1, *model.graph.mask.shape, dtype=torch.bool)
        there = task.metric(model.run_circuits(run, corrupt, nothing, batch.positions)[0], batch)
        here = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
    else:
        ends = (model.record(batch.clean), run)
        here, there = (task.metric(model.logits(end.inputs[-1], batch.positions), batch) for end in ends)
    return scores, (largest, float((here - there).abs().max()))


def refuse_flat(task: Task, changes: list[tuple[float, float]], instead: Sequence[str] = ("eap-ig", "exact")) -> None:
    """Refuse scores whose sizes are rounding: first-order effects far below the metric's own change, on all examples.

    Metrics have no natural scale, so the change is measured, but only where scores are small; the outcome does not
    depend on how the examples were cut into chunks.
    """
    largest, change = (max(values) for values in zip(*changes, strict=True))
    if largest <= SMALL and largest < 1e-4 * change:
        raise MetricError(
            f"the gradient of {task.metric.name!r} is zero at the clean run (squared errors are flat there); "
            f"use {', '.join(map(repr, instead))}, or another metric"
        )


def _ends(
    model: Model, task: Task, batch: Batch, corrupt_of: CorruptWrites, alphas: list[float]
) -> tuple[Run, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A run whose calls can be repeated, and the writes of the corrupt and of the clean end.

    Where the gradient itself is taken at the clean end, that pass also shows what is written there: only the input's
    write is needed beforehand, and a forward pass is saved.
    """
    if corrupt_of is None and alphas == [1.0]:
        run = model.record(batch.corrupt)
        return run, run.writes, (model.start(batch.clean)[:, :, None],)
    run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
    return run, corrupt, run.writes


def _objective(task: Task, batch: Batch, weights: list[float], logits: Tensor) -> Tensor:
    values = task.metric(logits, _repeated(batch, len(weights)))
    steps = values.unflatten(0, (-1, len(batch))).sum(1)
    return steps @ steps.new_tensor(weights)


def _repeated(batch: Batch, times: int) -> Batch:
    return batch.rows(torch.arange(len(batch), device=batch.clean.device).repeat(times))
