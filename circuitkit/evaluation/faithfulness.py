"""Faithfulness of a circuit: how much of the behaviour is left when every other edge carries its corrupt value.

    f(C) = (M(C) - M(nothing)) / (M(model) - M(nothing)),   M: mean of the metric over examples (a ratio of means)

``M(nothing)`` is the run with every edge removed. Random circuits of as many edges, all on paths from the input to the
logits, are the baseline; the sizes of the curve are in `circuitkit.evaluation.curve`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError
from circuitkit.evaluation.curve import areas, curve_circuits, curve_points
from circuitkit.functional import select
from circuitkit.functional.stats import auroc, bootstrap_mean, bootstrap_ratio
from circuitkit.methods.base import check_task, clean_and_corrupt, corrupt_writes, matrix_bytes, with_reference
from circuitkit.methods.plan import Plan
from circuitkit.models.circuits import run_circuits
from circuitkit.models.hooked import Model
from circuitkit.result import Result
from circuitkit.tasks.base import Batch, Task

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

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=32)
    >>> result = ck.evaluate(model, task, ck.score(model, task, "exact").top(3))
    >>> result.faithfulness > 0.9
    True
    """
    start = time.perf_counter()
    if not circuit.graph.same_as(model.graph):
        raise GraphError(
            f"this circuit is not of {model.name}: its graph has other nodes; load the model it was found in"
        )
    check_task(model, task)
    plan = Plan.of(batch_size, budget, progress, seed)
    scores = circuit.scores if curve else None
    corrupt_value = corrupt_value or _scored_with(circuit)
    sizes = [] if scores is None else curve_circuits(scores)
    random = random_masks(circuit, seed)
    masks = [torch.zeros_like(circuit.mask), circuit.mask, *random, *(size.mask for size in sizes)]
    clean, values = circuit_metrics(model, task, torch.stack(masks), plan=plan, corrupt_value=corrupt_value)
    nothing, kept = values[0], values[1]
    measured, *others = [_ratio(v, nothing, clean) for v in values[1:]]
    points = curve_points(sizes, others[len(random) :])
    return Result(
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
        **_baseline([f for f in others[: len(random)] if f is not None]),
        n_edges=len(circuit),
        n_possible=model.graph.n_edges,
        n_examples=len(task),
        gap_interval=bootstrap_mean(clean - nothing, seed=seed),
        curve_points=points,
        **areas(points),
        known=None if task.known is None else _against_known(circuit, task.known),
        seconds=round(time.perf_counter() - start, 3),
        seed=seed,
    )


def _scored_with(circuit: Circuit) -> str:
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
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch = with_reference(model, task, batch, run)
            clean = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
            at_once = max(1, plan.rows(2 * matrix_bytes(model, batch), model.device) // len(batch))
            values = []
            for group in masks.split(at_once):
                logits = run_circuits(model, run, corrupt, group, batch.positions)
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


def _ratio(values: Tensor, nothing: Tensor, clean: Tensor) -> float | None:
    """Normalised faithfulness; None where clean and corrupt metrics are equal up to rounding."""
    gap = float(clean.mean() - nothing.mean())
    if abs(gap) <= 1e-5 * max(float(clean.abs().mean()), float(nothing.abs().mean()), 1e-6):
        return None
    return float(values.mean() - nothing.mean()) / gap


def _against_known(circuit: Circuit, known: tuple[str, ...]) -> dict[str, float | None]:
    graph, truth = circuit.graph, circuit.graph.edge_mask(known)
    hits = int((circuit.mask & truth).sum())
    out: dict[str, float | None] = {
        "precision": hits / len(circuit) if len(circuit) else 0.0,
        "recall": hits / max(int(truth.sum()), 1),
    }
    if circuit.scores is not None:
        out["auroc"] = auroc(circuit.scores.values[graph.mask].abs(), truth[graph.mask])
    return out
