"""Shared by the gradient methods: first-order edge scores with the gradient averaged along a path of inputs.

    score(u -> v) = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * sum_k w_k dM/dx_v at e_k
    e_k           = e(corrupt) + alpha_k (e(clean) - e(corrupt))      e: what the input writes to the stream

Cost: one forward pass for each of clean and corrupt, and one forward and backward pass per node of the path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.circuit import Scores
from circuitkit.errors import MetricError
from circuitkit.functional.attribution import edge_scores
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import (
    Plan,
    backward_bytes,
    corrupt_writes,
    finished,
    matrix_bytes,
    with_reference,
)
from circuitkit.models.edits import reader_gradients
from circuitkit.models.hooked import Model
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
    moments, slope = Moments(), 0.0
    at_once = max(1, min(len(alphas), plan.rows(backward_bytes(model, task.batches[0]), model.device)))

    def size(batch: Batch) -> float:
        return matrix_bytes(model, batch) + at_once * backward_bytes(model, batch)

    for batch in plan.chunks(task, size, model, "edge scores"):
        run = model.record(batch.clean)
        batch = with_reference(model, task, batch, run)
        corrupt = corrupt_of(batch, run)
        delta = model.wiring.expand_difference(run.writes, corrupt)
        scores = delta.new_zeros(len(batch), *model.graph.mask.shape)
        start, end = corrupt[0].flatten(2), run.writes[0].flatten(2)
        for first in range(0, len(alphas), at_once):
            part = slice(first, first + at_once)
            x = torch.stack([start + alpha * (end - start) for alpha in alphas[part]])

            def objective(logits: Tensor, batch: Batch = batch, part: slice = part) -> Tensor:
                values = task.metric(logits, _repeated(batch, len(weights[part])))
                steps = values.unflatten(0, (-1, len(batch))).sum(1)
                return steps @ steps.new_tensor(weights[part])

            for columns, gradient in reader_gradients(model, run, x, batch.positions, objective):
                n = int(model.graph.mask[:, columns].any(1).nonzero().max()) + 1
                scores[:, :n, columns] += edge_scores(delta[:n], gradient)
                slope = max(slope, float(gradient.abs().max()))
        moments.add(scores)
    if slope < 1e-6 and bool((delta != 0).any()):
        raise MetricError(
            f"the gradient of {task.metric.name!r} is zero at the points where it was taken (KL is flat at the clean "
            "run); use 'eap-ig', 'exact', or another metric"
        )
    return finished(model, moments)


def _repeated(batch: Batch, times: int) -> Batch:
    return batch.rows(torch.arange(len(batch), device=batch.clean.device).repeat(times))
