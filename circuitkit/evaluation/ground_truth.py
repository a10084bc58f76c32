"""A method judged on a model whose circuit is known: one `Cell` of the benchmark.

    AUROC: chance that a random edge of the known circuit has a larger magnitude than a random other edge (or, where
           scores of different readers cannot be compared, that it comes earlier as a circuit grows)
    faithfulness at k %: of the strongest connected edges, as many as k % of all

`random` stands beside the methods: AUROC 1/2, and the mean faithfulness of random connected circuits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from circuitkit.circuit import Circuit
from circuitkit.errors import CircuitKitError
from circuitkit.evaluation.cost import measured
from circuitkit.evaluation.faithfulness import N_RANDOM, circuit_metrics, evaluate, normalised
from circuitkit.evaluation.truths import TRUTHS, GroundTruth
from circuitkit.functional import select
from circuitkit.functional.stats import auroc
from circuitkit.graph import Graph
from circuitkit.methods.base import METHODS, checked_options, score
from circuitkit.methods.plan import Plan
from circuitkit.models.base import load
from circuitkit.models.hooked import Model
from circuitkit.positions import Layout
from circuitkit.scores import Scores
from circuitkit.shapes import EdgeMask
from circuitkit.tasks.base import Task, make

RANDOM = "random"
SHARES = (1, 2, 5, 10)  # per cent of all edges
KNOWN_SIZE = "known"  # as many edges as the known circuit has
CONTROL_EDGES = 3  # size of the circuit that is asked for where nothing is to be found


@dataclass(frozen=True)
class Cell:
    """What one method did on one model.

    Args:
        method: the registered name, or ``random``.
        model: the entry of `TRUTHS`.
        n: pairs of the task.
        seed: seed of the task, the method and the random circuits.
        auroc: of magnitudes against the known circuit; None where nothing is to be found.
        faithfulness: by size (``1``, ``2``, ``5``, ``10`` per cent, ``known``); None where that is less than one edge.
        finds_a_circuit: only on the negative control: whether its circuit passes for better than chance there.
        seconds: of scoring alone, after one recorded run to warm up.
        peak_bytes: what scoring took on top of the loaded model, or None.
        corrupt_value: what removed edges carried while scoring, or None if the method does not say.
        refused: why the method gave no scores here, or None.
    """

    method: str
    model: str
    n: int
    seed: int
    auroc: float | None = None
    faithfulness: dict[str, float | None] = field(default_factory=dict)
    finds_a_circuit: bool | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    corrupt_value: str | None = None
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``Cell(**data)`` restores it."""
        return asdict(self)


def judge(method: str, model: str, *, n: int = 32, seed: int = 0) -> Cell:
    """Score one model with one method, or with ``random``, and compare with what is known.

    Raises:
        UnknownName: if no method or ground truth has that name.

    >>> cell = judge("exact", "induction/trained", n=8)
    >>> cell.auroc, cell.faithfulness["known"] > 0.9
    (1.0, True)
    """
    truth = TRUTHS[model]
    loaded = load(truth.model)
    task = make(truth.task, loaded, n=n, seed=seed)
    if method == RANDOM:
        return Cell(method, model, n, seed, **_random(loaded, task, truth, seed))
    options = {"corrupt_value": truth.corrupt_value} if _has_corrupt_value(method) else {}
    _warm_up(loaded, task)
    try:
        scores, cost = measured(
            lambda: score(loaded, task, method, progress=False, seed=seed, **options), loaded.device
        )
    except CircuitKitError as error:
        return Cell(method, model, n, seed, refused=" ".join(str(error).split()))
    scores = without_positions(scores, loaded.graph)
    cost_and_setting: dict[str, Any] = {
        "seconds": round(cost.seconds, 4),
        "peak_bytes": cost.peak_bytes,
        "corrupt_value": options.get("corrupt_value"),
    }
    known = truth.known(loaded, task)
    if known is None:
        result = evaluate(loaded, task, _cut(scores, CONTROL_EDGES), curve=False, progress=False, seed=seed)
        return Cell(method, model, n, seed, finds_a_circuit=result.better_than_chance, **cost_and_setting)
    masks = {name: [_cut(scores, edges).mask] if edges else None for name, edges in _sizes(loaded, task).items()}
    return Cell(
        method,
        model,
        n,
        seed,
        auroc=_auroc(scores, *known),
        faithfulness=_faithfulness(loaded, task, truth, masks, seed),
        **cost_and_setting,
    )


def without_positions(scores: Scores, graph: Graph) -> Scores:
    """Scores on the model's own graph: of an edge with positions, the largest magnitude over its spans."""
    if scores.graph.same_as(graph):
        return scores
    layout = Layout.of(scores.graph)
    rows = torch.tensor([graph.sources.index(name) for name in layout.base.sources])
    columns = torch.tensor([graph.destinations.index(name) for name in layout.base.destinations])
    values = scores.values.new_zeros(graph.mask.shape)
    values[rows[:, None], columns] = layout.largest(scores.values)
    return replace(scores, values=values, graph=graph, stderr=None, selected=None, signed=False)


def _has_corrupt_value(method: str) -> bool:
    return "corrupt_value" in checked_options(method, METHODS[method], {})


def _warm_up(model: Model, task: Task) -> None:
    """First calls load libraries; that is neither the method's time nor its memory."""
    batch = task.batches[0].rows(slice(0, 1)).to(model.device)
    with torch.enable_grad():
        x = model.record(batch.clean).inputs[-1].requires_grad_()
        torch.autograd.grad(task.metric(model.logits(x, batch.positions), batch).sum(), x)


def _sizes(model: Model, task: Task) -> dict[str, int]:
    """Number of edges of each circuit that is measured; 0 where a share is less than one edge."""
    sizes = {str(share): int(share * model.graph.n_edges / 100) for share in SHARES}
    return sizes | ({} if task.known is None else {KNOWN_SIZE: len(task.known)})


def _cut(scores: Scores, edges: int) -> Circuit:
    return scores.top(edges) if scores.comparable else scores.grow(edges)


def _auroc(scores: Scores, part: EdgeMask, judged: EdgeMask) -> float | None:
    """By magnitude; where only scores into the same reader compare, by when an edge is added to a growing circuit."""
    strength = scores.values.abs()
    if not scores.comparable:
        graph = scores.graph
        order = select.grown_order(scores.values, graph.mask, graph.feeds, absolute=True)
        strength = torch.zeros_like(strength)
        strength[order[:, 0], order[:, 1]] = torch.arange(len(order), 0, -1).to(strength)
    return auroc(strength[judged], part[judged])


def _faithfulness(
    model: Model, task: Task, truth: GroundTruth, masks: Mapping[str, list[EdgeMask] | None], seed: int
) -> dict[str, float | None]:
    """Faithfulness of each group of circuits, its mean where there are several."""
    plan = Plan.of("auto", None, False, seed)
    groups = {name: group for name, group in masks.items() if group}
    stacked = torch.stack([torch.zeros_like(model.graph.mask), *(mask for group in groups.values() for mask in group)])
    clean, values = circuit_metrics(model, task, stacked, plan=plan, corrupt_value=truth.corrupt_value)
    each = iter([normalised(v, values[0], clean) for v in values[1:]])
    means = {name: _mean([next(each) for _ in group]) for name, group in groups.items()}
    return {name: means.get(name) for name in masks}


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _random(model: Model, task: Task, truth: GroundTruth, seed: int) -> dict[str, Any]:
    """What chance gives: random scores have an AUROC of 1/2; faithfulness is the mean of `N_RANDOM` random circuits."""
    if truth.known(model, task) is None:
        return {}
    graph, generator = model.graph, torch.Generator().manual_seed(seed)
    masks = {
        name: [select.random_connected(edges, graph.mask, graph.feeds, generator) for _ in range(N_RANDOM)]
        if edges
        else None
        for name, edges in _sizes(model, task).items()
    }
    return {"auroc": 0.5, "faithfulness": _faithfulness(model, task, truth, masks, seed)}
