"""Effects of all sources on some targets in a frozen recurrence, from one sweep backward in time.

    G[w, t]  = sum over links w -> v with lag d  of  W^T g[v, t + d]        gradient at a write
    g[v, t]  = sum over writes w of  D[w <- v, t]^T G[w, t]                 gradient at a slot; D: gates and secants
    A[row, s] = G[w, t] . vector of s                                      where s stands at write w, step t

Blocks are passed from the last to the first, the steps of each against its direction; rows of gradients
``[row, width]`` go back one step at a time, and targets join at their own step. Where a write is cut, what was read
there goes to its nodes and no further. Cost: rows x steps x (numbers in slots) x (numbers in writes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.features.recurrent_local import FrozenRecurrence
from circuitkit.models.recurrent.parts import Block, Link, Stage
from circuitkit.models.recurrent.stepper import rows_of

Effects = Float[Tensor, "target source"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Targets that read one write at one step, before its nodes stand there, or behind them.

    Args:
        write: which.
        step: which.
        vectors: one for each target.
        constants: added to each product.
        values: each target's number in the run.
        nodes: the column of each target, or -1.
        parts: for targets that read several writes or steps behind their nodes (a read-out): what they read, by write,
            ``[target, step, size]``; then write and step are not used.
    """

    write: str
    step: int
    vectors: Float[Tensor, "target _"]
    constants: Float[Tensor, " target"]
    values: Float[Tensor, " target"]
    nodes: Int[Tensor, " target"]
    parts: Mapping[str, Float[Tensor, "target step _"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)

    def split(self, size: int) -> list[Rows]:
        """The same targets, at most so many together."""
        spans = torch.arange(len(self)).split(size)
        return [
            Rows(
                self.write, self.step, self.vectors[i], self.constants[i], self.values[i], self.nodes[i],
                {name: part[i] for name, part in self.parts.items()},
            )
            for i in spans
        ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """What stands at one write and step.

    Args:
        columns: of its nodes.
        vectors: of each, whole; or one factor for each of the numbers in ``at``.
        at: which numbers, where each node is one of them.
    """

    columns: Int[Tensor, " node"]
    vectors: Float[Tensor, "node _"] | Float[Tensor, " node"]
    at: Int[Tensor, " node"] | None = None

    def add(self, g: Float[Tensor, "row size"], out: Effects) -> None:
        """Add the products of gradients with every vector to the nodes' columns."""
        found = g @ self.vectors.T if self.at is None else g[:, self.at] * self.vectors
        out.index_add_(1, self.columns, found)


@dataclass(frozen=True, eq=False)
class Standing:
    """All sources of a sweep.

    Args:
        n: how many columns.
        at: by write and step.
        cut: writes behind whose nodes nothing is passed on.
        bias: column of each block's constants, by stem; the read-out's under ``"logits"``.
        start: for some writes the column of the vector before the first step.
        before: for some writes the column of what was there before the window.
        first: first step of the window.
    """

    n: int
    at: Mapping[tuple[str, int], Source]
    cut: frozenset[str]
    bias: Mapping[str, int]
    start: Mapping[str, int]
    before: Mapping[str, int]
    first: int


@torch.no_grad()
def sweep(local: FrozenRecurrence, standing: Standing, rows: Sequence[Rows], last: int) -> Effects:
    """Effects of every source on targets, in the order of ``rows``.

    Args:
        local: the frozen run.
        standing: the sources.
        rows: read-outs first, then from the last stage to the first.
        last: last step that any of them depends on.
    """
    return _Sweep(local, standing, rows, last).effects()


class _Sweep:
    """Gradients at all writes from ``low`` to ``high``, steps beyond the run and the window included."""

    def __init__(self, local: FrozenRecurrence, standing: Standing, rows: Sequence[Rows], last: int) -> None:
        self.local, self.standing, self.rows = local, standing, list(rows)
        first = standing.first
        if local.network.causal and not any(r.parts for r in rows):
            last = max(r.step for r in rows)
            if len(standing.cut) + 1 >= len(local.order):
                first = max(first, min(r.step for r in rows) - local.lag)  # nothing passes the nodes before
        self.first, self.last = first, last
        self.low, self.high = first - local.lag, last + (0 if local.network.causal else local.lag)
        total = sum(len(r) for r in rows)
        self.g = {
            write.name: local.like.new_zeros(total, self.high - self.low + 1, write.size)
            for write in local.network.writes
        }
        self.out = local.like.new_zeros(total, standing.n)
        self.joined = 0

    def effects(self) -> Effects:
        while self.rows and self.rows[0].parts:
            self._join_behind(self.rows.pop(0))
        for block in reversed(self.local.network.blocks):
            self._through(block)
        name = self.local.network.input.name
        for step in range(self.first, self.last + 1):
            self._contract(name, step)
        self._beyond(name)
        return self.out

    def _join_behind(self, rows: Rows) -> None:
        here = slice(self.joined, self.joined + len(rows))
        for name, part in rows.parts.items():
            self.g[name][here, self.first - self.low : self.last + 1 - self.low] += part[:, self.first : self.last + 1]
        self.out[here, self.standing.bias["logits"]] += rows.constants
        # What they read before the window.
        for name, part in rows.parts.items():
            early = part[:, : self.first]
            if early.shape[1] and bool(early.any()):
                value = self.local.values[name][: self.first]
                self.out[here, self.standing.before[name]] += torch.einsum("rtd,td->r", early, value)
        self.joined += len(rows)

    def _through(self, block: Block) -> None:
        """Pass gradients from what a block writes to what it reads, the last step first."""
        steps = range(self.first, self.last + 1)
        ordered = list(steps if block.reverse else reversed(steps))
        n = len(self.g[self.local.network.input.name])
        slots = {s: self.local.like.new_zeros(n, len(steps), s.size) for stage in block.stages for s in stage.slots}
        spans = [slice(t, t + 1) for t in ordered] if block.recurrent else [slice(self.first, self.last + 1)]
        for span in spans:
            for stage in reversed(block.stages):
                self._stage(block, stage, span, slots)
        for stage in block.stages:
            for link in stage.links:
                if link.source not in block.own:
                    g = torch.cat([slots[slot] for slot, _ in rows_of(stage, link)], -1)
                    self._link(block, link, g, slice(self.first, self.last + 1))
            for slot in stage.slots:
                bias = self.local.weights.biases[slot]
                if bias is not None:
                    self.out[:, self.standing.bias[block.stem]] += slots[slot].sum(1) @ bias
        for write in block.writes:
            self._beyond(write.name)

    def _stage(self, block: Block, stage: Stage, span: slice, slots: dict) -> None:  # type: ignore[type-arg]
        frozen, by_name = self.local.frozen[stage], {slot.name: slot for slot in stage.slots}
        at = slice(span.start - self.low, span.stop - self.low)
        inner = slice(span.start - self.first, span.stop - self.first)
        for write in reversed(stage.writes):
            order = range(span.start, span.stop)
            for step in order if block.reverse else reversed(order):
                self._at_write(block, write.name, step)
            g = self.g[write.name][: self.joined, at]
            for term in (term for term in frozen.terms if term.write == write.name):
                passed = term.pull(g, span)
                if term.source in by_name:
                    slots[by_name[term.source]][: self.joined, inner] += passed
                else:
                    self.g[term.source][: self.joined, at] += passed
            if write.name in frozen.constants:
                constant = frozen.constants[write.name][span]
                self.out[: self.joined, self.standing.bias[block.stem]] += torch.einsum("rtd,td->r", g, constant)
        for link in stage.links:
            if link.source in block.own:
                found = [slots[slot][: self.joined, inner] for slot, _ in rows_of(stage, link)]
                self._link(block, link, torch.cat(found, -1), span)

    def _link(self, block: Block, link: Link, g: Float[Tensor, "row step slot"], span: slice) -> None:
        weight = self.local.weights.links[link]
        back = link.lag if block.reverse else -link.lag
        at = slice(span.start + back - self.low, span.stop + back - self.low)
        self.g[link.source][: len(g), at] += g if weight is None else g @ weight.T

    def _at_write(self, block: Block, name: str, step: int) -> None:
        """Give what was read to the nodes that stand here, and let targets join."""
        self._contract(name, step)
        if name in self.standing.cut:
            self.g[name][: self.joined, step - self.low] = 0
        while self.rows and (self.rows[0].write, self.rows[0].step) == (name, step):
            rows = self.rows.pop(0)
            here = slice(self.joined, self.joined + len(rows))
            self.g[name][here, step - self.low] += rows.vectors
            self.out[here, self.standing.bias[block.stem]] += rows.constants
            self.joined += len(rows)

    def _contract(self, name: str, step: int) -> None:
        source = self.standing.at.get((name, step))
        if source is not None:
            source.add(self.g[name][: self.joined, step - self.low], self.out[: self.joined])

    def _beyond(self, name: str) -> None:
        """Give what was read outside the window to the start or to what stands for the steps before."""
        for step in (*range(self.low, self.first), *range(self.last + 1, self.high + 1)):
            g = self.g[name][:, step - self.low]
            inside = 0 <= step < self.local.steps
            column = (self.standing.before if inside else self.standing.start).get(name)
            if column is not None and (not inside or step < self.standing.first):
                value = self.local.values[name][step] if inside else self.local.weights.starts[name]
                self.out[:, column] += g @ value
