"""Removing edges one group after the other, each judged by what it does to the metric: the core of ACDC.

    r(g) = M(circuit) - M(circuit without g)           M: mean of the metric over the whole task
    r(g) < tau  drops g for good;   else a single edge is kept, and a larger group is halved

Readers are taken from the logits down, so what feeds the readers in hand is still as in the clean run, and a test
computes only what the removed edges change. Tests run on the batch axis, as a chain that assumes what each will decide;
what follows the first wrong assumption is measured again. The result is that of one test after the other.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from operator import xor
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.stats import Moments
from circuitkit.graph import Graph
from circuitkit.methods.base import corrupt_writes, matrix_bytes, with_reference
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.shapes import EdgeMask
from circuitkit.tasks.base import Batch, Task

Group = tuple[int, int]  # first, and last + 1, of some consecutive edges of a stage
Width = int | Literal["auto"]
FIRST, WIDEST, RECENT = 8, 64, 9


@dataclass(frozen=True)
class Rule:
    """When an edge or a group is dropped, and how many tests run together.

    Args:
        tau: threshold on how much the metric falls.
        magnitude: whether a rise of the metric counts as much as a fall.
        width: most tests at a time; ``"auto"`` adapts it to how well decisions are guessed.
    """

    tau: float
    magnitude: bool
    width: Width = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 <= self.tau < math.inf:
            raise OptionError(
                f"got tau = {self.tau!r}, expected a number of at least 0: an edge is dropped if that lowers the "
                "metric by less"
            )
        if self.width != "auto" and (type(self.width) is not int or self.width < 1):
            raise OptionError(f"got width = {self.width!r}, expected 'auto' or how many tests run together, 1 or more")

    def drops(self, r: float) -> bool:
        """Whether a group with this effect is dropped."""
        return (abs(r) if self.magnitude else r) < self.tau


class Judge:
    """Metric of circuits over a whole task, from clean and corrupt runs that are recorded once and held."""

    def __init__(self, model: Model, task: Task, plan: Plan, corrupt_value: str) -> None:
        corrupt_of = corrupt_writes(model, task, plan, corrupt_value)

        def record(batch: Batch, _plan: Plan) -> tuple[Batch, Any]:
            of = corrupt_of or (lambda _run: model.record(batch.corrupt).writes)
            held = model.removals(batch.clean, batch.positions, of)
            return with_reference(model, task, batch, held.run), held

        self.model, self.task, self.plan = model, task, replace(plan, progress=False)
        self.circuits_run = 0
        self._parts = list(plan.over(task, model.device, "runs", lambda b: 2 * matrix_bytes(model, b), record))

    def at_once(self, columns: Sequence[int]) -> int:
        """How many circuits fit into one pass."""
        sizes = [held.bytes_per_circuit(columns) for _, held in self._parts]
        return self.plan.rows(max(sizes), self.model.device)

    def alive(self) -> Bool[Tensor, " dst"]:
        """Readers that still lead to the logits."""
        return self._parts[0][1].alive

    def differs(self) -> Bool[Tensor, " src"]:
        """Writers whose corrupt value is not, on every example, exactly what they wrote in the clean run."""
        out = torch.zeros(len(self.model.graph.sources), dtype=torch.bool)
        for _, held in self._parts:
            out |= self.model.differs(held.run.writes, held.corrupt)
        return out

    def settle(self, keep: EdgeMask, columns: Sequence[int]) -> None:
        """Take what is left of the circuit in hand in its place."""
        for _, held in self._parts:
            held.settle(keep, columns)

    def metric(self, keep: Bool[Tensor, "circuit src dst"], columns: Sequence[int]) -> Float[Tensor, "circuit example"]:
        """The metric of circuits on each example; they are the one in hand without more edges into these readers."""
        self.circuits_run += len(keep)
        return torch.cat([self._part(keep, columns, *part) for part in self._parts], 1)

    def _part(self, keep: Tensor, columns: Sequence[int], batch: Batch, held: Any) -> Tensor:
        values: list[Tensor] = []
        done, size = 0, held.bytes_per_circuit(columns)
        while done < len(keep):
            some = keep[done : done + self.plan.rows(size, self.model.device)]
            try:
                logits = held.logits(some, columns)
                many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(some)))
                found = self.task.metric(logits.flatten(0, 1), many).unflatten(0, (len(some), -1))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                self.plan = self.plan.halved(error, len(some), size, self.model.device)
                continue
            values.append(found.cpu().double())
            done += len(some)
        return torch.cat(values)


@dataclass(frozen=True)
class Trial:
    """One test of a chain: what is removed, the codes of what is gone before and after, and what is left."""

    group: Group
    before: int
    after: int
    left: EdgeMask


@dataclass
class Stage:
    """Edges into readers that compute at the same time, in the order of their tests, and what is known of them.

    Args:
        edges: rows and columns.
        columns: the readers.
        codes: for each beginning of the edges a number that stands for its set, so that `code` tells groups apart.
        stack: groups that are still to be tested, the next one last.
        guess: which groups are expected to be dropped, where anything is known.
        measured: per-example metric of circuits, by the code of what is gone.
        tests: codes of the circuits that decisions rest on.
    """

    edges: Int[Tensor, "edge two"]
    columns: list[int]
    codes: list[int]
    stack: list[Group]
    guess: dict[Group, bool] = field(default_factory=dict)
    measured: dict[int, Tensor] = field(default_factory=dict)
    tests: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, edges: Int[Tensor, "edge two"], columns: list[int], *, groups: bool) -> Stage:
        """All edges of a stage as one group, or each by itself."""
        draw = random.Random(0)
        codes = list(accumulate((draw.getrandbits(96) for _ in edges), xor, initial=0))
        stack = [(0, len(edges))] if groups else [(i, i + 1) for i in reversed(range(len(edges)))]
        return cls(edges, columns, codes, stack)

    def expected(self, group: Group, *, usual: bool) -> bool:
        """Whether a group is expected to be dropped; ``usual``: what happens to edges of which nothing is known."""
        return self.guess.get(group, usual or group[1] - group[0] > 1)

    def chain(self, code: int, keep: EdgeMask, width: int, *, usual: bool) -> list[Trial]:
        """The next tests if all guesses are right, with at most ``width`` circuits that are not measured yet."""
        ahead, chain, new = list(self.stack), list[Trial](), set[int]()
        while ahead and len(new) < width:
            group = ahead.pop()
            src, dst = self.edges[slice(*group)].T
            left = keep.clone()
            left[src, dst] = False
            test = Trial(group, code, code ^ self.codes[group[0]] ^ self.codes[group[1]], left)
            chain.append(test)
            new |= {test.after} - self.measured.keys()
            if self.expected(group, usual=usual):
                code, keep = test.after, left
            elif group[1] - group[0] > 1:
                ahead += halves(group)
        return chain


class Search:
    """One search through all edges of a graph: what is left of the model, and what was measured on the way."""

    def __init__(self, judge: Judge, rule: Rule, plan: Plan) -> None:
        self.judge, self.rule, self.plan = judge, rule, plan
        self.graph = judge.model.graph
        self.width = FIRST if rule.width == "auto" else rule.width
        self.keep = self.graph.mask.clone()
        self.effects: list[tuple[Tensor, Tensor]] = []  # edges tested by themselves, and the effect on each example
        self.recent: deque[bool] = deque([True], maxlen=RECENT)  # whether the last single edges were dropped
        self.evaluations, self.drops = 0, 0

    def run(self, order: Callable[[Int[Tensor, " src"]], Int[Tensor, " src"]], *, groups: bool) -> Scores:
        """Test every edge that can matter and return what is kept.

        Args:
            order: puts the senders of a reader into the order of their tests.
            groups: whether to begin with whole stages instead of single edges.
        """
        carried = self.judge.differs()
        # An edge that carries no difference has r = 0 exactly.
        silent = ~carried[:, None] & self.graph.mask & self.rule.drops(0.0)
        with self.plan.bar(self.graph.n_edges, "edges") as bar:
            before: list[int] = []
            for columns in stages(self.graph):
                self.judge.settle(self.keep, before)
                into = self.keep[:, columns] & self.judge.alive()[columns]
                self.keep[:, columns] = into & ~silent[:, columns]
                into = into & carried[:, None]
                bar.update(int((self.graph.mask[:, columns] & ~into).sum()))
                found = [(order(into[:, i].nonzero().flatten()), columns[i]) for i in reversed(range(len(columns)))]
                edges = torch.cat([torch.stack((src, torch.full_like(src, v)), 1) for src, v in found])
                if len(edges):
                    self._stage(Stage.of(edges, columns, groups=groups), bar)
                before = columns
        return self._scores()

    def _stage(self, stage: Stage, bar: Any) -> None:
        code = 0
        while stage.stack:
            usual = 2 * sum(self.recent) >= len(self.recent)
            chain = stage.chain(code, self.keep, self.width, usual=usual)
            new = {code: self.keep} | {test.after: test.left for test in chain}
            new = {key: left for key, left in new.items() if key not in stage.measured}
            if new:
                found = self.judge.metric(torch.stack(list(new.values())), stage.columns)
                stage.measured.update(zip(new, found, strict=True))
            code = self._decide(stage, chain, code, usual, bar)
        self.evaluations += len(stage.tests)

    def _decide(self, stage: Stage, chain: list[Trial], code: int, usual: bool, bar: Any) -> int:
        """Decide the tests of a chain up to the first wrong guess; returns the code of what is gone then."""
        right = True
        for test in chain:
            change = stage.measured[test.before] - stage.measured[test.after]
            drop = self.rule.drops(float(change.mean()))
            if not right:
                # Measured on another circuit than the one in hand, but the best guess there is.
                stage.guess[test.group] = drop
                continue
            stage.stack.pop()
            stage.tests.add(test.after)
            size = test.group[1] - test.group[0]
            if size == 1:
                self.effects.append((stage.edges[test.group[0]], change))
                self.recent.append(drop)
            if drop:
                self.keep, code, self.drops = test.left, test.after, self.drops + 1
            elif size > 1:
                stage.stack += halves(test.group)
            if drop or size == 1:
                bar.update(size)
            right = drop == stage.expected(test.group, usual=usual)
            stage.guess[test.group] = drop
        if self.rule.width == "auto":
            most = min(WIDEST, self.judge.at_once(stage.columns))
            self.width = max(1, min(most, self.width * 2 if right else max(FIRST, self.width // 2)))
        return code

    def _scores(self) -> Scores:
        values, stderr = torch.zeros(2, *self.keep.shape)
        if self.effects:
            src, dst = torch.stack([edge for edge, _ in self.effects]).T
            moments = Moments()
            moments.add(torch.stack([change for _, change in self.effects], 1))
            values[src, dst], stderr[src, dst] = moments.mean.float(), moments.stderr.float()
        count = {"evaluations": self.evaluations, "drops": self.drops, "circuits_run": self.judge.circuits_run}
        return Scores(
            values, self.graph, "", stderr=stderr, selected=self.keep, n_examples=len(self.judge.task), provenance=count
        )


def halves(group: Group) -> list[Group]:
    """The second half and the first, so that the first is taken from a stack first."""
    middle = (group[0] + group[1] + 1) // 2
    return [(middle, group[1]), (group[0], middle)]


def stages(graph: Graph) -> Iterator[list[int]]:
    """Columns of the readers that compute at the same time, from the logits down."""
    nodes = graph.destination_nodes
    columns = sorted(range(len(nodes)), key=lambda v: nodes[v].stage)
    found = [list(group) for _, group in groupby(columns, key=lambda v: nodes[v].stage)]
    yield from reversed(found)
