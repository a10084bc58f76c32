"""Stability: is it the same circuit when it is found again? (Méloux et al. 2025, arXiv:2510.00845)

    J(A, B) = shared edges / edges of either;   stability = mean of J over all pairs of circuits

What varies is the examples (bootstrap: as many, drawn with replacement, so it is the sampling error of this task), the
task's seed (fresh examples), or the method's own seed. Beside the mean stands what random edges of the same number
would give. Selection frequencies say which edges every circuit has. Cost: one scoring per circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.comparisons import Stability
from circuitkit.errors import OptionError
from circuitkit.evaluation.resampling import resampled
from circuitkit.functional.significance import expected_jaccard
from circuitkit.methods.base import score
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import TASKS, Task, make

VARIES = ("examples", "task-seed", "method-seed")


def stability(
    model: Model,
    task: Task,
    method: str = "eap-ig",
    *,
    edges: int,
    times: int = 20,
    vary: str = "examples",
    fresh: Callable[[int], Task] | None = None,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
    **options: Any,
) -> Stability:
    """Find a circuit again and again.

    Args:
        edges: size of every circuit.
        times: how many circuits.
        vary: ``examples``, ``task-seed`` or ``method-seed``.
        fresh: for ``task-seed``, makes the task of a seed; by default the registered task of that name with as many
            examples and no options.
        options: the method's own options.

    Raises:
        OptionError: if there are fewer than two examples or circuits, or the task cannot be made again.
        UnknownName: if no method has that name.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> stability(model, ck.task("induction-letters", model, n=32), "exact", edges=3, times=5).jaccard
    1.0
    """
    _check(task, times, vary, fresh)
    common: dict[str, Any] = {"batch_size": batch_size, "budget": budget, "seed": seed}
    reference_scores = score(model, task, method, progress=progress, **common, **options)
    reference = cut(reference_scores, edges).mask
    circuits: list[Tensor] = []
    with Plan.of(batch_size, budget, progress, seed).bar(times, "circuits") as bar:
        for again, method_seed in _tasks(model, task, times, vary, fresh, seed):
            scores = score(model, again, method, progress=False, **common | {"seed": method_seed}, **options)
            circuits.append(cut(scores, edges).mask)
            bar.update()
    masks, names = torch.stack(circuits), reference_scores.graph
    pairs = [jaccard(a, b) for i, a in enumerate(masks) for b in masks[:i]]
    low, middle, high = torch.tensor(pairs).quantile(torch.tensor([0.025, 0.5, 0.975])).tolist()
    frequency = masks.float().mean(0)
    ever = frequency.nonzero()
    ever = ever[torch.sort(frequency[tuple(ever.T)], descending=True, stable=True).indices]
    sizes = [int(mask.sum()) for mask in masks]
    chance = [expected_jaccard(names.n_edges, a, b) for i, a in enumerate(sizes) for b in sizes[:i]]
    return Stability(
        task.name, method, dict(reference_scores.options), vary, edges, len(task), sum(pairs) / len(pairs),
        (low, middle, high), sum(jaccard(mask, reference) for mask in masks) / times, sum(chance) / len(chance),
        tuple(f"{names.sources[s]}->{names.destinations[d]}" for s, d in ever.tolist()),
        tuple(frequency[tuple(ever.T)].tolist()), tuple(reference[tuple(ever.T)].tolist()), times, seed,
    )  # fmt: skip


def cut(scores: Scores, edges: int) -> Circuit:
    """The circuit of a fixed size, the way these scores allow."""
    return scores.top(edges) if scores.comparable else scores.grow(edges)


def jaccard(a: Tensor, b: Tensor) -> float:
    """Shared over all; 1 for two empty circuits."""
    return int((a & b).sum()) / max(int((a | b).sum()), 1) if (a | b).any() else 1.0


def _tasks(
    model: Model, task: Task, times: int, vary: str, fresh: Callable[[int], Task] | None, seed: int
) -> Iterator[tuple[Task, int]]:
    """What each circuit is found on, and the method's seed."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(1, times + 1):
        if vary == "examples":
            yield resampled(task, torch.randint(len(task), (len(task),), generator=generator)), seed
        elif vary == "method-seed":
            yield task, seed + i
        else:
            made = fresh(seed + i) if fresh is not None else make(task.name, model, n=len(task), seed=seed + i)
            yield replace(made, metric=task.metric), seed


def _check(task: Task, times: int, vary: str, fresh: Callable[[int], Task] | None) -> None:
    if vary not in VARIES:
        raise OptionError(f"got vary = {vary!r}, expected one of {', '.join(VARIES)}")
    if type(times) is not int or times < 2:
        raise OptionError(f"got times = {times!r}, expected at least 2 circuits to compare")
    if len(task) < 2:
        raise OptionError(f"task {task.name!r} has {len(task)} example, resampling needs at least 2; make a larger one")
    if vary == "task-seed" and fresh is None and task.name not in TASKS:
        raise OptionError(
            f"task {task.name!r} is not a registered one, so it cannot be made again; give fresh = a function of a seed"
        )
