"""Many circuits of one batch, each computed only where it matters: for curves, random circuits, knock-outs.

    x_v = b_v + sum over kept u of (a_u - corrupt a_u)        b_v: the stream if every writer wrote its corrupt value

A writer is computed in a circuit only if a kept edge leads from it, step by step, to the logits, and only if something
that it reads differs from the clean run: any other one carries its corrupt value wherever it is read, or wrote what the
clean run has recorded. So a small circuit skips most heads and whole blocks, and the whole model costs nothing. The
answers are those of `circuitkit.models.circuits.run_circuits`, which also knows soft masks and gradients.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, hooked, keeper
from circuitkit.models.skipping import without_products
from circuitkit.models.wiring import Port, ReadSite, WriteSite
from circuitkit.shapes import Tokens

# Floating-point operations; looking at every call of a block takes as long as a few million of them.
WORTH_SKIPPING = 1e8
# A circuit that needs this share of a block's nodes is computed with the others, as if it needed all of them.
MOST = 0.6


@dataclass(frozen=True, eq=False)
class Sweep:
    """A clean run, and what all its circuits share.

    Args:
        model: the model that was run.
        run: the clean run.
        corrupt: what each write site carries along a removed edge.
        gaps: what each writer wrote minus its corrupt value.
        bases: for each stream that is read, the stream if every writer wrote its corrupt value.
    """

    model: Model
    run: Run
    corrupt: tuple[Tensor, ...]
    gaps: Float[Tensor, "src batch pos d"]
    bases: dict[Port, Float[Tensor, "batch pos d"]]

    def logits(
        self, keep: Bool[Tensor, "circuit src dst"], positions: Int[Tensor, "batch answer"]
    ) -> Float[Tensor, "circuit batch answer vocab"]:
        """Logits of several circuits, in float32 or better."""
        with torch.no_grad(), self.model.quiet():
            return _Sweeping(self, keep.cpu()).logits(positions)


def record_streams(model: Model, tokens: Tokens) -> tuple[Run, dict[Port, Tensor]]:
    """A recorded run, with every stream that its readers read."""
    wiring, streams = model.wiring, dict[Port, Tensor]()
    ports = [site.stream for site in wiring.read_sites if site.block < len(wiring.blocks)]
    entries = {port: _entered(model, port) for port in ports}
    hooks: list[Hook] = [(port, keeper(streams, port)) for port, block in entries.items() if block is None]
    with hooked(hooks):
        run = model.record(tokens)
    streams |= {port: run.inputs[block] for port, block in entries.items() if block is not None}
    streams[wiring.read_sites[-1].stream] = run.inputs[-1]
    return run, {port: x.detach() for port, x in streams.items()}


def _entered(model: Model, port: Port) -> int | None:
    """Which block's input a port is; None for a stream inside a block."""
    blocks = model.wiring.blocks
    return next((i for i, block in enumerate(blocks) if port.module is block and port.side == "in"), None)


def start_sweep(model: Model, run: Run, streams: dict[Port, Tensor], corrupt: tuple[Tensor, ...]) -> Sweep:
    """What all circuits of a recorded run share."""
    gaps = model.wiring.expand_difference(run.writes, corrupt)
    bases = dict[Port, Tensor]()
    total, done = torch.zeros_like(gaps[0]), 0
    for site in model.wiring.read_sites:
        if site.stream not in bases:
            seen = model.wiring.writes_before(site)
            # Readers come in order of computation, so the sum over what they see only grows.
            total = gaps[:seen].sum(0) if seen < done else total + gaps[done:seen].sum(0)
            bases[site.stream], done = at_least_float32(streams[site.stream]) - total, seen
    return Sweep(model, run, corrupt, gaps, bases)


def to_compute(
    model: Model, keep: Bool[Tensor, "circuit src dst"]
) -> tuple[Bool[Tensor, "circuit src"], Bool[Tensor, "circuit src"]]:
    """Which writers each circuit must compute, and which it takes from the clean run; it needs no others.

    Writers that share a norm behind them (Gemma) change each other's scale, so they are computed together.
    """
    graph, sites = model.graph, model.wiring.read_sites
    feeds = graph.feeds.cpu().float()
    mask = graph.mask.cpu()
    tied = [site.rows for site in model.wiring.write_sites if site.post_norm is not None and site.n > 1]
    changed = torch.zeros(len(keep), len(graph.sources), dtype=torch.bool)
    for site in sites:
        bad = (mask[:, site.columns] & (~keep[:, :, site.columns] | changed[:, :, None])).any(1)
        changed |= (bad.float() @ feeds[site.columns]) > 0
        _together(changed, tied)
    sink = graph.sinks.cpu()
    used = torch.zeros_like(changed)
    for site in reversed(sites):
        _together(used, tied)
        reader = ((used & changed).float() @ feeds[site.columns].T > 0) | sink[site.columns]
        used |= (keep[:, :, site.columns] & mask[:, site.columns] & reader[:, None]).any(2)
    _together(used, tied)
    return used & changed, used & ~changed


def _together(writers: Bool[Tensor, "circuit src"], tied: list[slice]) -> None:
    for rows in tied:
        writers[:, rows] = writers[:, rows].any(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class _Party:
    """Circuits whose readers in a block are read together: by port the nodes, and [node, circuit, batch, pos, d]."""

    circuits: list[int]
    nodes: dict[Port, Tensor]
    streams: dict[Port, Tensor]


class _Sweeping:
    """One call of `Sweep.logits`: what its hooks share while the blocks run."""

    def __init__(self, sweep: Sweep, keep: Bool[Tensor, "circuit src dst"]) -> None:
        self.sweep, self.model, self.keep = sweep, sweep.model, keep & sweep.model.graph.mask.cpu()
        self.computed, self.clean = to_compute(sweep.model, self.keep)
        self.reads = (self.computed.float() @ sweep.model.graph.feeds.cpu().float().T) > 0
        self.batch, self.shape = sweep.run.batch, sweep.gaps.shape[1:]
        self.sites = {site: i for i, site in enumerate(sweep.model.wiring.write_sites)}
        device, self.like = sweep.gaps.device, sweep.gaps
        self.examples = torch.arange(self.batch, device=device)
        self.writers = [c.nonzero().flatten() for c in self.computed | self.clean]  # rows of each circuit's gaps
        self.gaps = [sweep.gaps.new_empty(len(w), *self.shape) for w in self.writers]
        for c, (gaps, writers) in enumerate(zip(self.gaps, self.writers, strict=True)):
            known = self.clean[c, writers].nonzero().flatten()
            if len(known):
                gaps[_slice_or(known)] = sweep.gaps[_slice_or(writers[known])]

    def logits(self, positions: Int[Tensor, "batch answer"]) -> Float[Tensor, "circuit batch answer vocab"]:
        wiring = self.model.wiring
        for block in range(len(wiring.blocks)):
            self._block(block)
        site, whole = wiring.read_sites[-1], self.sweep.run.inputs[-1]
        at = positions[..., None].expand(-1, -1, whole.shape[-1])
        base = self.sweep.bases[site.stream].gather(1, at)
        last = []
        for c, gaps in enumerate(self.gaps):
            weight = self.keep[c, self.writers[c], site.first].to(gaps)
            picked = gaps.gather(2, at.expand(len(gaps), *at.shape)) if len(gaps) else base[None, :0]
            last.append(base + torch.einsum("u,ubad->bad", weight, picked) if len(gaps) else base)
        x = torch.cat(last).to(whole.dtype)
        answers = torch.arange(positions.shape[1], device=x.device).expand(len(x), -1)
        logits = self.model.logits(x, answers).unflatten(0, (len(self.keep), self.batch))
        same = (self.keep == self.model.graph.mask.cpu()).flatten(1).all(1)
        if same.any():  # exactly the clean run, not up to rounding
            logits[same.to(x.device)] = self.model.logits(whole, positions)
        return logits

    def _block(self, block: int) -> None:
        """Run a block for the circuits that compute something in it, as far as they need it."""
        wiring = self.model.wiring
        sites = [site for site in wiring.write_sites if site.block == block]
        wants = torch.stack([self.computed[:, site.rows].any(1) for site in sites])
        for last in range(len(sites)):
            circuits = (wants[last] & ~wants[last + 1 :].any(0)).nonzero().flatten().tolist()
            if circuits:
                self._run(block, circuits, sites[: last + 1])

    def _run(self, block: int, circuits: list[int], sites: list[WriteSite]) -> None:
        """Run one block up to the last of its write sites, stacked over circuits."""
        wiring, run = self.model.wiring, self.sweep.run
        readers = [site for site in wiring.read_sites if site.block == block and self._reads_for(site, sites)]
        earlier = int(sites[0].first)
        parties = [self._party(members, readers, earlier) for members in self._shared(circuits, readers)]
        circuits = [circuit for party in parties for circuit in party.circuits]
        rows = self.examples.repeat(len(circuits))
        hooks: list[Hook] = [(s.port, partial(self._note, circuits, s)) for s in sites[:-1]]
        hooks += [(site.port, partial(self._edit, parties, site, earlier)) for site in readers]
        # What the block itself makes of its stream is replaced at every reader, so it need not be computed.
        weights = [site.weight for site in readers] + [site.weight for site in sites[:-1]]
        replaced = [weight for weight in weights if weight is not None]
        work = sum(2 * weight.numel() for weight in replaced) * len(rows) * self.shape[1]
        stream = run.inputs[block].repeat(len(circuits), 1, 1)
        with without_products(replaced) if work > WORTH_SKIPPING else nullcontext():
            found = self.model.replay_block(run, block, stream, rows, hooks, sites[-1].port)
        self._note(circuits, sites[-1], found)

    def _reads_for(self, site: ReadSite, writers: list[WriteSite]) -> bool:
        feeds = self.model.graph.feeds[site.columns]
        return any(bool(feeds[:, w.rows].any()) for w in writers)

    def _shared(self, circuits: list[int], sites: list[ReadSite]) -> list[list[int]]:
        """Circuits that need most of the readers are read together, as if they needed all; each other one alone."""
        columns = torch.cat([torch.arange(site.columns.start, site.columns.stop) for site in sites])
        most = (self.reads[circuits][:, columns].float().mean(1) >= MOST).tolist()
        together = [circuit for circuit, many in zip(circuits, most, strict=True) if many]
        alone = [[circuit] for circuit, many in zip(circuits, most, strict=True) if not many]
        return [together, *alone] if together else alone

    def _party(self, circuits: list[int], sites: list[ReadSite], earlier: int) -> _Party:
        """Private streams of the readers of one block, from writers of earlier blocks: one product for each circuit."""
        every = len(circuits) > 1
        nodes = [
            torch.arange(site.n) if every else self.reads[circuits[0], site.columns].nonzero().flatten()
            for site in sites
        ]
        columns = torch.cat([site.first + chosen for site, chosen in zip(sites, nodes, strict=True)])
        out = self.like.new_empty(len(columns), len(circuits), *self.shape)
        party, start = _Party(circuits, {}, {}), 0
        for site, chosen in zip(sites, nodes, strict=True):
            party.nodes[site.port] = chosen
            party.streams[site.port] = out[start : start + len(chosen)]
            party.streams[site.port][:] = self.sweep.bases[site.stream]
            start += len(chosen)
        for i, circuit in enumerate(circuits):
            self._add(out[:, i], circuit, columns, 0, earlier)
        return party

    def _add(self, out: Tensor, circuit: int, columns: Tensor, first: int, end: int) -> None:
        """Add the kept gaps of the writers from ``first`` up to ``end`` to private streams."""
        writers, gaps = self.writers[circuit], self.gaps[circuit]
        low, high = torch.searchsorted(writers, torch.tensor([first, end])).tolist()
        weight = self.keep[circuit][writers[low:high]][:, columns].T.to(out)
        if not weight.any():
            return
        used = weight.any(0).nonzero().flatten()
        part = gaps[low:high]
        if 3 * len(used) < high - low:  # copying a few writers is cheaper than multiplying many by zero
            part, weight = part[used], weight[:, used]
        out.view(len(out), -1).addmm_(weight, part.flatten(1))

    def _edit(self, parties: list[_Party], site: ReadSite, earlier: int, y: Tensor) -> Tensor:
        """What the readers of a site make of their private streams; other nodes are not needed and get zeros."""
        values = y.new_zeros(len(y) // self.batch, *self.shape[:2], site.n, y[0, 0].numel() // site.n)
        start, seen = 0, self.model.wiring.writes_before(site)
        for party in parties:
            nodes, streams = party.nodes[site.port], party.streams[site.port]
            if len(nodes):
                for i, circuit in enumerate(party.circuits):
                    self._add(streams[:, i], circuit, site.first + nodes, earlier, seen)
                chosen = _slice_or(nodes)
                read = site.read(streams, chosen).permute(1, 2, 3, 0, 4)
                values[start : start + len(party.circuits), :, :, chosen] = read.to(y.dtype)
            start += len(party.circuits)
        return values.reshape(y.shape)

    def _note(self, circuits: list[int], site: WriteSite, tensor: Tensor) -> None:
        """Keep what each circuit's computed writers wrote, as gaps to their corrupt values."""
        own = site.kept(tensor.detach().reshape(*tensor.shape[:2], site.n, -1)).unflatten(0, (len(circuits), -1))
        change = at_least_float32(own) - at_least_float32(self.sweep.corrupt[self.sites[site]])
        wanted = self.computed[circuits][:, site.rows]
        together = (wanted.float().mean(1) >= MOST).nonzero().flatten()
        if len(together):
            gaps = site.expand(change[together].flatten(0, 1)).unflatten(1, (len(together), -1))
            for i, row in enumerate(together.tolist()):
                nodes = wanted[row].nonzero().flatten()
                self._keep(circuits[row], site, nodes, gaps[_slice_or(nodes), i])
        for row in set(range(len(circuits))) - set(together.tolist()):
            nodes = wanted[row].nonzero().flatten()
            if len(nodes):
                self._keep(circuits[row], site, nodes, _written(site, change[row], nodes))

    def _keep(self, circuit: int, site: WriteSite, nodes: Tensor, gaps: Tensor) -> None:
        self.gaps[circuit][_slice_or(torch.searchsorted(self.writers[circuit], site.first + nodes))] = gaps


def _slice_or(index: Int[Tensor, " n"]) -> slice | Tensor:
    """A slice where the indices are consecutive, which copies faster; else the indices."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _written(site: WriteSite, values: Float[Tensor, "batch pos node width"], nodes: Tensor) -> Tensor:
    """What some writers of a site add to the stream, [node, batch, pos, d], from a difference of what runs keep."""
    assert site.weight is not None, "a writer without a map has its site to itself"
    nodes = nodes.to(values.device)
    rows = values[:, :, nodes].flatten(0, 1).transpose(0, 1) @ site.weight[nodes].to(values.dtype)
    writes = rows.unflatten(1, values.shape[:2])
    return writes if site.post_norm is None else site.post_norm.part(writes)
