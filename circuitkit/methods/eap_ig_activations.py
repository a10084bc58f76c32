"""Edge attribution patching with integrated gradients over activations: every edge along its own writer's path.

    score(u -> v) = integral over alpha in [0, 1] of  d M / d keep[u, v]   at keep[u, :] = alpha, all other edges whole
                  ~ sum over pos, d of  (a_u(clean) - a_u(corrupt)) * sum_k w_k dM/dx_v (alpha_k)

where dM/dx_v (alpha) is taken in the run in which u writes a_u(corrupt) + alpha (a_u(clean) - a_u(corrupt)). So the
scores of each writer add up to M(clean) - M(clean, with all that u writes corrupt), up to the quadrature's error.
Wrong where two writers do the same job: each path leaves the other writer whole. Points between two activations are
ones that the model was not trained on.
Cost: a forward and backward pass per writer and step, from the writer's block on; both are stacked on the batch axis.
Reference: Hanna, Pezzelle and Belinkov 2024, arXiv:2403.17806. Deviation: its code takes the gradient for every edge
on the path of every group of components (the input, all heads of a layer, an MLP) and averages them all, so that an
edge's score is mostly made of paths of other components; here only the path of its own writer counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import MetricError, OptionError
from circuitkit.functional.attribution import QUADRATURES, quadrature
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import (
    backward_bytes,
    clean_and_corrupt,
    corrupt_writes,
    finished,
    matrix_bytes,
    method,
    with_reference,
)
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.models.wiring import WriteSite
from circuitkit.models.writers import moved_gradients
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task


@method("eap-ig-activations")
def eap_ig_activations(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    steps: int = 5,
    rule: str = "midpoint",
    corrupt_value: str = "counterfactual",
) -> Scores:
    """Score every edge along the path on which its own writer turns from corrupt to clean.

    Raises:
        OptionError: if steps is less than 1 or the rule is unknown.
        MetricError: if the metric has no gradient.
    """
    if type(steps) is not int or steps < 1:
        raise OptionError(f"got steps = {steps!r}, expected a whole number of at least 1 (5 is usual)")
    if rule not in QUADRATURES:
        raise OptionError(f"got rule = {rule!r}, expected one of {', '.join(QUADRATURES)}")
    if not task.metric.differentiable:
        raise MetricError(
            f"metric {task.metric.name!r} has no useful gradient; use another metric, or the method 'exact'"
        )
    nodes = torch.tensor(quadrature(rule, steps), dtype=torch.float64)
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    moments = Moments()
    with plan.bar(len(task) * len(model.graph.sources), "writers") as bar:

        def one_chunk(batch: Batch, plan: Plan) -> Float[Tensor, "batch src dst"]:
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch = with_reference(model, task, batch, run)
            delta = model.wiring.expand_difference(run.writes, corrupt)
            scores = delta.new_zeros(len(batch), *model.graph.mask.shape)
            at_once = max(1, plan.rows(backward_bytes(model, batch), model.device) // len(batch))
            for site, writers, part in _pieces(model, steps, at_once):
                n, apart = writers.stop - writers.start, delta[writers].flatten(0, 1)
                alphas, weights = nodes[:, part].to(apart)
                rows = torch.arange(len(batch), device=apart.device).repeat(n)
                shift = (alphas[:, None, None, None] - 1) * apart
                objective = partial(_objective, task, batch.rows(rows.repeat(len(alphas))), weights)
                for columns, slope in moved_gradients(model, run, site, shift, rows, batch.positions, objective):
                    part_scores = torch.einsum("rpd,nrpd->rn", apart, slope).unflatten(0, (n, len(batch)))
                    scores[:, writers, columns] += part_scores.transpose(0, 1)
                bar.update(len(batch) * n if part.stop >= steps else 0)
            return scores

        silent = replace(plan, progress=False)
        for scores in silent.over(task, model.device, "", lambda b: matrix_bytes(model, b), one_chunk):
            moments.add(scores)
    return finished(model, moments)


def _pieces(model: Model, steps: int, at_once: int) -> Iterator[tuple[WriteSite, slice, slice]]:
    """Writers of one site and steps of their path that are run together: at most ``at_once`` of both."""
    some, most = max(1, at_once // steps), min(steps, at_once)
    for site in model.wiring.write_sites:
        for first in range(site.rows.start, site.rows.stop, some):
            for step in range(0, steps, most):
                yield site, slice(first, min(first + some, site.rows.stop)), slice(step, min(step + most, steps))


def _objective(task: Task, batch: Batch, weights: Tensor, logits: Tensor) -> Tensor:
    return weights @ task.metric(logits, batch).unflatten(0, (len(weights), -1)).sum(1).to(weights)
