"""Attention taken apart by position: what heads write when some queries, keys or values are replaced.

Heads are independent of each other given their queries, keys and values, and no port behind a head's output is needed,
so one pass of a block up to there answers for all its heads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.local import replaced_reads
from circuitkit.models.wiring import Port, ReadSite, WriteSite
from circuitkit.positions import SLOTS


@dataclass(frozen=True, eq=False)
class Attention:
    """The sites of one block's attention: where queries, keys and values are read, in this order, and heads written."""

    block: int
    reads: tuple[ReadSite, ReadSite, ReadSite]
    heads: WriteSite

    def owner(self, model: Model, slot: int) -> list[int]:
        """Which of a slot's readers each head uses; several heads may share one."""
        feeds = model.graph.feeds[self.reads[slot].columns, self.heads.rows]
        owners: list[int] = feeds.int().argmax(0).tolist()
        return owners


def attentions(model: Model) -> Iterator[Attention]:
    """The attention of every block that has one."""
    wiring, nodes = model.wiring, model.graph.destination_nodes
    for block in range(len(wiring.blocks)):
        reads = {nodes[s.first].slot: s for s in wiring.read_sites if s.block == block and nodes[s.first].slot in SLOTS}
        if not reads:
            continue
        columns = reads["q"].columns
        heads = next(w for w in wiring.write_sites if wiring.graph.feeds[columns, w.rows].any())
        yield Attention(block, (reads["q"], reads["k"], reads["v"]), heads)


def clean_and_corrupt_reads(
    model: Model, run: Run, attention: Attention, delta: Float[Tensor, "src batch pos d"]
) -> list[tuple[Float[Tensor, "batch pos node width"], Float[Tensor, "batch pos node width"]]]:
    """Queries, keys and values of a run, and what they are when every edge into their readers is corrupt.

    Args:
        delta: clean minus corrupt writes, of all writers.
    """
    seen: dict[Port, Tensor] = {}
    ports = dict.fromkeys(port for site in attention.reads for port in (site.stream, site.port))
    hooks: list[Hook] = [(port, keeper(seen, port)) for port in ports]
    rows = torch.arange(run.batch, device=run.inputs[0].device)
    model.replay_block(run, attention.block, run.inputs[attention.block], rows, hooks, attention.heads.port)
    found = []
    for site in attention.reads:
        stream, gap = at_least_float32(seen[site.stream]), delta[: model.wiring.writes_before(site)].sum(0)
        y = at_least_float32(seen[site.port]).reshape(*stream.shape[:2], site.n, -1)
        made = read_together(site, torch.stack((stream, stream - gap)))
        # Where the stream does not change, nothing does, although rounding may differ between rows of a product.
        moved = (gap != 0).any(-1)[..., None, None]
        found.append((y, y + (made[1] - made[0]) * moved))
    return found


def attention_scores(
    model: Model,
    run: Run,
    attention: Attention,
    delta: Float[Tensor, "src batch pos d"],
    slope: Tensor,
    spans: Int[Tensor, "batch pos"],
    together: Callable[[Float[Tensor, "batch pos head"]], Float[Tensor, "batch span head"]],
    at_once: int,
) -> Float[Tensor, "batch slot head key query"]:
    """What corrupt queries, keys and values of one span are worth in one span of a head's output.

    Args:
        delta: clean minus corrupt writes, of all writers.
        slope: gradient of the metric at what the heads write.
        spans: number of each position's span.
        together: brings numbers of positions together by spans.
        at_once: how many spans are tried in one pass of the block.
    """
    slope = at_least_float32(slope).reshape(*spans.shape, attention.heads.n, -1)
    n = together(slope[..., 0]).shape[1]
    chosen = (spans == torch.arange(n, device=spans.device)[:, None, None])[..., None]  # span, batch, pos, any node
    found = []
    for slot, (clean, corrupt) in enumerate(clean_and_corrupt_reads(model, run, attention, delta)):
        moved = (corrupt != clean).any(-1)
        # A query acts at its own position only, so the queries of all spans are replaced in one pass.
        which = chosen.any(0, keepdim=True) if SLOTS[slot] == "q" else chosen
        parts = []
        for some in which.split(at_once):
            values = torch.where(some[..., None], corrupt, clean)
            change = replaced_reads(model, run, attention.reads[slot], attention.heads, values)
            # No edit, no change, although rounding may differ between the rows of a pass.
            edited = some & moved if SLOTS[slot] == "q" else (some & moved).any(2, keepdim=True)
            worth = (change * slope).sum(-1) * edited[..., attention.owner(model, slot)]
            parts += [together(each) for each in worth]
        scores = torch.stack(parts, -1).transpose(1, 2)  # batch, head, query, key
        found.append(torch.diag_embed(scores[..., 0]) if SLOTS[slot] == "q" else scores.transpose(2, 3))
    return torch.stack(found, 1)


def read_together(site: ReadSite, stream: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch node width"]:
    """What all readers of a site make of one and the same stream."""
    return site.read(stream[None].expand(site.n, *stream.shape)).movedim(0, -2)
