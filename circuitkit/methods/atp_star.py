"""Attribution patching with its two known blind spots treated: saturated attention, and cancelling paths.

    score(n) = 1 / (L - 1) * sum over blocks l of |mean over examples of effect_l(n)|
    effect_l(n) = sum over pos, width of  (a_n(clean) - a_n(corrupt)) * g_l(a_n)            heads, MLPs, values
    effect_l(n) = sum over pos, width of  (z(clean) - z(with n's query or key corrupt)) * g_l(z)      queries, keys

g_l is dM/d. at the clean run without what flows back through the writes of block l (GradDrop). L - 1 of the L passes
count, because the one that cuts n's own block shows 0; the stream, which is in no block, has L. With one block there is
nothing to drop. For queries and keys the softmax is run: with clean values, (z - z').dM/dz is the same number as
(A - A').dM/dA of the pattern A, which the paper uses. A key that several heads share counts through all of them.

Magnitudes only; the standard error is an upper bound, the mean of those of the passes. Without a cancellation, dropping
paths moves the score away from the effect. Wrong where an effect is nonlinear behind the head, as in a dead ReLU:
``circuitkit.evaluation.missed`` bounds what a ranking may have missed.
Cost: three forward passes, L forward and backward passes, and for queries and keys one attention per block (for keys
with ``per_position``, one per position).
Reference: Kramár et al. 2024, arXiv:2403.00745. Deviations: a table per kind of node; the magnitude is that of the mean
over examples, so that it estimates the magnitude of what ``activation-patching`` gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.methods.base import method
from circuitkit.methods.local_exact import edits_at_once
from circuitkit.methods.node_gradients import Chunk, node_scores
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.models.local import check_heads_are_independent, inner_sites, replaced_reads
from circuitkit.models.sites import Place
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Task


@method("atp-star", level="node")
def atp_star(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    site: str = "head",
    per_position: bool = False,
    grad_drop: bool = True,
    corrupt_value: str = "counterfactual",
) -> NodeScores:
    """Score every node of one kind by AtP*.

    Raises:
        OptionError: for an unknown site or corrupt value, or a site that the model lacks.
        MetricError: if the metric has no gradient at the clean run.
        UnsupportedModel: if the heads of a layer depend on each other's queries or keys.
    """
    softmax = site in ("q", "k")
    if softmax:
        check_heads_are_independent(model, model.record(task.batches[0].clean[:1]))
    return node_scores(
        model, task, plan, site=site, per_position=per_position, corrupt_value=corrupt_value, signed=False,
        grad_drop=grad_drop, effect=_through_softmax if softmax else None,
        also=[written.port for _, written in inner_sites(model)] if softmax else (),
    )  # fmt: skip


def _through_softmax(chunk: Chunk, i: int, place: Place) -> list[Tensor]:
    """Effects of queries by query position, of keys by key position (or, all together, by the position they reach)."""
    model, n_pos = chunk.model, chunk.batch.clean.shape[1]
    site, written = next(pair for pair in inner_sites(model) if pair[0].port is place.port)
    feeds = model.graph.feeds[site.columns, written.rows]
    slopes = [
        at_least_float32(s[written.port][1]).reshape(len(chunk.batch), n_pos, written.n, -1) for s in chunk.slopes
    ]
    clean = place.by_node(chunk.slopes[0][place.port][0])  # type: ignore[index]
    corrupt = chunk.corrupt[i][..., :n_pos, :, :].to(clean).expand_as(clean)
    if site_slot(model, site.first) == "q" or not chunk.per_position:
        change = replaced_reads(model, chunk.run, site, written, corrupt[None])[0]
        return [(change * slope).sum(-1) @ feeds.T.to(change) for slope in slopes]
    found: list[list[Tensor]] = [[] for _ in slopes]
    for some in torch.arange(n_pos, device=clean.device).split(edits_at_once(model, chunk.batch, chunk.plan)):
        here = some[:, None] == torch.arange(n_pos, device=clean.device)
        values = torch.where(here[:, None, :, None, None], corrupt, clean)
        change = replaced_reads(model, chunk.run, site, written, values)
        for part, slope in zip(found, slopes, strict=True):
            part.append((change * slope).sum((2, 4)).transpose(0, 1) @ feeds.T.to(change))
    return [torch.cat(part, 1) for part in found]


def site_slot(model: Model, column: int) -> str | None:
    """What the reader of a column reads for."""
    return model.graph.destination_nodes[column].slot
