"""AtP* for edges: query and key edges through the softmax, all others to first order, with paths dropped in turn.

    score(u -> v) = 1 / (L - 1) * sum over blocks l of |mean over examples of effect_l(u -> v)|
    effect_l      = sum over pos, width of  (z(clean) - z(x_v - (a_u(clean) - a_u(corrupt)))) * g_l(z)   queries, keys
    effect_l      = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * g_l(x_v)                           all others

g_l is dM/d. at the clean run without what flows back through the writes of block l (GradDrop); the pass that cuts v's
own block shows 0 and does not count, and none cuts the logits, for which all L do. With one block there is nothing to
drop. Query and key edges are those of ``local-exact`` before magnitudes are taken; plain edge AtP is ``eap``.

Magnitudes only; the standard error is an upper bound, the mean of those of the passes. Without a cancellation, dropping
paths moves scores away from the effects (with two blocks only direct effects are left), so rank by ``local-exact``
unless you look for what it may miss.
Cost: two forward passes, L forward and backward passes, and for every block and every writer before it two passes of
its attention.
Reference: Kramár et al. 2024, arXiv:2403.00745, whose nodes these edges replace. Deviation: the magnitude is that of
the mean over examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import clean_and_corrupt, corrupt_writes, matrix_bytes, method
from circuitkit.methods.grad_drop import clean_slopes, flatness, passes, worth_of_passes
from circuitkit.methods.gradients import refuse_flat, refuse_without_gradient
from circuitkit.methods.local_exact import edit_bytes, edits_at_once
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.models.local import check_heads_are_independent, inner_sites, linear_scores, local_scores
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task


@method("atp-star-edges")
def atp_star_edges(
    model: Model, task: Task, *, plan: Plan, grad_drop: bool = True, corrupt_value: str = "counterfactual"
) -> Scores:
    """Score every edge by AtP*.

    Raises:
        MetricError: if the metric has no gradient at the clean run.
        UnsupportedModel: if the heads of a layer depend on each other's queries or keys.
    """
    refuse_without_gradient(task, at_clean=True)
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    check_heads_are_independent(model, model.record(task.batches[0].clean[:1]))
    moments, changes = Moments(), list[tuple[float, float]]()
    cuts = passes(model, grad_drop)

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, tuple[float, float]]:
        run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
        delta = model.wiring.expand_difference(run.writes, corrupt)
        return _effects(model, task, batch, plan, run, delta, cuts)

    def size(batch: Batch) -> float:
        return edit_bytes(model, batch) + len(cuts) * matrix_bytes(model, batch)

    for effects, change in plan.over(task, model.device, "edge scores", size, one_chunk):
        moments.add(effects)
        changes.append(change)
    refuse_flat(task, changes)
    return _magnitudes(model, moments, cuts)


def _effects(
    model: Model, task: Task, batch: Batch, plan: Plan, run: Run, delta: Tensor, cuts: list[int | None]
) -> tuple[Tensor, tuple[float, float]]:
    """Effects in every pass, [batch, pass, src, dst], and what tells whether the metric is flat."""
    nodes, end = model.graph.destination_nodes, model.wiring.final
    softmax = {s: w for s, w in inner_sites(model) if nodes[s.first].slot in ("q", "k")}
    linear = [site for site in model.wiring.read_sites if site not in softmax]
    ports = [*(w.port for w in softmax.values()), *(p for s in linear for p in (s.port, s.stream)), end]
    slopes = [clean_slopes(model, task, batch, run, ports, cut) for cut in cuts]
    effects = delta.new_zeros(len(cuts), len(batch), *model.graph.mask.shape)
    for site, written in softmax.items():
        here = torch.stack([s[written.port][1].reshape(*batch.clean.shape, written.n, -1) for s in slopes])
        found = local_scores(model, run, site, written, here, delta, edits_at_once(model, batch, plan))
        effects[:, :, : found.shape[2], site.columns] = found
    for site in linear:
        for i, s in enumerate(slopes):
            found = linear_scores(model, site, s[site.port][0], s[site.stream][0], s[site.port][1], delta)
            effects[i, :, : found.shape[1], site.columns] = found
    last = at_least_float32(run.inputs[-1])
    return effects.transpose(0, 1), flatness(task, batch, model, run, last - delta.sum(0), slopes[0][end][1])


def _magnitudes(model: Model, moments: Moments, cuts: list[int | None]) -> Scores:
    share = torch.ones(len(model.graph.destinations), dtype=torch.float64)
    for site in model.wiring.read_sites:
        share[site.columns] = worth_of_passes(cuts, site.block)
    values, stderr = (
        torch.where(model.graph.mask, total / share, 0.0).float()
        for total in (moments.mean.abs().sum(0), moments.stderr.sum(0))
    )
    return Scores(values, model.graph, "", stderr=stderr, signed=False, n_examples=moments.n)
