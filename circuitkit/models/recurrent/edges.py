"""Patching single edges of a recurrent network, many at once: each is a rank-one change of one reader.

    r_v(t) += W[v, u] ( corrupt a_u(t - lag) - a_u(t - lag) )        at the steps of the edge's window

``a_u`` is the patched run's own value: a weight-tied edge carries its corrupt value at every step. All edges share the
unpatched matrices, so a step costs one product over edges times examples; steps and blocks before the edge are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.models.recurrent.parts import FEATURES, Block, Link, Slot, Stage, Weights, Write
from circuitkit.models.recurrent.stepper import Values, outer_sums, plus, rows_of, run_block, shifted, through
from circuitkit.models.recurrent.view import View


@dataclass(frozen=True, eq=False)
class Chunk:
    """Edges of one link, in one pair of windows.

    Args:
        block, stage, link: where they are.
        slot: the slot of their readers.
        rows: of that slot in the link's matrix.
        writers: number of each edge's writer within the write.
        readers: number of each edge's reader within the slot.
        steps: at which the edges carry something.
        edges: row and column of each edge in the edge matrix.
    """

    block: Block
    stage: Stage
    link: Link
    slot: Slot
    rows: slice
    writers: Tensor
    readers: Tensor
    steps: Tensor
    edges: list[tuple[int, int]]


def simple(view: View) -> bool:
    """Whether every node is what its cell calls one, and no two links share an edge, so edges are rank-one changes."""
    if view.bases:
        return False
    for write in view.network.writes:
        if not torch.equal(
            view.writer_of[write.name].unique().repeat_interleave(write.width), view.writer_of[write.name]
        ):
            return False
    total = 0
    for _, stage in view.network.stages:
        for slot in stage.slots:
            numbers = view.reader_of[slot]
            if len(numbers.unique()) != slot.n or not torch.equal(numbers, numbers.sort().values):
                return False
        total += sum(int(view.link_mask(stage, link).sum()) for link in stage.links)
    return total == view.base.n_edges


def chunks(view: View, n_steps: int, rows: int) -> Iterator[Chunk]:
    """All possible edges, in groups of at most ``rows``."""
    mask = view.graph.mask.unflatten(0, view.shape[:2]).unflatten(2, view.shape[2:])
    for block, stage in view.network.stages:
        for link in stage.links:
            write = view.network.write(link.source)
            first_row, own = int(view.writer_of[link.source][0]), view.link_mask(stage, link)
            for slot, part in rows_of(stage, link):
                first_column = int(view.reader_of[slot][0])
                for ws, wd, steps in view.pairs(n_steps, link.lag, reverse=block.reverse):
                    allowed = mask[ws, first_row : first_row + write.n, wd, first_column : first_column + slot.n]
                    allowed = allowed & own[first_row:, first_column:][: write.n, : slot.n]
                    readers, writers = allowed.T.nonzero(as_tuple=True)
                    for u, v in zip(writers.split(rows), readers.split(rows), strict=True):
                        src = ws * view.shape[1] + first_row + u
                        dst = wd * view.shape[3] + first_column + v
                        edges = list(zip(src.tolist(), dst.tolist(), strict=True))
                        if edges:
                            yield Chunk(block, stage, link, slot, part, u, v, steps, edges)


@torch.no_grad()
def patched_features(
    view: View,
    clean: Mapping[str, Float[Tensor, "_ _ _"]],
    corrupt: Mapping[str, Float[Tensor, "_ _ _"]],
    chunk: Chunk,
    stop: int,
) -> tuple[Float[Tensor, "edge example step feature"], Bool[Tensor, "edge example"]]:
    """What the read-out reads with one edge corrupt at a time, and whether anything was changed.

    Args:
        clean: all writes of the clean run.
        corrupt: what each write carries along a removed edge.
        stop: steps from here on are not needed.
    """
    network = view.network
    x = clean[network.input.name]
    weights = Weights.of(network, x)
    stop = stop if network.causal else x.shape[-2]
    clean = {name: value[:, :stop] for name, value in clean.items()}
    first = int(chunk.steps[0]) if network.causal else 0
    if first >= stop:
        features = clean[FEATURES].expand(len(chunk.edges), -1, -1, -1)
        return features, torch.zeros(features.shape[:2], dtype=torch.bool, device=x.device)
    patch = _Patch(network.write(chunk.link.source), weights, clean, corrupt, chunk, stop)
    values: Values = dict(clean)
    blocks = (*network.blocks, network.readout)
    for block in blocks[next(i for i, b in enumerate(blocks) if b is chunk.block) :]:
        mine = block is chunk.block
        outer = outer_sums(block, values, weights)
        inner = _plain(weights)
        if mine and patch.inside:
            inner = patch.inner
        elif mine:
            outer[chunk.slot] = plus(outer[chunk.slot], patch.outer())
        before = _before(block, values, first)
        made = run_block(block, stop, outer, inner, weights, before=before, first=first)
        for name, y in made.items():
            y = y.expand(len(chunk.edges), len(x), *y.shape[-2:])
            head = clean[name][:, :first].expand(len(chunk.edges), -1, -1, -1)
            values[name] = y if y.shape[-2] == stop else torch.cat((head, y), -2)
    features = values[FEATURES]
    return features.expand(len(chunk.edges), len(x), *features.shape[-2:]), patch.changed


def _plain(weights: Weights):  # type: ignore[no-untyped-def]
    def inner(link: Link, value: Tensor, _step: int) -> Tensor:
        return through(value, weights.links[link])

    return inner


def _before(block: Block, values: Values, first: int) -> dict[str, list[Tensor]] | None:
    """What was written just before a step, for a block that is entered in the middle."""
    if first == 0 or not block.recurrent:
        return None
    back = range(max(0, first - max(block.memory, 1)), first)
    return {w.name: [values[w.name][..., t, :] for t in back] for w in block.writes}


class _Patch:
    """The edit of one chunk: what each edge adds to its reader."""

    def __init__(
        self, write: Write, weights: Weights, clean: Values, corrupt: Mapping[str, Tensor], chunk: Chunk, stop: int
    ) -> None:
        self.chunk, self.weights, self.stop = chunk, weights, stop
        self.inside = chunk.link.source in chunk.block.own
        source = chunk.link.source
        back = shifted(corrupt[source][:, :stop], chunk.link.lag, weights.starts[source], reverse=chunk.block.reverse)
        now = shifted(clean[source], chunk.link.lag, weights.starts[source], reverse=chunk.block.reverse)
        device = back.device
        u, v = chunk.writers.to(device), chunk.readers.to(device)
        self.numbers = (u[:, None] * write.width + torch.arange(write.width, device=device)).flatten()
        self.width = write.width
        self.matrix = self._matrix(u, v, write, chunk.slot)
        # The identity changes the very numbers that its writer holds; a matrix all numbers of its reader.
        self.target = v[:, None] * chunk.slot.width + torch.arange(chunk.slot.width, device=device)
        self.target = self.numbers.unflatten(0, (len(u), -1)) if self.matrix is None else self.target
        self.active = torch.zeros(stop, dtype=torch.bool, device=device)
        self.active[chunk.steps[chunk.steps < stop].to(device)] = True
        lag = chunk.link.lag
        real = torch.ones_like(self.active)
        real[stop - lag if chunk.block.reverse else 0 : stop if chunk.block.reverse else lag] = not lag
        self.active &= real  # what stands before the first step is the same in both runs
        self.steps = self.active.tolist()
        self.corrupt = self._pick(back)
        gap = self.through(self.corrupt - self._pick(now)) * self.active[:, None]
        self.gap, self.changed = gap, (gap != 0).flatten(2).any(-1)

    def _matrix(self, u: Tensor, v: Tensor, write: Write, slot: Slot) -> Float[Tensor, "edge source row"] | None:
        weight = self.weights.links[self.chunk.link]
        if weight is None:
            return None
        part = weight[:, self.chunk.rows].unflatten(0, (write.n, write.width)).unflatten(2, (slot.n, slot.width))
        return part[u, :, v]

    def _pick(self, values: Float[Tensor, "example step size"]) -> Float[Tensor, "edge example step source"]:
        """The numbers of each edge's writer."""
        return values[..., self.numbers].unflatten(-1, (-1, self.width)).movedim(-2, 0)

    def through(self, gap: Tensor) -> Float[Tensor, "edge example step row"]:
        """A change of each edge's writer as a change of its reader."""
        if self.matrix is None:
            return gap
        if self.width == 1:
            return gap * self.matrix[:, :, None] if gap.dim() == 4 else gap * self.matrix
        return (gap.flatten(1, -2) @ self.matrix).unflatten(1, gap.shape[1:-1])

    def outer(self) -> Float[Tensor, "edge example step size"]:
        """What the edges add from outside the block, for all steps."""
        out = self.gap.new_zeros(*self.gap.shape[:-1], self.chunk.slot.size)
        index = self.target[:, None, None].expand(*self.gap.shape)
        return out.scatter_(-1, index, self.gap)

    def inner(self, link: Link, value: Tensor, t: int) -> Tensor:
        """What a link of the block adds at a step, with each edge's own change."""
        chunk = self.chunk
        y = through(value, self.weights.links[link])
        if link is not chunk.link or not self.steps[t]:
            return y
        n, examples = len(chunk.edges), self.corrupt.shape[1]
        y = y.expand(n, examples, -1).clone()
        index = self.numbers.unflatten(0, (n, 1, self.width)).expand(-1, examples, -1)
        now = value.expand(n, examples, -1).gather(-1, index)
        gap = self.through(self.corrupt[:, :, t] - now)
        place = (self.target + chunk.rows.start)[:, None].expand(*gap.shape)
        return y.scatter_add_(-1, place, gap)
