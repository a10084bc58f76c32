"""Completeness: does a circuit break as the model breaks? (Wang et al. 2023, arXiv:2211.00593)

    incompleteness(K) = | F(C without K) - F(M without K) |          F: mean metric; K: some components of C

A circuit that misses a backup looks faithful until what the backup stands in for is knocked out: then the model goes on
and the circuit does not. K is drawn at random (every component with chance 1/2), is a layer of the circuit, or is grown
greedily: of a few candidates, the component is added whose knock-out sets circuit and model furthest apart.

A knocked-out component's edges carry its corrupt value, in the circuit and in the model alike. Cost: two circuits per
set, and two per candidate and step; all are stacked on the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from circuitkit.circuit import Circuit
from circuitkit.evaluation.judge import Judge, check_counts, components, without
from circuitkit.measures import Completeness, Knockout
from circuitkit.models.hooked import Model
from circuitkit.tasks.base import Task

Measured = Callable[[list[list[int]], str], list[Knockout]]


def completeness(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    sets: int = 20,
    layers: bool = True,
    restarts: int = 3,
    steps: int = 5,
    candidates: int = 5,
    corrupt_value: str | None = None,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Completeness:
    """Compare a circuit with the model under the same knock-outs.

    Args:
        sets: how many random sets.
        layers: whether to knock out each layer of the circuit.
        restarts: how many greedy searches for the worst set; 0 for none.
        steps: components that a greedy search adds at most.
        candidates: components that it tries at each step.
        corrupt_value: what removed edges carry; by default what the circuit was scored with.

    Raises:
        GraphError: if the circuit belongs to another model's graph.
        OptionError: if the circuit has no component to knock out, or a count is negative.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=16)
    >>> whole = ck.score(model, task, "exact").top(12)
    >>> completeness(model, task, whole, sets=4, restarts=0).worst.incompleteness < 1e-5
    True
    """
    check_counts(sets=sets, restarts=restarts, steps=steps, candidates=candidates)
    common = {"batch_size": batch_size, "budget": budget, "progress": progress, "seed": seed}
    judge = Judge.of(model, task, circuit, corrupt_value, common)
    rows, generator = components(circuit), torch.Generator().manual_seed(seed)
    graph = circuit.graph

    def measured(chosen: list[list[int]], how: str) -> list[Knockout]:
        means = judge.means(without(base, k) for k in chosen for base in (circuit.mask, graph.mask))
        pairs = zip(chosen, means[::2], means[1::2], strict=True)
        return [Knockout(tuple(graph.sources[i] for i in k), how, ours, whole) for k, ours, whole in pairs]

    drawn = [[row for row in rows if torch.rand(1, generator=generator) < 0.5] for _ in range(sets)]
    knockouts = measured([[]], "nothing") + (measured(drawn, "random") if drawn else [])
    if layers:
        at = {row: graph.source_nodes[row].layer for row in rows}
        knockouts += measured([[row for row in rows if at[row] == n] for n in sorted(set(at.values()))], "layer")
    if restarts and steps and candidates:
        knockouts += _greedy(rows, measured, restarts, steps, candidates, generator)
    return Completeness(
        task.name, task.metric.name, judge.corrupt_value, **judge.ends(circuit.mask), knockouts=tuple(knockouts),
        n_edges=len(circuit), n_examples=len(task), seed=seed,
    )  # fmt: skip


def _greedy(
    rows: list[int], measured: Measured, restarts: int, steps: int, candidates: int, generator: torch.Generator
) -> list[Knockout]:
    """All searches go on side by side: each adds the worst of its candidates, and every step's set is reported."""
    grown: list[list[int]] = [[] for _ in range(restarts)]
    found: list[Knockout] = []
    for _ in range(min(steps, len(rows))):
        tried: list[list[int]] = []
        owner: list[int] = []
        for search, chosen in enumerate(grown):
            left = [row for row in rows if row not in chosen]
            for i in torch.randperm(len(left), generator=generator)[:candidates].tolist():
                tried.append([*chosen, left[i]])
                owner.append(search)
        results = measured(tried, "greedy")
        for search in range(restarts):
            mine = [i for i, s in enumerate(owner) if s == search]
            worst = max(mine, key=lambda i: results[i].incompleteness)
            grown[search] = tried[worst]
            found.append(results[worst])
    return found
