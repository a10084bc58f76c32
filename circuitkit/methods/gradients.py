"""Shared by the gradient methods: first-order edge scores with the gradient averaged along a path of inputs.

    score(u -> v) = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * sum_k w_k dM/dx_v at e_k
    e_k           = e(corrupt) + alpha_k (e(clean) - e(corrupt))      e: what the input writes to the stream

Cost: one forward pass for each of clean and corrupt, and one forward and backward pass per node of the path.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.circuit import Scores
from circuitkit.errors import MetricError
from circuitkit.functional.attribution import edge_scores
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
from circuitkit.models.edits import reader_gradients
from circuitkit.models.hooked import Model, Run
from circuitkit.tasks.base import Batch, Task


def path_scores(
    model: Model, task: Task, plan: Plan, *, alphas: list[float], weights: list[float], corrupt_value: str
) -> Scores:
    """Edge scores with the gradient taken at the given points of the path and averaged with the given weights.

    Raises:
        MetricError: if the metric has no gradient, or a zero one although corrupting the input changes it.
    """
    if not task.metric.differentiable:
        raise MetricError(
            f"metric {task.metric.name!r} has no useful gradient; use another metric, or the method 'exact'"
        )
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    at_once = max(1, min(len(alphas), plan.rows(backward_bytes(model, task.batches[0]), model.device)))
    moments, slope, moved = Moments(), 0.0, False

    def size(batch: Batch) -> float:
        return matrix_bytes(model, batch) + at_once * backward_bytes(model, batch)

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, float, bool]:
        steps = min(at_once, plan.rows(backward_bytes(model, batch), model.device))
        return _chunk_scores(model, task, batch, corrupt_of, alphas, weights, steps)

    for scores, steepest, differs in plan.over(task, model.device, "edge scores", size, one_chunk):
        moments.add(scores)
        slope, moved = max(slope, steepest), moved or differs
    if moved and slope < 1e-6:
        raise MetricError(
            f"the gradient of {task.metric.name!r} is zero at the points where it was taken (KL and squared "
            "errors are flat at the clean run); use 'eap-ig', 'exact', or another metric"
        )
    return finished(model, moments)


def _chunk_scores(
    model: Model,
    task: Task,
    batch: Batch,
    corrupt_of: CorruptWrites,
    alphas: list[float],
    weights: list[float],
    at_once: int,
) -> tuple[Float[Tensor, "batch src dst"], float, bool]:
    """Scores of a chunk of examples, the steepest slope at the logits, and whether clean and corrupt differ at all."""
    run, corrupt, clean = _ends(model, task, batch, corrupt_of, alphas)
    batch = with_reference(model, task, batch, run)
    begin, end = corrupt[0].flatten(2), clean[0].flatten(2)
    delta, scores, slope = None, torch.empty(0), 0.0
    for first in range(0, len(alphas), at_once):
        part = slice(first, first + at_once)
        x = torch.stack([begin + alpha * (end - begin) for alpha in alphas[part]])
        objective = partial(_objective, task, batch, weights[part])
        writes, groups = reader_gradients(model, run, x, batch.positions, objective)
        if delta is None:
            delta = model.wiring.expand_difference(writes if len(clean) == 1 else clean, corrupt)
            scores = delta.new_zeros(len(batch), *model.graph.mask.shape)
        for columns, gradient in groups:
            n = int(model.graph.mask[:, columns].any(1).nonzero().max()) + 1
            scores[:, :n, columns] += edge_scores(delta[:n], gradient)
            if columns.stop == len(model.graph.destinations):
                slope = max(slope, float(gradient.abs().max()))
    return scores, slope, bool((end != begin).any())


def _ends(
    model: Model, task: Task, batch: Batch, corrupt_of: CorruptWrites, alphas: list[float]
) -> tuple[Run, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A run whose calls can be repeated, and the writes of the corrupt and of the clean end.

    Where the gradient itself is taken at the clean end, that pass also shows what is written there: only the input's
    write is needed beforehand, and a forward pass is saved.
    """
    if corrupt_of is None and alphas == [1.0] and "reference" not in task.metric.needs:
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
