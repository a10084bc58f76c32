"""Faithfulness of a circuit: how much of the behaviour is left when every other edge carries its corrupt value.

    f(C) = (M(C) - M(nothing)) / (M(model) - M(nothing)),   M: mean of the metric over examples (a ratio of means)

``M(nothing)`` is the run with every edge removed. Random circuits of as many edges, all on paths from the input to the
logits, are the baseline; the sizes of the curve are in `circuitkit.evaluation.curve`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.evaluation.attractors import caution_if_repaired
from circuitkit.evaluation.curve import areas, curve_circuits, curve_points
from circuitkit.evaluation.positions import against_known, layout_for, position_metrics
from circuitkit.functional import select
from circuitkit.functional.stats import bootstrap_mean, bootstrap_ratio
from circuitkit.methods.base import check_task, corrupt_writes, matrix_bytes, with_reference
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.result import Result
from circuitkit.tasks.base import Batch, Task
from circuitkit.tasks.spans import fitted_to

N_RANDOM = 20


def evaluate(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    corrupt_value: str | None = None,
    curve: bool = True,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Result:
    """Measure what a circuit does on a task, next to random connected circuits of the same number of edges.

    Args:
        corrupt_value: what removed edges carry; by default what the circuit was scored with.
        curve: whether to measure MIB's sizes too, if the circuit's ranking is known.

    Raises:
        GraphError: if the circuit belongs to another model's graph.
        TaskError: if the circuit has positions, and the task other spans.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=32)
    >>> result = ck.evaluate(model, task, ck.score(model, task, "exact").top(3))
    >>> result.faithfulness > 0.9
    True
    """
    start = time.perf_counter()
    layout = layout_for(model, circuit.graph)
    check_task(model, task)
    task = task if layout is None else fitted_to(task, layout.spans)
    plan = Plan.of(batch_size, budget, progress, seed)
    scores = circuit.scores if curve else None
    corrupt_value = corrupt_value or scored_with(circuit)
    sizes = [] if scores is None else curve_circuits(scores)
    random = random_masks(circuit, seed)
    masks = [torch.zeros_like(circuit.mask), circuit.mask, *random, *(size.mask for size in sizes)]
    metrics = circuit_metrics if layout is None else partial(position_metrics, layout=layout)
    clean, values = metrics(model, task, torch.stack(masks), plan=plan, corrupt_value=corrupt_value)
    nothing, kept = values[0], values[1]
    measured, *others = [normalised(v, nothing, clean) for v in values[1:]]
    points = curve_points(sizes, others[len(random) :])
    result = Result(
        task=task.name,
        metric=task.metric.name,
        corrupt_value=corrupt_value,
        clean=float(clean.mean()),
        corrupt=float(nothing.mean()),
        circuit=float(kept.mean()),
        faithfulness=measured,
        faithfulness_interval=(
            None if measured is None else bootstrap_ratio(kept - nothing, clean - nothing, seed=seed)
        ),
        **_mean_of_ratios(kept, nothing, clean),
        **_baseline([f for f in others[: len(random)] if f is not None]),
        n_edges=len(circuit),
        n_possible=circuit.graph.n_edges,
        n_examples=len(task),
        gap_interval=bootstrap_mean(clean - nothing, seed=seed),
        curve_points=points,
        **areas(points),
        known=against_known(circuit, task.known, layout),
        seconds=round(time.perf_counter() - start, 3),
        seed=seed,
    )
    caution_if_repaired(circuit, result)
    return result


def scored_with(circuit: Circuit) -> str:
    """What removed edges carried when the circuit was found."""
    options = circuit.scores.options if circuit.scores else circuit.meta.get("options", {})
    return str(options.get("corrupt_value", "counterfactual"))


def _baseline(random: list[float]) -> dict[str, Any]:
    """Mean and range of the random circuits' faithfulness, None where there are none."""
    if not random:
        return {"random_faithfulness": None, "random_interval": None}
    return {"random_faithfulness": sum(random) / len(random), "random_interval": (min(random), max(random))}


def circuit_metrics(
    model: Model, task: Task, masks: Bool[Tensor, "circuit src dst"], *, plan: Plan, corrupt_value: str
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "circuit batch"]]:
    """The metric of every example for the whole model and for each circuit; circuits are stacked on the batch axis."""
    with torch.no_grad(), model.quiet(), plan.bar(len(task) * len(masks), "circuits") as bar:
        corrupt_of = corrupt_writes(model, task, plan, corrupt_value)

        def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
            sweep = model.sweep(batch.clean, corrupt_of or (lambda _run: model.record(batch.corrupt).writes))
            batch = with_reference(model, task, batch, sweep.run)
            clean = task.metric(model.logits(sweep.run.inputs[-1], batch.positions), batch)
            at_once = max(1, plan.rows(1.25 * matrix_bytes(model, batch), model.device) // len(batch))
            values = []
            for group in masks.split(at_once):
                logits = sweep.logits(group, batch.positions)
                many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(group)))
                values.append(task.metric(logits.flatten(0, 1), many).unflatten(0, (len(group), -1)))
                bar.update(len(group) * len(batch))
            return clean.cpu().double(), torch.cat(values).cpu().double()

        silent = replace(plan, progress=False)
        parts = list(silent.over(task, model.device, "", lambda b: 2 * matrix_bytes(model, b), one_chunk))
    return torch.cat([clean for clean, _ in parts]), torch.cat([values for _, values in parts], 1)


def random_masks(circuit: Circuit, seed: int) -> list[Tensor]:
    """Random connected circuits with about as many edges, the circuit itself left out."""
    graph, generator = circuit.graph, torch.Generator().manual_seed(seed)
    out: list[Tensor] = []
    for _ in range(10 * N_RANDOM):
        if len(out) == N_RANDOM:
            break
        mask = select.random_connected(len(circuit), graph.mask, graph.feeds, generator)
        if not torch.equal(mask, circuit.mask):
            out.append(mask)
    return out


def _mean_of_ratios(values: Tensor, nothing: Tensor, clean: Tensor) -> dict[str, Any]:
    """The mean over examples of each one's own faithfulness, and how many have no gap to divide by."""
    gap = clean - nothing
    enough = gap.abs() > 1e-5 * torch.maximum(clean.abs(), nothing.abs()).clamp(min=1e-6)
    ratios = (values - nothing)[enough] / gap[enough]
    mean = float(ratios.mean()) if len(ratios) else None
    return {"mean_of_ratios": mean, "ratios_left_out": int((~enough).sum())}


def normalised(values: Tensor, nothing: Tensor, clean: Tensor) -> float | None:
    """Normalised faithfulness; None where clean and corrupt metrics are equal up to rounding."""
    gap = float(clean.mean() - nothing.mean())
    if abs(gap) <= 1e-5 * max(float(clean.abs().mean()), float(nothing.abs().mean()), 1e-6):
        return None
    return float(values.mean() - nothing.mean()) / gap
