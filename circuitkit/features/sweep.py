"""Direct effects of all sources on some targets, from one sweep through a local replacement model.

    A[t, s] = sum over sites w of  vector_t . (frozen maps from w to t) . write_{s,w}

`pull` goes from the targets down: gradients of all targets pass the layers once, each joins at its own layer, and every
writing site contracts them with what is written there. `push` goes from the sources up and is its twin: the same
numbers, at a cost that grows with sources instead of targets. With frozen patterns there is one copy of the prompt,
whatever the number of rows; later positions than the last target's are never touched.

    sum over s of A[t, s] + constant_t = value_t                   biases and errors are sources, so nothing is missing

Cost of one target at layer l and position p: l attention layers over p + 1 positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.features.frozen import BlockAttention, FrozenAttention
from circuitkit.features.local import Component, LocalModel, Reads, Stage, Writes

Effects = Float[Tensor, "target source"]
ENTRIES = (2**26, 2**20)  # of the tensors of rows that pass a component together: on an accelerator, on a CPU


def in_order(local: LocalModel, reads: Sequence[Reads]) -> list[Reads]:
    """Targets from the top down: the order of rows in every sweep."""
    return sorted(reads, key=lambda r: -local.ranks[r.site])


@torch.no_grad()
def pull(local: LocalModel, reads: Sequence[Reads]) -> Effects:
    """Effects by gradients that pass from the top down.

    Args:
        local: the local replacement model.
        reads: targets, in the order of `in_order`; rows are theirs, one after the other.
    """
    return _Pull(local, reads).effects()


class _Pull:
    """Gradients at the stream, one row for each target; those that have joined come first.

    Rows from ``fresh`` on have not passed attention since they joined: they are zero but at their own position (one in
    each prompt, where several are swept together), and components pass them on as single vectors.
    """

    def __init__(self, local: LocalModel, reads: Sequence[Reads]) -> None:
        self.local, self.reads = local, {r.site: r for r in reads}
        like = local.values[local.final]
        self.prompts = local.prompts
        rows = sum(len(r) for r in reads) // self.prompts
        last = max((int(r.positions.max()) for r in reads if len(r)), default=0)
        self.n = 1 + last if local.causal else len(local.tokens)
        self.positions = torch.cat([local.tokens[:0], *(r.positions for r in reads)]).view(-1, self.prompts)
        self.stream = like.new_zeros(rows, self.n, like.shape[1])
        self.out = like.new_zeros(rows, local.n_sources)
        self.joined = self.fresh = 0

    def effects(self) -> Effects:
        for step in reversed(self.local.steps):
            if isinstance(step, Stage):
                self._at_stream(step)
                continue
            above, alone = self.joined, len(step) == 1
            # All components of a step read the gradients above it; what they hand down is added behind the last.
            for add in [self._through(component, above, alone) for component in reversed(step)]:
                add()
            if any(isinstance(component[0].before, FrozenAttention | BlockAttention) for component in step):
                self.fresh = self.joined
        return self.out

    def _at_stream(self, stage: Stage) -> None:
        if stage.cut:
            contract(stage.outer, self.stream[: self.joined], self.out[: self.joined])
            self.stream[: self.joined] = 0
            self.fresh = self.joined
        if reads := self.reads.get(stage.site):
            rows = torch.arange(self.joined, self.joined + len(reads) // self.prompts, device=self.out.device)
            self.stream[self._points(rows)] += reads.vectors
            self.joined += len(rows)
        contract(stage.inner, self.stream[: self.joined], self.out[: self.joined])

    def _points(self, rows: Int[Tensor, " row"]) -> tuple[Int[Tensor, " point"], Int[Tensor, " point"]]:
        """Row and position of every target of some rows."""
        if self.prompts == 1:
            return rows, self.positions[rows, 0]
        return rows.repeat_interleave(self.prompts), self.positions[rows].flatten()

    def _through(self, component: Component, above: int, alone: bool) -> Callable[[], None]:
        """Pass gradients down a component; the result adds to the stream what comes out below."""
        some = self._groups(torch.arange(self.fresh, device=self.out.device))
        # Alone, a component may add to rows as it goes; beside another, not before that has read them.
        old = [] if alone else [(rows, self._down(component, rows)) for rows in some]
        points, rows = self._points_through(component, above)
        first = component[0].before

        def add() -> None:
            for group, pulled in ((r, self._down(component, r)) for r in some) if alone else old:
                if pulled is not None:
                    self.stream[group] += pulled
            for group in self._groups(rows) if first is not None else ():
                each = self._points(group)
                part = points[(group[0] - rows[0]) * self.prompts :][: len(each[0])]
                pulled = first.pull_points(part, each[1], self.n)  # type: ignore[union-attr]
                self.stream[group if pulled.dim() == 3 else each] += pulled

        return add

    def _groups(self, rows: Int[Tensor, " row"]) -> tuple[Int[Tensor, " some"], ...]:
        """As many rows together as make tensors of a few megabytes: more would not be faster, and take memory."""
        widest = max(value.shape[1] for value in self.local.values.values())
        at_once = ENTRIES[self.out.device.type == "cpu"] // (self.n * widest)
        return rows.split(max(1, at_once)) if len(rows) else ()

    def _down(self, component: Component, rows: Int[Tensor, " row"]) -> Tensor | None:
        """Gradients of rows that are spread over positions, behind a component; None if nothing comes through."""
        out, g = self.out[rows[0] : rows[-1] + 1], self.stream[rows[0] : rows[-1] + 1]
        for stage in reversed(component):
            if stage.cut:
                contract(stage.outer, g, out)
                return None
            contract(stage.inner, g, out)
            if stage.before is None:
                return None
            g = stage.before.pull(g)
        return g

    def _points_through(self, component: Component, above: int) -> tuple[Tensor, Int[Tensor, " row"]]:
        """Gradients of rows that are zero but at one position, above the lowest map of a component, and which rows.

        Targets inside the component join them.
        """
        first, rows = self.fresh, torch.arange(self.fresh, above, device=self.out.device)
        points: Tensor = self.stream[self._points(rows)]
        for i, stage in reversed(list(enumerate(component))):
            if stage.cut:
                contract_points(stage.outer, points, self._points(rows)[1], self.out[first : first + len(rows)])
                points, first, rows = points[:0], self.joined, rows[:0]
            if reads := self.reads.get(stage.site):
                # Rows of other components may lie between: they have nothing here.
                between = (self.joined - first) * self.prompts - len(points)
                gap = reads.vectors.new_zeros(between, reads.vectors.shape[1])
                points = torch.cat([part for part in (points, gap, reads.vectors) if len(part)])
                self.joined += len(reads) // self.prompts
                rows = torch.arange(first, self.joined, device=rows.device)
            contract_points(stage.inner, points, self._points(rows)[1], self.out[first : first + len(rows)])
            if stage.before is None:
                points, first, rows = points[:0], self.joined, rows[:0]
            elif i and len(rows):
                points = stage.before.pull_points(points, self._points(rows)[1], self.n)
        return points, rows


def contract(writes: Sequence[Writes], g: Float[Tensor, "row pos d"], out: Float[Tensor, "row source"]) -> None:
    """Add the products of gradients at one site with everything that is written there, each to its source's column."""
    for write in writes if len(g) else ():
        n = g.shape[1]
        count = write.before(n)
        if not count:
            continue
        padded, place = write.padded
        products = torch.bmm(g.transpose(0, 1)[: len(padded)], padded[:n].transpose(1, 2))
        flat = products.transpose(0, 1).flatten(1)
        if write.shared:
            out[:, write.first : write.first + write.prompts] += flat.unflatten(1, (write.prompts, -1)).sum(-1)
        else:
            out[:, write.first : write.first + count] += flat[:, place[:count]]


def contract_points(
    writes: Sequence[Writes],
    g: Float[Tensor, "point d"],
    positions: Int[Tensor, " point"],
    out: Float[Tensor, "row source"],
) -> None:
    """The same of gradients that are zero but at one position each, or at one in each prompt."""
    each = len(g) // max(len(out), 1)
    for write in writes if len(g) else ():
        padded, _ = write.padded
        starts = torch.tensor(write.starts, device=g.device)
        for some in torch.arange(len(g), device=g.device).split(64):
            some = some[positions[some] < len(padded)]
            at = positions[some]
            products = torch.bmm(padded[at], g[some][..., None])[..., 0]
            if write.shared:
                out[some // each, write.first + at * write.prompts // len(padded)] += products.sum(1)
                continue
            slot = torch.arange(products.shape[1], device=g.device)
            real = slot < (starts[at + 1] - starts[at])[:, None]
            columns = write.first + starts[at][:, None] + slot
            out[(some // each)[:, None].expand_as(columns)[real], columns[real]] += products[real]


@torch.no_grad()
def push(local: LocalModel, reads: Sequence[Reads], *, at_once: int = 1024) -> Effects:
    """Effects by vectors that pass from the bottom up; the same numbers as `pull`.

    Args:
        local: the local replacement model.
        reads: targets, in the order of `in_order`.
        at_once: how many sources go together.
    """
    parts = [_push(local, reads, span) for span in torch.arange(local.n_sources).split(at_once)]
    return torch.cat(parts, 1)


def _push(local: LocalModel, reads: Sequence[Reads], span: Int[Tensor, " source"]) -> Effects:
    start, stop = int(span[0]), int(span[-1]) + 1
    like = local.values[local.final]
    by_site, firsts = {r.site: r for r in reads}, dict[object, int]()
    total = 0
    for r in reads:
        firsts[r.site], total = total, total + len(r)
    out = like.new_zeros(total, stop - start)

    def write(writes: Sequence[Writes], x: Tensor) -> None:
        for w in writes:
            columns = w.first + (0 if w.shared else 1) * torch.arange(len(w.positions), device=x.device)
            inside = (columns >= start) & (columns < stop)
            x.index_put_((columns[inside] - start, w.positions[inside]), w.vectors[inside], accumulate=True)

    def read(stage: Stage, x: Tensor) -> None:
        if stage.site in by_site:
            r, first = by_site[stage.site], firsts[stage.site]
            out[first : first + len(r)] = torch.einsum("std,td->ts", x[:, r.positions], r.vectors)

    def through(stage: Stage, x: Tensor) -> Tensor:
        write(stage.inner, x)
        read(stage, x)
        if stage.cut:
            x = torch.zeros_like(x)
            write(stage.outer, x)
        return x

    stream = like.new_zeros(stop - start, *like.shape)
    for step in local.steps:
        if isinstance(step, Stage):
            stream = through(step, stream)
            continue
        added = [_up(component, stream, local, through) for component in step]
        stream = stream + torch.stack(added).sum(0)
    return out


def _up(component: Component, stream: Tensor, local: LocalModel, through: Callable[[Stage, Tensor], Tensor]) -> Tensor:
    x = stream
    for stage in component:
        width = local.values[stage.site].shape[1]
        fresh = stage.before is None
        x = x.new_zeros(*x.shape[:2], width) if fresh else stage.before.push(x)  # type: ignore[union-attr]
        x = through(stage, x)
    return x


def prefer_push(local: LocalModel, reads: Sequence[Reads]) -> bool:
    """Whether pushing sources up costs less than pulling targets down: layers times positions touched, in all."""
    length, top = len(local.tokens), local.final.layer
    down = sum(float((r.positions + 1).sum()) * (r.site.layer + 1) for r in reads)
    up = sum(len(nodes) * length * (top - max(nodes.site.layer, 0) + 1) for nodes in local.nodes)
    return up < down
