"""Local-exact edge attribution: the reader's own nonlinearity exact, what comes behind it to first order.

    score(u -> v)      = sum over pos, width of  (w(clean) - w(x_v - (a_u(clean) - a_u(corrupt)))) * dM/dw (clean)
    score(u -> logits) = M(clean) - M(x - (a_u(clean) - a_u(corrupt)))

w is what v feeds: for a query, key or value the head's z, norm, soft cap and softmax included; for an MLP its output. A
key or value that several heads share counts through all of them.

Attention that is saturated at the clean run has no gradient left, so ``eap`` misses what a query or key does there;
here the softmax is run. Wrong where a later block is far from linear in what the head writes, and where effects cancel
downstream. The metric must have a gradient at the clean run, so KL is refused.
Cost: two forward passes, one backward pass, and for every block and every writer before it three passes of its
attention and one of the whole block, whatever the number of heads; heads are edited at once, writers are rows.
Reference: none for all edges. Kramár et al. 2024, arXiv:2403.00745, do it for query and key nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import backward_bytes, clean_and_corrupt, corrupt_writes, finished, matrix_bytes, method
from circuitkit.methods.grad_drop import clean_slopes, flatness
from circuitkit.methods.gradients import refuse_flat, refuse_without_gradient
from circuitkit.methods.plan import Plan
from circuitkit.models.edits import patch_edges
from circuitkit.models.hooked import Model, Run
from circuitkit.models.local import check_heads_are_independent, inner_sites, local_scores
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task


@method("local-exact")
def local_exact(model: Model, task: Task, *, plan: Plan, corrupt_value: str = "counterfactual") -> Scores:
    """Score every edge by what it changes in what its reader feeds.

    Raises:
        MetricError: if the metric has no gradient at the clean run.
        UnsupportedModel: if the heads of a layer depend on each other's queries, keys or values.
    """
    refuse_without_gradient(task, at_clean=True)
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    check_heads_are_independent(model, model.record(task.batches[0].clean[:1]))
    moments, changes = Moments(), list[tuple[float, float]]()
    sites = list(inner_sites(model))

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, tuple[float, float]]:
        run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
        delta = model.wiring.expand_difference(run.writes, corrupt)
        end = model.wiring.final
        slopes = clean_slopes(model, task, batch, run, [*(written.port for _, written in sites), end])
        scores = delta.new_zeros(len(batch), *model.graph.mask.shape)
        for site, written in sites:
            slope = slopes[written.port][1].reshape(1, *batch.clean.shape, written.n, -1)
            found = local_scores(model, run, site, written, slope, delta, edits_at_once(model, batch, plan))
            scores[:, : found.shape[2], site.columns] = found[0]
        scores[:, :, -1] = scores_to_logits(model, task, batch, run, delta, plan)
        last = at_least_float32(run.inputs[-1])
        return scores, flatness(task, batch, model, run, last - delta.sum(0), slopes[end][1])

    for scores, change in plan.over(task, model.device, "edge scores", lambda b: edit_bytes(model, b), one_chunk):
        moments.add(scores)
        changes.append(change)
    refuse_flat(task, changes)
    return finished(model, moments)


def edit_bytes(model: Model, batch: Batch) -> float:
    """Bytes per example of all writes and of a backward pass."""
    return matrix_bytes(model, batch) + backward_bytes(model, batch)


def edits_at_once(model: Model, batch: Batch, plan: Plan) -> int:
    """How many edits of one block fit: a pass of a block holds no more than its share of a backward pass."""
    per_row = backward_bytes(model, batch) / len(model.wiring.blocks)
    return max(1, plan.rows(per_row, model.device) // len(batch))


def scores_to_logits(
    model: Model, task: Task, batch: Batch, run: Run, delta: Tensor, plan: Plan
) -> Tensor:  # [batch, src]
    """Exact scores of the edges into the logits: there is nothing behind them to be linear in."""
    site = model.wiring.read_sites[-1]
    clean = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
    scores = delta.new_zeros(len(batch), len(delta))
    size = max(1, int(plan.rows(4.0 * batch.clean.shape[1] * delta.shape[-1] * 4, model.device)) // len(batch))
    for first in range(0, len(delta), size):
        edges = [(u, site.first) for u in range(first, min(first + size, len(delta)))]
        logits, changed = patch_edges(model, run, delta, site, edges, batch.positions)
        many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(edges)))
        patched = task.metric(logits.flatten(0, 1), many).unflatten(0, (len(edges), len(batch)))
        scores[:, first : first + len(edges)] = torch.where(changed, clean - patched, 0.0).T.to(scores.dtype)
    return scores
