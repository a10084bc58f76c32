"""Running circuits: every reader's private stream with some edges carrying their corrupt value.

    x_v = x + sum_u (1 - keep[u, v]) (corrupt a_u - a_u)        x and a_u: those of the circuit's own run

``keep`` may be True and False, or numbers between 0 and 1 with a gradient (learned masks, integrated gradients along
edges). An edit upstream changes what is written downstream. Circuits are stacked on the batch axis.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.wiring import Port, ReadSite
from circuitkit.shapes import Stream

Keep = Bool[Tensor, "circuit src dst"] | Float[Tensor, "circuit src dst"]


def run_circuits(
    model: Model,
    run: Run,
    corrupt: tuple[Tensor, ...],
    keep: Keep,
    positions: Int[Tensor, "batch answer"],
    *,
    start: int = 0,
    each: Int[Tensor, "circuit example"] | None = None,
) -> Float[Tensor, "circuit example answer vocab"]:
    """Logits of several circuits at once, differentiable in ``keep`` and ``corrupt`` where these ask for a gradient.

    Args:
        run: the clean run.
        corrupt: what each write site carries along a removed edge.
        keep: the edges of each circuit: booleans, or how much of each edge is left.
        positions: where logits are read.
        start: first block that is replayed; no edge into a reader of an earlier block may be removed.
        each: which examples of the run each circuit sees; all of them by default.

    Returns:
        logits in float32 or better.
    """
    device = run.inputs[0].device
    each = torch.arange(run.batch, device=device).expand(len(keep), -1) if each is None else each.to(device)
    with model.quiet():
        return Circuits(model, run, corrupt, keep.to(device), each, start).logits(positions)


class Circuits:
    """One call of `run_circuits`: what its hooks share while the blocks run."""

    def __init__(
        self, model: Model, run: Run, corrupt: tuple[Tensor, ...], keep: Keep, each: Tensor, start: int
    ) -> None:
        self.model, self.run, self.corrupt, self.start = model, run, corrupt, start
        self.n, self.examples, self.rows = len(keep), each.shape[1], each.flatten()
        mask = model.graph.mask.to(keep.device)
        if keep.dtype == torch.bool:
            self.drop = mask & ~keep
        else:
            self.drop = torch.where(mask, 1 - keep, torch.zeros((), dtype=keep.dtype, device=keep.device))
        self.streams: dict[Port, Tensor] = {}
        self.moved: dict[Port, tuple[int, Tensor | None]] = {}  # the latest: readers of one stream share one product
        self.x = run.inputs[start][self.rows]
        # corrupt - current of every write so far; the same tensors with their gradients where one is wanted
        like = at_least_float32(self.x[:0])
        self.gaps = like.new_empty(len(model.graph.sources), *self.x.shape)
        self.traced: dict[int, Tensor] = {}
        for i, site in enumerate(model.wiring.write_sites):
            if site.block < start or site.block < 0:
                gap = site.expand(at_least_float32(corrupt[i]) - at_least_float32(run.writes[i]))
                self._add_gap(i, gap[:, self.rows])

    def logits(self, positions: Int[Tensor, "batch answer"]) -> Float[Tensor, "circuit example answer vocab"]:
        """Logits of every circuit on its examples."""
        last = self.last()
        moved = self._shift(self.model.wiring.read_sites[-1])
        last = last if moved is None else (at_least_float32(last) + moved[0]).to(last.dtype)
        return self.model.logits(last, positions[self.rows]).unflatten(0, (self.n, self.examples))

    def last(self) -> Stream:
        """The stream behind the last block."""
        wiring, hooks = self.model.wiring, list[Hook]()
        for i, written in enumerate(wiring.write_sites):
            if written.block >= self.start and written.block >= 0:
                hooks.append((written.port, partial(self.note, i)))
        inner = [site for site in wiring.read_sites if self.start <= site.block < len(wiring.blocks)]
        hooks += [(port, keeper(self.streams, port)) for port in dict.fromkeys(site.stream for site in inner)]
        hooks += [(site.port, partial(self.edit, site)) for site in inner]
        return self.model.replay(self.run, self.start, self.x, self.rows, hooks)

    def note(self, i: int, tensor: Tensor) -> None:
        """Take in what a write site wrote in this run."""
        site = self.model.wiring.write_sites[i]
        current = site.kept(tensor.reshape(*tensor.shape[:2], site.n, -1))
        other = self.corrupt[i][self.rows]
        if torch.is_grad_enabled():
            self._add_gap(i, site.expand(at_least_float32(other) - at_least_float32(current)))
        else:
            site.difference(other, current, out=self.gaps[site.rows])

    def _add_gap(self, i: int, gap: Tensor) -> None:
        self.gaps[self.model.wiring.write_sites[i].rows] = gap.detach()
        if gap.requires_grad:
            self.traced[i] = gap

    def edit(self, site: ReadSite, y: Tensor) -> Tensor | None:
        """What a site's readers make of their private streams; None if no edge into them is removed."""
        moved = self._shift(site)
        if moved is None:
            return None
        values = site.read(at_least_float32(self.streams[site.stream]) + moved)
        return values.movedim(0, 2).reshape(y.shape).to(y.dtype)

    def _shift(self, site: ReadSite) -> Stream | None:
        """What removed edges add to each reader's stream: [reader, row, pos, d]; None if no edge is removed."""
        group = [s for s in self.model.wiring.read_sites if s.stream == site.stream and s.block == site.block]
        columns = slice(group[0].first, group[-1].columns.stop)
        if site.stream not in self.moved:
            product = self.product(columns, self.model.wiring.writes_before(site))
            self.moved = {site.stream: (columns.start, product)}
        first, moved = self.moved[site.stream]
        return None if moved is None else moved[site.first - first :][: site.n]

    def product(self, columns: slice, seen: int) -> Tensor | None:
        """What the removed edges from the first ``seen`` writers add to the streams of some readers."""
        drop = self.drop[:, :seen, columns]
        if not drop.requires_grad and not drop.any():
            return None
        drop = drop.to(self.gaps.dtype).transpose(1, 2)  # circuit, reader, writer
        sites = self.model.wiring.write_sites
        traced = [(sites[i].rows, gap) for i, gap in self.traced.items() if sites[i].first < seen]
        rows = [row for row, _ in traced]
        return _Product.apply(drop, self.gaps[:seen], rows, *(gap for _, gap in traced))


class _Product(torch.autograd.Function):
    """drop @ gaps for all writers so far, as one product each way.

    Every reader needs all writers before it. Autograd would want them joined anew for each layer, and would keep each
    copy for the backward pass; here they lie side by side in one buffer, whose rows are written once.
    """

    @staticmethod
    def forward(ctx: Any, drop: Tensor, gaps: Tensor, rows: list[slice], *traced: Tensor) -> Tensor:
        ctx.drop, ctx.gaps, ctx.rows = drop, gaps, rows
        n = len(drop)
        total = drop @ gaps.reshape(len(gaps), n, -1).transpose(0, 1)
        return total.transpose(0, 1).reshape(drop.shape[1], *gaps.shape[1:])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        drop, gaps = ctx.drop, ctx.gaps
        slope = slope.reshape(len(slope), len(drop), -1).transpose(0, 1)  # circuit, reader, everything else
        of_drop = slope @ gaps.reshape(len(gaps), len(drop), -1).permute(1, 2, 0) if ctx.needs_input_grad[0] else None
        of_gaps: list[Tensor] = []
        for row in ctx.rows:
            back = drop[:, :, row].transpose(1, 2) @ slope
            of_gaps.append(back.transpose(0, 1).reshape(back.shape[1], *gaps.shape[1:]))
        return of_drop, None, None, *of_gaps
