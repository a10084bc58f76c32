"""Size against faithfulness of the circuits that a method chooses itself, over the values of one option.

ACDC at several thresholds tau is the usual example: every value gives a circuit of another size. All circuits are
measured together, on runs that are recorded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from circuitkit.errors import OptionError
from circuitkit.evaluation.faithfulness import circuit_metrics, normalised
from circuitkit.methods.base import METHODS, checked_options, edge_methods, fidelity, score
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.result import ParetoPoint
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


def pareto(
    model: Model,
    task: Task,
    method: str = "acdc",
    *,
    option: str = "tau",
    values: Sequence[float],
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
    **options: Any,
) -> tuple[ParetoPoint, ...]:
    """Run a method that chooses its own edges once for every value of an option, and measure each circuit.

    Args:
        method: one whose scores say which edges were `selected`.
        option: which of its options varies.
        values: the values, one circuit each.
        batch_size: examples at a time.
        budget: memory that activations may take.
        progress: show progress bars.
        seed: for whatever the method draws.
        options: the method's other options.

    Returns:
        one point per value, in the order of the values.

    Raises:
        UnknownName: if no method has that name.
        OptionError: if it does not choose edges, has no such option, or a value is out of range.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=16)
    >>> [point.n_edges for point in pareto(model, task, values=[0.1, 100], progress=False)]
    [3, 0]
    """
    checked_options(method, METHODS[method], {**options, **({option: values[0]} if values else {})})
    if not values:
        raise OptionError(f"got no values of {option}, expected one for each circuit")
    if method not in edge_methods():
        raise OptionError(f"{method} scores components, not edges, so it gives no circuit; try 'acdc'")
    common: dict[str, Any] = {"batch_size": batch_size, "budget": budget, "progress": progress, "seed": seed}
    found: list[Scores] = [score(model, task, method, **(common | options | {option: value})) for value in values]
    circuits = [scores.own() for scores in found]
    judged = fidelity(task, found[0].options.get("objective"))
    corrupt_value = str(found[0].options.get("corrupt_value", "counterfactual"))
    masks = torch.stack([torch.zeros_like(circuits[0].mask), *(circuit.mask for circuit in circuits)])
    plan = Plan.of(batch_size, budget, progress, seed)
    clean, own = circuit_metrics(model, task, masks, plan=plan, corrupt_value=corrupt_value)
    closeness = own
    if judged.metric is not task.metric:
        closeness = circuit_metrics(model, judged, masks, plan=plan, corrupt_value=corrupt_value)[1]
    return tuple(
        ParetoPoint(
            option, value, circuit, float(closeness[i].mean()), judged.metric.name, normalised(own[i], own[0], clean)
        )
        for i, (value, circuit) in enumerate(zip(values, circuits, strict=True), start=1)
    )
