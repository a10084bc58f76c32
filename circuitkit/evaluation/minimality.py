"""Minimality: is every part of a circuit needed? (Wang et al. 2023, arXiv:2211.00593)

    score(v) = max over K of | F(C without K and v) - F(C without K) |          F: mean metric; K: some other parts of C

A part whose backup is in the circuit too seems useless until the backup is gone, so v is removed together with sets K:
none, random small ones, given ones, and greedily the best found so far with one part more. Parts are components (their
edges carry their corrupt value) or single edges. The maximum over random sets grows with their number: compare parts of
one run, not runs. Cost: one circuit per part and set, two per part, candidate and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.judge import Judge, check_counts, components
from circuitkit.measures import Contribution, Minimality
from circuitkit.models.hooked import Model
from circuitkit.shapes import EdgeMask
from circuitkit.tasks.base import Task

LARGEST_SET = 3


def minimality(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    level: str = "nodes",
    sets: int = 6,
    given: Sequence[Sequence[str]] = (),
    steps: int = 1,
    candidates: int = 3,
    corrupt_value: str | None = None,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Minimality:
    """Measure what every part of a circuit changes.

    Args:
        level: ``nodes`` or ``edges``.
        sets: how many random sets K of one to three parts.
        given: further sets K, by names of the circuit's components or edges.
        steps: how often the best set of each part is grown greedily.
        candidates: parts that are tried at each step.
        corrupt_value: what removed edges carry; by default what the circuit was scored with.

    Raises:
        GraphError: if the circuit belongs to another model's graph, or a given name is not one of its parts.
        OptionError: if the circuit has nothing to remove, or an option is out of range.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=16)
    >>> found = minimality(model, task, ck.score(model, task, "exact").top(3), level="edges", sets=2)
    >>> found.contributions[0].score > found.clean / 2
    True
    """
    check_counts(sets=sets, steps=steps, candidates=candidates)
    if level not in ("nodes", "edges"):
        raise OptionError(f"got level = {level!r}, expected 'nodes' or 'edges'")
    common = {"batch_size": batch_size, "budget": budget, "progress": progress, "seed": seed}
    judge = Judge.of(model, task, circuit, corrupt_value, common)
    search = _Search(judge, circuit, level, seed)
    search.try_sets([frozenset(), *search.random_sets(sets), *(search.named(names) for names in given)])
    for _ in range(steps):
        search.grow(candidates)
    return Minimality(
        task.name, task.metric.name, judge.corrupt_value, level, **judge.ends(circuit.mask),
        contributions=search.contributions(), n_edges=len(circuit), n_examples=len(task), seed=seed,
    )  # fmt: skip


class _Search:
    """The parts of one circuit, and the best set found for each so far."""

    def __init__(self, judge: Judge, circuit: Circuit, level: str, seed: int) -> None:
        self.judge, self.circuit = judge, circuit
        if level == "nodes":
            rows = components(circuit)
            self.names = [circuit.graph.sources[row] for row in rows]
            self.parts: list[Any] = rows
        else:
            self.names = circuit.edge_names()
            self.parts = list(zip(circuit.src.tolist(), circuit.dst.tolist(), strict=True))
        self.generator = torch.Generator().manual_seed(seed)
        self.scores = [-1.0] * len(self.parts)
        self.best: list[frozenset[int]] = [frozenset()] * len(self.parts)
        self.alone = [0.0] * len(self.parts)

    def without(self, removed: Iterable[int]) -> EdgeMask:
        mask = self.circuit.mask.clone()
        for part in removed:
            mask[self.parts[part]] = False
        return mask

    def random_sets(self, n: int) -> list[frozenset[int]]:
        """Sets of one to three parts; none where a circuit has a single part."""
        sizes = torch.randint(1, LARGEST_SET + 1, (n,), generator=self.generator).tolist()
        most = len(self.parts) - 1
        orders = [torch.randperm(len(self.parts), generator=self.generator).tolist() for _ in sizes]
        return [frozenset(order[: min(size, most)]) for order, size in zip(orders, sizes, strict=True)] if most else []

    def named(self, names: Sequence[str]) -> frozenset[int]:
        if unknown := sorted(set(names) - set(self.names)):
            raise GraphError(f"{unknown[0]!r} is not a part of this circuit; its parts are {', '.join(self.names[:8])}")
        return frozenset(self.names.index(name) for name in names)

    def try_sets(self, sets: list[frozenset[int]]) -> None:
        """Remove every part on top of every set."""
        sets = list(dict.fromkeys(sets))
        tried = [(k, v) for k in sets for v in range(len(self.parts)) if v not in k]
        means = self.judge.means(self.without(removed) for removed in (*sets, *(k | {v} for k, v in tried)))
        before = dict(zip(sets, means[: len(sets)], strict=True))
        for (k, v), after in zip(tried, means[len(sets) :], strict=True):
            self._note(v, k, abs(after - before[k]))

    def grow(self, candidates: int) -> None:
        """Add to each part's best set the one of a few candidates that raises its score most, if any does."""
        tried: list[tuple[int, frozenset[int]]] = []
        for v, best in enumerate(self.best):
            left = [part for part in range(len(self.parts)) if part != v and part not in best]
            order = torch.randperm(len(left), generator=self.generator)[:candidates].tolist()
            tried += [(v, best | {left[i]}) for i in order]
        if tried:
            means = self.judge.means(self.without(removed) for v, k in tried for removed in (k, k | {v}))
            for (v, k), before, after in zip(tried, means[::2], means[1::2], strict=True):
                self._note(v, k, abs(after - before))

    def _note(self, v: int, k: frozenset[int], score: float) -> None:
        if not k:
            self.alone[v] = score
        if score > self.scores[v]:
            self.scores[v], self.best[v] = score, k

    def contributions(self) -> tuple[Contribution, ...]:
        found = [
            Contribution(name, score, alone, tuple(self.names[part] for part in sorted(best)))
            for name, score, alone, best in zip(self.names, self.scores, self.alone, self.best, strict=True)
        ]
        return tuple(sorted(found, key=lambda part: -part.score))
