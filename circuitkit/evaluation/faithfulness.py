"""Faithfulness of a circuit: how much of the behaviour is left when every other edge carries its corrupt value.

    f(C) = (M(C) - M(nothing)) / (M(model) - M(nothing)),   M: mean of the metric over examples (a ratio of means)

``M(nothing)`` is the run with every edge removed. The curve uses the sizes and rules of MIB (Mueller et al. 2025,
arXiv:2504.13151): the first k % of the ranking, dangling edges pruned, areas by trapezoids over k; CPR ranks by signed
score, CMD by magnitude. Their areas are dominated by large circuits, so an area over log10(k) stands beside them.
"""

from __future__ import annotations

import math
import time

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.circuit import Circuit, CurvePoint, Result, Scores
from circuitkit.errors import GraphError
from circuitkit.functional import select
from circuitkit.functional.stats import auroc, bootstrap_mean, bootstrap_ratio, trapezoid
from circuitkit.graph import Graph
from circuitkit.methods.base import Plan, check_task, clean_and_corrupt, corrupt_writes, matrix_bytes, with_reference
from circuitkit.models.edits import run_circuits
from circuitkit.models.hooked import Model, quiet
from circuitkit.tasks.base import Task

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
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
    if corrupt_value is None:
        options = circuit.scores.options if circuit.scores else circuit.meta.get("options", {})
        corrupt_value = str(options.get("corrupt_value", "counterfactual"))
    curve_masks = [] if scores is None else _curve_masks(scores)
    random_circuits = random_masks(circuit, seed)
    n_random = len(random_circuits)
    masks = [
        torch.zeros_like(model.graph.mask),
        circuit.mask,
        *random_circuits,
        *(mask for _, _, mask in curve_masks),
    ]
    clean, values = circuit_metrics(model, task, torch.stack(masks), plan=plan, corrupt_value=corrupt_value)
    faithfulness = [_ratio(v, values[0], clean) for v in values]
    known = None if task.known is None else _against_known(circuit, model.graph, task.known)
    points = tuple(
        CurvePoint(fraction, int(mask.sum()), f, absolute)
        for (fraction, absolute, mask), f in zip(curve_masks, faithfulness[2 + n_random :], strict=True)
    )
    random = [f for f in faithfulness[2 : 2 + n_random] if f is not None]
    interval = None
    if faithfulness[1] is not None:
        interval = bootstrap_ratio(values[1] - values[0], clean - values[0], seed=seed)
    return Result(
        task=task.name,
        metric=task.metric.name,
        corrupt_value=corrupt_value,
        clean=float(clean.mean()),
        corrupt=float(values[0].mean()),
        circuit=float(values[1].mean()),
        faithfulness=faithfulness[1],
        faithfulness_interval=interval,
        random_faithfulness=sum(random) / len(random) if random else None,
        random_interval=(min(random), max(random)) if random else None,
        n_edges=len(circuit),
        n_possible=model.graph.n_edges,
        n_examples=len(task),
        gap_interval=bootstrap_mean(clean - values[0], seed=seed),
        curve_points=points,
        **_areas(points),
        known=known,
        seconds=round(time.perf_counter() - start, 3),
        seed=seed,
    )


def circuit_metrics(
    model: Model, task: Task, masks: Bool[Tensor, "circuit src dst"], *, plan: Plan, corrupt_value: str
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "circuit batch"]]:
    """The metric of every example for the whole model and for each circuit; circuits are stacked on the batch axis."""
    clean_parts: list[Tensor] = []
    parts: list[Tensor] = []
    with torch.no_grad(), quiet(model.module), plan.bar(len(task) * len(masks), "circuits") as bar:
        corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
        silent = Plan(plan.batch_size, plan.budget, False)
        for batch in silent.chunks(task, lambda b: 2 * matrix_bytes(model, b), model, ""):
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch = with_reference(model, task, batch, run)
            clean_parts.append(task.metric(model.logits(run.inputs[-1], batch.positions), batch).double().cpu())
            at_once = max(1, plan.rows(2 * matrix_bytes(model, batch), model.device) // len(batch))
            values = []
            for group in masks.split(at_once):
                logits = run_circuits(model, run, corrupt, group, batch.positions)
                many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(group)))
                values.append(task.metric(logits.flatten(0, 1), many).unflatten(0, (len(group), -1)).double().cpu())
                bar.update(len(group) * len(batch))
            parts.append(torch.cat(values))
    return torch.cat(clean_parts), torch.cat(parts, 1)


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


def _curve_masks(scores: Scores) -> list[tuple[float, bool, Tensor]]:
    graph, out = scores.graph, []
    for absolute in (False, True):
        order = select.ranked_edges(scores.values, graph.mask, absolute=absolute or not scores.signed)
        for fraction in MIB_FRACTIONS:
            chosen = select.first_edges(order, int(fraction * graph.n_edges), graph.mask)
            out.append((fraction, absolute, select.prune_dangling(chosen, graph.feeds)))
    return out


def _ratio(values: Tensor, nothing: Tensor, clean: Tensor) -> float | None:
    """Normalised faithfulness; None where clean and corrupt metrics are equal up to rounding."""
    gap = float(clean.mean() - nothing.mean())
    if abs(gap) <= 1e-5 * max(float(clean.abs().mean()), float(nothing.abs().mean()), 1e-6):
        return None
    return float(values.mean() - nothing.mean()) / gap


def _areas(points: tuple[CurvePoint, ...]) -> dict[str, float | None]:
    signed = [p for p in points if not p.absolute and p.faithfulness is not None]
    absolute = [p for p in points if p.absolute and p.faithfulness is not None]
    if len(signed) < len(MIB_FRACTIONS) or len(absolute) < len(MIB_FRACTIONS):
        return {"cpr": None, "cmd": None, "log_area": None}
    x = [p.fraction for p in signed]
    logs = [math.log10(v) for v in x]
    f = [float(p.faithfulness) for p in signed if p.faithfulness is not None]
    distance = [abs(1 - float(p.faithfulness)) for p in absolute if p.faithfulness is not None]
    return {
        "cpr": trapezoid(f, x),
        "cmd": trapezoid(distance, x),
        "log_area": trapezoid(f, logs) / (logs[-1] - logs[0]),
    }


def _against_known(circuit: Circuit, graph: Graph, known: tuple[str, ...]) -> dict[str, float | None]:
    truth = graph.edge_mask(known)
    hits = int((circuit.mask & truth).sum())
    out: dict[str, float | None] = {
        "precision": hits / len(circuit) if len(circuit) else 0.0,
        "recall": hits / max(int(truth.sum()), 1),
    }
    if circuit.scores is not None:
        out["auroc"] = auroc(circuit.scores.values[graph.mask].abs(), truth[graph.mask])
    return out
