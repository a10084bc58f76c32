"""What every writer is worth, latents and errors too, from gradients at what its whole site adds to the stream.

    effect(u) = sum over pos of < a_u(clean) - a_u(corrupt), sum_k w_k dM/dy (y_k) >
    y_k       = y(corrupt) + alpha_k (y(clean) - y(corrupt))      y: all that u's site writes, everything else clean

Latents and error of a place move together, all heads of a layer do, and each MLP by itself. With one step the gradient
is that of the clean run, and one pass serves all sites. Effects stay factored: no latent is ever as wide as the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.attribution import quadrature
from circuitkit.functional.norms import at_least_float32
from circuitkit.methods.base import backward_bytes, clean_and_corrupt, corrupt_writes, matrix_bytes, with_reference
from circuitkit.methods.gradients import refuse_without_gradient
from circuitkit.methods.nodes import by_column, longest, node_moments, position_columns
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.models.wiring import WriteSite
from circuitkit.models.writers import moved_gradients
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task

Group = list[tuple[int, WriteSite]]  # sites that move together, with their numbers


def node_effects(
    model: Model,
    task: Task,
    *,
    steps: int = 10,
    per_position: bool = False,
    corrupt_value: str = "counterfactual",
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> NodeScores:
    """Effect of every writer on the metric, a row each.

    Args:
        steps: points of the path; 1 for plain attribution at the clean run.
        per_position: a column for each position, counted back from the last token; else their sum.

    Raises:
        OptionError: if steps is less than 1, or for an unknown corrupt value.
        MetricError: if the metric has no gradient, or with one step none at the clean run.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> node_effects(model, ck.task("induction-letters", model, n=8), steps=2).rows
    ('input', 'a0.h0', 'a1.h0')
    """
    plan = Plan.of(batch_size, budget, progress, seed)
    with torch.no_grad(), model.quiet():
        return effects_of(model, task, plan, steps, per_position, corrupt_value)


def effects_of(model: Model, task: Task, plan: Plan, steps: int, per_position: bool, corrupt_value: str) -> NodeScores:
    """`node_effects` with a plan."""
    if type(steps) is not int or steps < 1:
        raise OptionError(f"got steps = {steps!r}, expected a whole number of at least 1 (10 is usual)")
    refuse_without_gradient(task, at_clean=steps == 1, instead=("exact",))
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    width = longest(task)

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
        run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
        batch = with_reference(model, task, batch, run)
        effects = at_least_float32(run.inputs[0]).new_zeros(*run.inputs[0].shape[:2], len(model.graph.sources))
        at_once = max(1, plan.rows(backward_bytes(model, batch), model.device) // len(batch))
        for group, slope in site_slopes(model, task, batch, run, corrupt, steps, at_once):
            for i, site in group:
                gap = at_least_float32(run.writes[i]) - at_least_float32(corrupt[i])
                effects[:, :, site.rows] = (gap * pulled_to_site(site, slope)).sum(-1)
        nothing = torch.zeros(1, *model.graph.mask.shape, dtype=torch.bool)
        there = model.run_circuits(run, corrupt, nothing, batch.positions)[0]
        ends = [task.metric(x, batch) for x in (model.logits(run.inputs[-1], batch.positions), there)]
        columns = position_columns(batch, width) if per_position else None
        return by_column(effects, columns), torch.stack(ends, 1)

    def size(batch: Batch) -> float:
        return matrix_bytes(model, batch) + backward_bytes(model, batch)

    parts = list(plan.over(task, model.device, "node effects", size, one_chunk))
    effects, ends = (torch.cat(some) for some in zip(*parts, strict=True))
    mean, stderr = node_moments(effects)
    names = tuple(str(i - width + 1) if i < width - 1 else "end" for i in range(width)) if per_position else ("all",)
    clean, corrupt = ends.double().mean(0).tolist()
    options = {"steps": steps, "per_position": per_position, "corrupt_value": corrupt_value}
    return NodeScores(
        mean.float(), stderr.float(), model.graph.sources, names, clean, corrupt, method="node-effects",
        options=options, n_examples=len(ends), provenance={"task": task.name, "model": model.name},
    )  # fmt: skip


def moving_together(model: Model) -> list[Group]:
    """Write sites by what moves along a path at once: a dictionary's latents with their error, any other site alone."""
    groups: dict[object, Group] = {}
    for i, site in enumerate(model.wiring.write_sites):
        node = model.graph.source_nodes[site.first]
        spliced = node.kind in ("latent", "error")
        groups.setdefault((site.block, node.name.partition(".")[0]) if spliced else i, []).append((i, site))
    return list(groups.values())


def site_slopes(
    model: Model, task: Task, batch: Batch, run: Run, corrupt: tuple[Tensor, ...], steps: int, at_once: int
) -> Iterator[tuple[Group, Float[Tensor, "batch pos d"]]]:
    """Each group with the averaged gradient at what it adds to the stream."""
    mask, groups = model.graph.mask.to(run.inputs[0].device), moving_together(model)
    totals = [torch.zeros_like(at_least_float32(run.inputs[0])) for _ in groups]
    if steps == 1:
        _, slopes = model.edge_slopes(run, run.inputs[0][None], batch.positions, partial(_objective, task, batch, None))
        for columns, slope in slopes:
            for (first, *_), total in zip(groups, totals, strict=True):
                total += slope[mask[first[1].first, columns]].sum(0)
        yield from zip(groups, totals, strict=True)
        return
    nodes = torch.tensor(quadrature("midpoint", steps))
    rows = torch.arange(len(batch), device=mask.device)
    for group, total in zip(groups, totals, strict=True):
        apart = sum((_total(site, run.writes[i], corrupt[i]) for i, site in group), torch.zeros_like(total))
        for part in nodes.to(total).split(at_once, 1):
            objective = partial(_objective, task, batch.rows(rows.repeat(part.shape[1])), part[1])
            shift = (part[0][:, None, None, None] - 1) * apart
            found = moved_gradients(model, run, group[-1][1], shift, rows, batch.positions, objective)
            for columns, slope in found:
                total += slope[mask[group[0][1].first, columns]].sum(0)
        yield group, total


def _objective(task: Task, batch: Batch, weights: Tensor | None, logits: Tensor) -> Tensor:
    values = task.metric(logits, batch)
    return values.sum() if weights is None else weights @ values.unflatten(0, (len(weights), -1)).sum(1).to(weights)


def _total(site: WriteSite, values: Tensor, others: Tensor) -> Float[Tensor, "batch pos d"]:
    """What all writers of a site together wrote in one run minus what they wrote in another."""
    gap = at_least_float32(values) - at_least_float32(others)
    if site.weight is None:
        return gap.sum(2)
    written = gap.flatten(2) @ site.weight.to(gap.dtype).flatten(0, 1)
    return written if site.post_norm is None else site.post_norm.part(written)


def pulled_to_site(site: WriteSite, slope: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos node width"]:
    """The gradient at what a site holds for each writer, from that at the stream."""
    if site.weight is None:
        return slope[:, :, None]
    slope = slope if site.post_norm is None else site.post_norm.fold(slope)
    return (slope @ site.weight.to(slope.dtype).flatten(0, 1).T).unflatten(-1, (site.n, -1))
