"""Exact edge patching: run the model once for every edge, with only that edge carrying its corrupt value.

    score(u -> v) = M(clean) - M(clean, with x_v replaced by x_v - (a_u(clean) - a_u(corrupt)))

The ground truth that gradient methods estimate, one edge at a time; joint effects (backup heads, AND and OR) are not in
it. Cost: one replay per edge from the reader's block on; edges are rows of a batch, logits are computed at the answer
positions only, and the corrupt run is shared by all.
Reference: Wang et al. 2023, arXiv:2211.00593 (path patching), restricted to direct edges; Miller et al. 2024.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.functional.stats import Moments
from circuitkit.methods.base import (
    EVERY_FAMILY,
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
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task


@method("exact", families=EVERY_FAMILY)
def exact(model: Model, task: Task, *, plan: Plan, corrupt_value: str = "counterfactual") -> Scores:
    """Score every edge by patching it."""
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    moments = Moments()
    with plan.bar(len(task) * model.graph.n_edges, "edges") as bar:

        def one_chunk(batch: Batch, plan: Plan) -> Float[Tensor, "batch src dst"]:
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch = with_reference(model, task, batch, run)
            clean = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
            scores = clean.new_zeros(len(batch), *model.graph.mask.shape)
            # A replay without gradients holds less, but small batches are faster on a CPU.
            rows = plan.rows(backward_bytes(model, batch) / 2, model.device)
            for edges, logits, changed in model.patched_edges(run, corrupt, batch.positions, rows):
                many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(edges)))
                patched = task.metric(logits.flatten(0, 1), many).unflatten(0, (len(edges), len(batch)))
                src, dst = torch.tensor(edges).T
                scores[:, src, dst] = torch.where(changed, clean - patched, 0.0).T.to(scores.dtype)
                bar.update(len(edges) * len(batch))
            return scores

        silent = replace(plan, progress=False)
        for scores in silent.over(task, model.device, "", lambda b: matrix_bytes(model, b), one_chunk):
            moments.add(scores)
    return finished(model, moments)
