"""Running circuits of a recurrent network: some edges carry what they would in the corrupt run.

    r_v(t) = b_v + sum over u of  W[v, u] ( keep[u, v] a_u(t - lag) + (1 - keep[u, v]) corrupt a_u(t - lag) )

``a_u`` is the circuit's own run, so an edit is felt at all later steps. Circuits are one axis of batched products; the
corrupt part does not depend on the run and is one product for all steps. Soft masks pass their gradient on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.models.recurrent.parts import FEATURES, Block, Link, Stage, Weights
from circuitkit.models.recurrent.stepper import outer_sums, plus, rows_of, run_block, shifted, through
from circuitkit.models.recurrent.view import View

Keep = Bool[Tensor, "circuit src dst"] | Float[Tensor, "circuit src dst"]


def run_masked(
    view: View,
    x: Float[Tensor, "_ example step size"],
    corrupt: Mapping[str, Float[Tensor, "_ _ _ _"]],
    keep: Keep,
) -> Float[Tensor, "_ example step feature"]:
    """What the read-out reads in each circuit.

    Args:
        view: nodes and windows, to which the rows and columns of ``keep`` belong.
        x: the input vectors, clean.
        corrupt: for each write what its removed edges carry (in the basis of its writers); the first axes may have
            size 1.
        keep: the edges of each circuit: booleans, or how much of each edge is left.
    """
    masks = _Masks(view, keep, x)
    weights = masks.weights
    values: dict[str, Tensor] = {view.network.input.name: x}
    for block in (*view.network.blocks, view.network.readout):
        outer = outer_sums(block, values, weights)
        kept: dict[tuple[Link, int, int], Tensor | None] = {}
        for stage in block.stages:
            for link in stage.links:
                inside = link.source in block.own
                moved = masks.removed(block, stage, link, corrupt[link.source], None if inside else values[link.source])
                if moved is not None:
                    outer |= {slot: plus(outer[slot], moved[..., rows]) for slot, rows in rows_of(stage, link)}
                if inside:
                    kept |= masks.kept(block, stage, link)
        values |= run_block(block, x.shape[-2], outer, masks.inner(block, weights, kept), weights)
    return values[FEATURES]


class _Masks:
    """What is left of each link's matrix in each circuit, and what the rest of it carries."""

    def __init__(self, view: View, keep: Keep, x: Tensor) -> None:
        self.view, self.n_steps, self.like = view, x.shape[-2], x
        drop = ~keep if keep.dtype == torch.bool else 1 - keep
        self.drop = drop.to(x.dtype).unflatten(1, view.shape[:2]).unflatten(3, view.shape[2:])
        self.weights = Weights.of(view.network, x)
        self.bases = {name: basis.to(x) for name, basis in view.bases.items()}

    def matrix(self, link: Link) -> Tensor | None:
        """A link's matrix ``[source, row]`` on the numbers that nodes count; None for the identity."""
        weight = self.weights.links[link]
        if link.source not in self.bases:
            return weight
        basis = self.bases[link.source].T
        return basis if weight is None else basis @ weight

    def counted(self, name: str, values: Tensor) -> Tensor:
        """A write in the basis of its writers."""
        return values @ self.bases[name] if name in self.bases else values

    def _dropped(self, stage: Stage, link: Link, ws: int, wd: int) -> Tensor:
        """How much of each entry of a link's matrix is removed: ``[circuit, source, row]``, or its diagonal."""
        rows = self.view.writer_of[link.source]
        columns = torch.cat([self.view.reader_of[stage.slot(name)] for name in link.slots])
        part = self.drop[:, ws, :, wd]
        if self.matrix(link) is None:
            return part[:, rows, columns]
        return part[:, rows][:, :, columns]

    def kept(self, block: Block, stage: Stage, link: Link) -> dict[tuple[Link, int, int], Tensor | None]:
        """For each pair of windows what is left of a link's matrix; None if nothing is removed."""
        found: dict[tuple[Link, int, int], Tensor | None] = {}
        for ws, wd, _ in self.view.pairs(self.n_steps, link.lag, reverse=block.reverse):
            drop, matrix = self._dropped(stage, link, ws, wd), self.matrix(link)
            if not drop.requires_grad and not drop.any():
                found[link, ws, wd] = None
            else:
                found[link, ws, wd] = (1 - drop)[:, None] if matrix is None else matrix * (1 - drop)
        return found

    def inner(self, block: Block, weights: Weights, kept: Mapping[tuple[Link, int, int], Tensor | None]):  # type: ignore[no-untyped-def]
        """What links inside a block add at a step."""
        window = self.view.window_of(self.n_steps).tolist()

        def inner(link: Link, value: Tensor, t: int) -> Tensor:
            back = t + link.lag if block.reverse else t - link.lag
            real = 0 <= back < self.n_steps
            matrix = kept.get((link, window[back] if real else window[t], window[t]))
            if matrix is None or not real:  # before the first step both runs hold the same
                return through(value, weights.links[link])
            value = self.counted(link.source, value)
            value = value if value.dim() > 1 else value.expand(len(self.drop), 1, -1)
            if self.matrix(link) is None:
                return value * matrix
            return value.expand(len(matrix), *value.shape[1:]) @ matrix

        return inner

    def removed(
        self, block: Block, stage: Stage, link: Link, corrupt: Tensor, current: Tensor | None
    ) -> Float[Tensor, "_ _ _ _"] | None:
        """What removed edges add for all steps: the corrupt value, less the current one where that is known."""
        found: Tensor | None = None
        for ws, wd, steps in self.view.pairs(self.n_steps, link.lag, reverse=block.reverse):
            drop, matrix = self._dropped(stage, link, ws, wd), self.matrix(link)
            if not drop.requires_grad and not drop.any():
                continue
            start = self.counted(link.source, self.weights.starts[link.source])
            value = corrupt if current is None else corrupt - self.counted(link.source, current)
            start = start if current is None else torch.zeros_like(start)
            value = shifted(value, link.lag, start, reverse=block.reverse)
            value = self._without_start(value, link, block) if current is None else value
            steps = steps.to(value.device)
            part = value if len(steps) == self.n_steps else value[..., steps, :]
            if matrix is None:
                y = part * drop[:, None, None]
            else:
                lead = torch.broadcast_shapes(part.shape[:2], (len(drop), 1))
                y = (part.expand(*lead, *part.shape[2:]).flatten(1, 2) @ (matrix * drop)).unflatten(1, (lead[1], -1))
            if len(steps) != self.n_steps:
                full = y.new_zeros(*y.shape[:-2], self.n_steps, y.shape[-1])
                y = full.index_copy(-2, steps, y)
            found = y if found is None else found + y
        return found

    def _without_start(self, value: Tensor, link: Link, block: Block) -> Tensor:
        """Before the first step a link reads the start whole, in the loop, so here it must add nothing."""
        keep = value.new_ones(self.n_steps, 1)
        lag = min(link.lag, self.n_steps)
        keep[self.n_steps - lag if block.reverse else 0 : self.n_steps if block.reverse else lag] = 0
        return value * keep


def rows_of_circuits(values: Tensor, each: Int[Tensor, "circuit example"] | None) -> Tensor:
    """Examples of a batch for each circuit: ``[circuit or 1, example, ...]``."""
    return values[None] if each is None else values[each]
