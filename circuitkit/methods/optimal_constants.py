"""Optimal constants: what each writer could say, the same at every position of every input, at the least loss.

    c_u = argmin over c of  mean over examples of  loss(run in which u writes c everywhere)

The loss is minus the fidelity: the KL divergence from the clean run, or the task's metric where outputs are numbers.
Every writer is ablated alone, so the constants do not depend on one another: all are trained at once, each as rows of
one batch. Adam starts at the mean over the task, in units of the writer's own spread; of all that was tried, the mean
and zero included, the best is kept. Nothing is drawn at random.
Reference: Li and Janson 2024, arXiv:2409.09951.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.functional.ablation import task_mean
from circuitkit.functional.norms import at_least_float32
from circuitkit.methods.base import CorruptWrites, backward_bytes, fidelity, run_bytes, with_reference
from circuitkit.methods.gradients import refuse_without_gradient
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.models.wiring import WriteSite
from circuitkit.models.writers import replay_moved
from circuitkit.tasks.base import Batch, Task

STEPS, RATE = 100, 0.2
# What was learned for a task lasts as long as the task, so that `evaluate` does not learn again what `score` has.
_LEARNED: WeakKeyDictionary[Task, dict[object, tuple[Tensor, ...]]] = WeakKeyDictionary()
Constants = tuple[Float[Tensor, "node width"], ...]  # of each write site, in the form in which runs keep writes


def optimal_writes(
    model: Model, task: Task, plan: Plan, *, objective: str | None = None, steps: int = STEPS
) -> CorruptWrites:
    """A function from a run to the optimal constants, one per writer, in place of what was written.

    Args:
        objective: which metric judges; see `fidelity`.
        steps: of Adam.

    Raises:
        MetricError: if the metric that judges has no gradient.
    """
    judged = fidelity(task, objective)
    refuse_without_gradient(judged, at_clean=False, instead=("mean",))
    learned = _LEARNED.setdefault(task, {})
    weights = tuple(float(p.detach().float().sum()) for p in model.module.parameters())
    key = (model.graph.sources, weights, objective, steps)
    if key not in learned:
        learned[key] = learn_constants(model, judged, plan, steps)
    constants = learned[key]
    return lambda run: tuple(c.to(w).expand_as(w) for c, w in zip(constants, run.writes, strict=True))


def learn_constants(model: Model, task: Task, plan: Plan, steps: int) -> Constants:
    """The constants with the least loss, minus the task's metric, that Adam finds from the task's mean."""
    mean, spread = _mean_and_spread(model, task, plan)
    zero = tuple(torch.zeros_like(m) for m in mean)
    best, least = mean, torch.full((len(model.graph.sources),), torch.inf, dtype=torch.float64)
    steered = [torch.zeros_like(m).requires_grad_(True) for m in mean]
    adam = torch.optim.Adam(steered, lr=RATE, betas=(0.9, 0.99))
    silent = replace(plan, progress=False)
    with plan.bar((steps + 2) * len(model.graph.sources), "optimal constants") as bar:
        for step in range(steps + 2):  # the last two: where Adam ended, and zero
            moved = (m + s * d.detach() for m, s, d in zip(mean, spread, steered, strict=True))
            tried = zero if step > steps else tuple(moved)
            losses, slopes = _losses(model, task, silent, tried, learn=step < steps)
            better = losses < least
            least = torch.where(better, losses, least)
            best = tuple(
                torch.where(better[site.rows, None].to(b.device), t, b)
                for site, t, b in zip(model.wiring.write_sites, tried, best, strict=True)
            )
            if step < steps:
                adam.param_groups[0]["lr"] = RATE * (1 - step / steps)
                for parameter, slope, s in zip(steered, slopes, spread, strict=True):
                    parameter.grad = slope * s
                adam.step()
            bar.update(len(model.graph.sources))
    return best


def _mean_and_spread(model: Model, task: Task, plan: Plan) -> tuple[Constants, Constants]:
    """Mean of what each writer wrote, over examples and real positions, and the size of its deviations."""

    def one_chunk(batch: Batch, _plan: Plan) -> tuple[list[Tensor], Tensor]:
        writes = (at_least_float32(w) for w in model.record(batch.clean).writes)
        return [torch.stack((w, w.square()), 2) for w in writes], batch.lengths

    recorded = list(plan.over(task, model.device, "mean activations", lambda b: 2 * run_bytes(model, b), one_chunk))
    means, spreads = list[Tensor](), list[Tensor]()
    for i in range(len(model.wiring.write_sites)):
        like = recorded[0][0][i]
        mean, square = task_mean(((w[i], n) for w, n in recorded), per_position=False)[0]
        means.append(mean.to(like))
        spreads.append((square - mean.square()).clamp(min=0).mean(-1, keepdim=True).sqrt().to(like))
    return tuple(means), tuple(spreads)


def _losses(
    model: Model, task: Task, plan: Plan, constants: Constants, *, learn: bool
) -> tuple[Float[Tensor, " src"], Constants]:
    """The loss of each writer replaced by its constant, mean over examples, and its gradient at the constant."""
    total, slopes = torch.zeros(len(model.graph.sources), dtype=torch.float64), [torch.zeros_like(c) for c in constants]

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, list[Tensor]]:
        run = model.record(batch.clean)
        batch = with_reference(model, task, batch, run)
        losses, found = list[Tensor](), [torch.zeros_like(c) for c in constants]
        for i, site, nodes in writer_groups(model, batch, plan):
            part = _some(site, nodes)
            constant = constants[i][nodes].detach().requires_grad_(learn)
            with torch.set_grad_enabled(learn):
                shift = part.expand(constant[None, None]) - part.expand(run.writes[i][:, :, nodes])
                loss = -replaced_metric(model, task, batch, run, site, shift).sum(1)
            if learn:
                found[i][nodes] = torch.autograd.grad(loss, constant, torch.ones_like(loss))[0].to(found[i])
            losses.append(loss.detach())
        return torch.cat(losses).cpu().double(), found

    for losses, found in plan.over(task, model.device, "", partial(run_bytes, model), one_chunk):
        total += losses / len(task)
        slopes = [a + b / len(task) for a, b in zip(slopes, found, strict=True)]
    return total, tuple(slopes)


def writer_groups(model: Model, batch: Batch, plan: Plan) -> Iterator[tuple[int, WriteSite, slice]]:
    """All writers in groups that can be run together: number of the site, the site, and which of its nodes."""
    at_once = max(1, plan.rows(backward_bytes(model, batch), model.device) // len(batch))
    for i, site in enumerate(model.wiring.write_sites):
        size = math.ceil(site.n / math.ceil(site.n / at_once))
        for first in range(0, site.n, size):
            yield i, site, slice(first, min(first + size, site.n))


def replaced_metric(
    model: Model, task: Task, batch: Batch, run: Run, site: WriteSite, shift: Float[Tensor, "node batch pos d"]
) -> Float[Tensor, "node batch"]:
    """The metric of every example with one writer at a time adding ``shift`` more to the stream."""
    rows = torch.arange(len(batch), device=shift.device).repeat(len(shift))
    last = replay_moved(model, run, site, shift.flatten(0, 1), rows)
    many = batch.rows(rows)
    return task.metric(model.logits(last, many.positions), many).unflatten(0, (len(shift), -1))


def _some(site: WriteSite, nodes: slice) -> WriteSite:
    """Some writers of a site as a site."""
    return site if site.weight is None else replace(site, n=nodes.stop - nodes.start, weight=site.weight[nodes])
