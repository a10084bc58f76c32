"""Running circuits with positions: edges are cut in some spans only, and heads lose single queries, keys and values.

    x_v(pos)  = x(pos) + sum_u (1 - keep[span of pos, u, v]) (corrupt a_u - a_u)(pos)
    z_h(pos)  = attention of h in which a cut query, or the keys or values of a cut span, are the corrupt ones

What is cut inside a head depends on the span of the query and on the head, while a block has one set of keys for all
queries, and one for all heads of a group: so a block's attention runs once for every span of queries and every place in
a group, and each head's output is taken from the run that is right for it.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.models.attention import Attention, attentions, read_together
from circuitkit.models.calls import repeat_call
from circuitkit.models.circuits import Circuits
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, hooked, keeper
from circuitkit.models.wiring import Port, ReadSite
from circuitkit.positions import Layout
from circuitkit.shapes import Stream


@torch.no_grad()
def run_position_circuits(
    model: Model,
    run: Run,
    corrupt: tuple[Tensor, ...],
    keep: Bool[Tensor, "circuit src dst"],
    positions: Int[Tensor, "batch answer"],
    spans: Int[Tensor, "batch pos"],
    layout: Layout,
) -> Float[Tensor, "circuit example answer vocab"]:
    """Logits of several circuits with positions at once.

    Args:
        run: the clean run.
        corrupt: what each write site carries along a removed edge. A cut query, key or value is what its reader makes
            of a stream in which every writer is corrupt.
        keep: the edges of each circuit, in a graph with positions.
        positions: where logits are read.
        spans: number of each position's span, -1 for padding.
        layout: of that graph.
    """
    with model.quiet():
        return _PositionCircuits(model, run, corrupt, keep, spans, layout).logits(positions)


class _PositionCircuits(Circuits):
    """One call of `run_position_circuits`: block after block, because attention needs runs of its own."""

    def __init__(
        self, model: Model, run: Run, corrupt: tuple[Tensor, ...], keep: Tensor, spans: Tensor, layout: Layout
    ) -> None:
        possible = torch.zeros(layout.shape, dtype=torch.bool)
        possible[layout.row, layout.column] = True
        device = run.inputs[0].device
        # Edges that are not possible reach no answer; nothing is cut there.
        same, across = (t.to(device) for t in layout.split(possible & ~keep.cpu()))
        self.possible = layout.split(possible[None])[1].to(device)
        each = torch.arange(run.batch, device=device).expand(len(keep), -1)
        super().__init__(model, run, corrupt, ~same, each, 0)
        self.spans, self.across = spans[self.rows], across
        self.circuit = torch.arange(len(keep), device=device).repeat_interleave(run.batch)
        self.attentions = {attention.block: attention for attention in attentions(model)}

    def last(self) -> Stream:
        x = self.x
        for block in range(len(self.model.wiring.blocks)):
            x = self._block(block, x)
        return x

    def _block(self, block: int, x: Stream) -> Stream:
        """The stream behind one block, with its attention taken from `_attend`."""
        wiring, inside = self.model.wiring, self.attentions.get(block)
        hooks: list[Hook] = []
        mine = [site for site in wiring.read_sites if site.block == block and (not inside or site not in inside.reads)]
        if inside is not None:
            hooks.append((inside.heads.port, partial(_put, self._attend(inside, x))))
        hooks += [(w.port, partial(self.note, i)) for i, w in enumerate(wiring.write_sites) if w.block == block]
        hooks += [(port, keeper(self.streams, port)) for port in dict.fromkeys(site.stream for site in mine)]
        hooks += [(site.port, partial(self.edit, site)) for site in mine]
        with hooked(hooks):
            args, kwargs = repeat_call(self.run.calls[block], self.rows, self.run.batch)
            out = wiring.blocks[block](x, *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def _attend(self, inside: Attention, x: Stream) -> Float[Tensor, "row pos head width"]:
        """What the heads of a block write."""
        seen: dict[Port, Tensor] = {}
        hooks: list[Hook] = [(p, keeper(self.streams, p)) for p in dict.fromkeys(s.stream for s in inside.reads)]
        hooks += [(site.port, partial(self.edit, site)) for site in inside.reads]
        hooks += [(site.port, keeper(seen, site.port)) for site in inside.reads]
        z = self._replay(inside, x, hooks)
        cut, possible = (t[:, :, inside.heads.rows] for t in (self.across, self.possible))
        if not cut.any():
            return z
        current = [self._by_node(site, seen[site.port]) for site in inside.reads]
        corrupt = [read_together(site, self._all_corrupt(site)) for site in inside.reads]
        # Most heads of a small circuit lose everything in most spans: one run without any cut, one with all of them.
        bare = self._replay(inside, x, [(s.port, partial(_put, y)) for s, y in zip(inside.reads, corrupt, strict=True)])
        none, every = ~cut.any(3).any(1), (cut | ~possible).all(3).all(1)  # circuit, head, span of the query
        z = torch.where(self._at_positions(every & ~none)[..., None], bare, z)
        owners = [inside.owner(self.model, slot) for slot in range(3)]
        member = torch.tensor([owners[1][:h].count(owner) for h, owner in enumerate(owners[1])], device=x.device)
        some = ~none & ~every
        for query, place in (some.any(0)[:, :, None] & (member[:, None, None] == member.unique())).any(0).nonzero():
            heads = (member == place).nonzero().flatten()
            rows = some[:, heads, query].any(1)[self.circuit].nonzero().flatten()
            hooks = []
            for slot, site in enumerate(inside.reads):
                used = torch.zeros(site.n, dtype=torch.long, device=x.device)
                used[torch.tensor(owners[slot], device=x.device)[heads]] = heads
                lost = self._lost(cut[:, slot, :, :, query], used, rows, query if slot == 0 else None)
                hooks.append((site.port, partial(_put, torch.where(lost, corrupt[slot][rows], current[slot][rows]))))
            chosen = (
                self._at_positions(some & (member == place)[:, None])[rows] & (self.spans[rows] == query)[..., None]
            )
            z[rows] = torch.where(chosen[..., None], self._replay(inside, x[rows], hooks, rows), z[rows])
        return z

    def _at_positions(self, chosen: Bool[Tensor, "circuit head query"]) -> Bool[Tensor, "row pos head"]:
        """Whether each head is chosen at each position's own span."""
        where = self.spans.clamp(min=0)[:, None].expand(-1, chosen.shape[1], -1)
        return chosen[self.circuit].gather(2, where).transpose(1, 2) & (self.spans >= 0)[..., None]

    def _lost(
        self, cut: Bool[Tensor, "circuit head key"], used: Int[Tensor, " node"], rows: Tensor, query: Tensor | None
    ) -> Bool[Tensor, "row pos node one"]:
        """Where each reader is corrupt for the head that uses it: by the key's span, or everywhere for a query's."""
        cut = cut[:, used]
        if query is not None:
            return cut[self.circuit[rows]][:, None, :, query, None]
        return self._at_positions(cut)[rows][..., None]

    def _replay(
        self, inside: Attention, x: Stream, hooks: list[Hook], rows: Tensor | slice = slice(None)
    ) -> Float[Tensor, "row pos head width"]:
        z = self.model.replay_block(self.run, inside.block, x, self.rows[rows], hooks, inside.heads.port)
        return z.reshape(*z.shape[:2], inside.heads.n, -1)

    def _all_corrupt(self, site: ReadSite) -> Stream:
        moved = self.gaps[: self.model.wiring.writes_before(site)].sum(0)
        return at_least_float32(self.streams[site.stream]) + moved

    def _by_node(self, site: ReadSite, y: Tensor) -> Float[Tensor, "row pos node width"]:
        return at_least_float32(y).reshape(*y.shape[:2], site.n, -1)

    def product(self, columns: slice, seen: int) -> Tensor | None:
        """As in `Circuits`, with the removed edges of each position's own span."""
        drop = self.drop[:, :, :seen, columns]
        if not drop.any():
            return None
        real = (self.spans >= 0)[..., None, None]
        here = drop[self.circuit[:, None], self.spans.clamp(min=0)] & real  # row, pos, writer, reader
        here = here.flatten(0, 1).transpose(1, 2).to(self.gaps.dtype)
        total = here @ self.gaps[:seen].flatten(1, 2).transpose(0, 1)
        return total.transpose(0, 1).unflatten(1, self.spans.shape)


def _put(values: Tensor, y: Tensor) -> Tensor:
    return values.reshape(y.shape).to(y.dtype)
