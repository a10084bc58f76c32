"""The parts of a block, each a function from what its readers make of the stream to what its writers write.

Attention is one part, an MLP another. Most of the time only a few nodes of a part are wanted, in many circuits at once.
So heads that all do the same with their own queries, keys and values are filled with different circuits, as many as fit
into one replay; and an MLP whose inside is known is computed without the rest of its block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook
from circuitkit.models.wiring import MlpParts, ReadSite, Wiring, WriteSite
from circuitkit.shapes import EdgeMask

SAME = 1e-5


@dataclass(frozen=True, eq=False)
class Part:
    """What a block computes between some of its reads and one write site.

    Args:
        reads: the sites that feed the write site.
        written: the write site.
        place: its number among the model's write sites.
        pointwise: the map from what its one reader makes of the stream to what is written, up to a constant, where it
            is known and acts on each position by itself; else the block is replayed.
        groups: how many groups of nodes compute the same function, each of its own reads (a key/value head with the
            queries that use it); 1 if they are not alike.
    """

    reads: tuple[ReadSite, ...]
    written: WriteSite
    place: int
    pointwise: Callable[[Tensor], Tensor] | None = None
    groups: int = 1

    @cached_property
    def columns(self) -> dict[int, ReadSite]:
        """Columns of all its readers, in order, with the site of each."""
        return {v: site for site in self.reads for v in range(site.first, site.columns.stop)}

    def size(self, site: ReadSite | WriteSite) -> int:
        """How many nodes of a site belong to each group."""
        return site.n // self.groups

    def replayed(
        self, model: Model, run: Run, values: Mapping[ReadSite, Float[Tensor, "time batch pos node width"]]
    ) -> Float[Tensor, "time batch pos node width"]:
        """What is written when the readers make these values of the stream, from a replay of the block up to there."""
        times, site = len(values[self.reads[0]]), self.written
        rows = torch.arange(run.batch, device=run.inputs[0].device).repeat(times)
        hooks: list[Hook] = [(read.port, partial(_replace, values[read])) for read in self.reads]
        seen = model.replay_block(run, site.block, run.inputs[site.block][rows], rows, hooks, site.port)
        return at_least_float32(site.kept(seen.reshape(*seen.shape[:2], site.n, -1))).unflatten(0, (times, -1))

    def packed(
        self, model: Model, run: Run, values: Mapping[ReadSite, Float[Tensor, "case batch pos member width"]]
    ) -> Float[Tensor, "case batch pos member width"]:
        """What one group writes in each of many cases, from as few replays as these fit into."""
        cases = len(values[self.reads[0]])
        made = {read: self._pack(values[read]) for read in self.reads}
        seen = self.replayed(model, run, made).unflatten(3, (self.groups, -1))
        return seen.movedim(3, 1).flatten(0, 1)[:cases]

    def _pack(self, values: Float[Tensor, "case batch pos member width"]) -> Tensor:
        missing = -len(values) % self.groups
        values = torch.cat((values, values.new_zeros(missing, *values.shape[1:])))
        return values.unflatten(0, (-1, self.groups)).movedim(1, 3).flatten(3, 4)


def find_parts(model: Model, run: Run, reads: Mapping[ReadSite, Tensor], written: list[Tensor]) -> list[Part]:
    """All parts of a model in order of computation; what is alike or known is found by experiment on a run.

    Args:
        reads: what the readers of each site made of the stream, [batch, pos, node, width].
        written: what each write site wrote.
    """
    wiring, parts = model.wiring, list[Part]()
    mlps = {mlp.block: mlp for mlp in wiring.mlps}
    for place, site in enumerate(wiring.write_sites):
        mine = tuple(s for s in reads if bool(wiring.graph.feeds[s.columns, site.rows].any()))
        if not mine:
            continue
        part = Part(mine, site, place)
        groups = min(read.n for read in mine)
        if wiring.graph.source_nodes[site.first].kind == "mlp" and site.block in mlps and site.weight is None:
            known = partial(_mlp, mlps[site.block])
            off = known(at_least_float32(reads[mine[0]][:, :, 0])) - written[place][:, :, 0]
            if _same(off, off[:1, :1], written[place]):
                part = replace(part, pointwise=known)
        elif groups > 1 and site.post_norm is None and _alike(model, run, part, groups, reads, written[place]):
            part = replace(part, groups=groups)
        parts.append(part)
    return parts


def _alike(model: Model, run: Run, part: Part, groups: int, reads: Mapping[ReadSite, Tensor], written: Tensor) -> bool:
    """Whether no group hears another and all do the same, tried by handing each group the reads of the one before."""
    if part.written.n % groups or any(site.n % groups for site in part.reads):
        return False
    own = torch.arange(part.written.n) // (part.written.n // groups)
    for site in part.reads:
        theirs = torch.arange(site.n) // (site.n // groups)
        if (model.graph.feeds[site.columns, part.written.rows].cpu() & (theirs[:, None] != own)).any():
            return False
    turned = {site: reads[site].roll(site.n // groups, 2)[None] for site in part.reads}
    return _same(part.replayed(model, run, turned)[0], written.roll(part.written.n // groups, 2), written)


def _same(got: Tensor, want: Tensor, scale: Tensor) -> bool:
    return float((got - want).abs().max()) <= SAME * float(scale.abs().max())


def tied_feeds(wiring: Wiring) -> Bool[Tensor, "dst src"]:
    """Which readers change which writers: those they feed, and those that share a norm of their sum with these."""
    feeds = wiring.graph.feeds.cpu().clone()
    for site in wiring.write_sites:
        if site.post_norm is not None and site.n > 1:
            feeds[:, site.rows] = feeds[:, site.rows].any(1, keepdim=True)
    return feeds


def leads_on(keep: EdgeMask, feeds: Bool[Tensor, "dst src"]) -> Bool[Tensor, " dst"]:
    """Readers from which kept edges lead, step by step, to the logits."""
    edges, pairs = keep.float(), feeds.float()
    reached = ~feeds.any(1)
    while True:
        grown = reached | ((pairs @ ((edges @ reached.float()) > 0).float()) > 0)
        if torch.equal(grown, reached):
            return reached
        reached = grown


def answers(x: Float[Tensor, "*case batch pos d"], positions: Int[Tensor, "batch answer"]) -> Tensor:
    """A stream at the answer positions."""
    at = positions[..., None].expand(*x.shape[:-2], -1, x.shape[-1])
    return x.gather(-2, at)


def written(
    site: WriteSite, nodes: Int[Tensor, " case"], change: Float[Tensor, "case batch pos width"]
) -> Float[Tensor, "case batch pos d"]:
    """What one writer of a site adds to the stream in each case, from a change of what runs keep."""
    if site.weight is None:
        return change
    weight = site.weight[nodes.to(change.device)].to(change.dtype)
    writes = (change.flatten(1, 2) @ weight).unflatten(1, change.shape[1:3])
    return writes if site.post_norm is None else site.post_norm.part(writes)


def _replace(values: Tensor, y: Tensor) -> Tensor:
    return values.reshape(y.shape).to(y.dtype)


def _mlp(parts: MlpParts, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """What an MLP makes of what it reads, but for a constant."""
    inner = parts.activation(_affine(x, parts.w_in if parts.w_gate is None else parts.w_gate, _first_bias(parts)))
    if parts.w_gate is not None:
        inner = inner * _affine(x, parts.w_in, parts.b_in)
    out = _affine(inner, parts.w_out, parts.b_out)
    return out if parts.post_norm is None else parts.post_norm(out)


def _first_bias(parts: MlpParts) -> Tensor | None:
    return parts.b_in if parts.w_gate is None else parts.b_gate


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)
