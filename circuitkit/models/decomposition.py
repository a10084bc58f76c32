"""Contextual decomposition: every activation of the clean run as a relevant part beta plus the rest, gamma.

    linear map        beta W                         the bias is gamma's, or shared as |beta W| : |gamma W|
    norm              gain * beta / sigma            sigma of the whole activation; its bias is gamma's, or shared
    activation, gate  f(beta + gamma) - f(gamma)
    attention         z(q, k, v) - z(gamma_q, gamma_k, gamma_v), or with the pattern of the whole activation

Since the two parts always add up to the clean activation, only beta is carried: what a block makes of gamma is found by
running it on gamma, up to where it writes, so no attention and no activation function is written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.norms import Norm, at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, hooked, keeper
from circuitkit.models.laws import check_mlps
from circuitkit.models.neurons import open_mlps
from circuitkit.models.wiring import Port, ReadSite, Wiring, WriteSite

Part = Float[Tensor, "part batch pos d"]
Watch = Callable[[Port, Tensor], None]


@dataclass(frozen=True, eq=False)
class Whole:
    """The clean run that is decomposed.

    Args:
        model: which ran.
        wiring: the model's, with the inside of every MLP that is known.
        run: the recorded run.
        seen: what passed each port of that wiring, nodes and width on one axis.
    """

    model: Model
    wiring: Wiring
    run: Run
    seen: Mapping[Port, Tensor]


def record_whole(model: Model, wiring: Wiring, run: Run) -> Whole:
    """What passes every port in a recorded run."""
    inner = [site for site in wiring.read_sites if site.block < len(wiring.blocks)]
    ports = {port for site in inner for port in (site.stream, site.port)}
    ports |= {site.port for site in wiring.write_sites if site.block >= 0}
    seen: dict[Port, Tensor] = {}
    hooks: list[Hook] = [(port, keeper(seen, port)) for port in ports]
    model.replay(run, 0, run.inputs[0], torch.arange(run.batch, device=run.inputs[0].device), hooks)
    return Whole(model, wiring, run, {port: x.flatten(2) for port, x in seen.items()})


def inner_wiring(model: Model) -> Wiring:
    """The model's wiring with every known MLP opened as one group of neurons, so that its linear maps are seen.

    Raises:
        UnsupportedModel: if an MLP is not made of the parts that the wiring names.
    """
    whole = {node.layer for node in model.graph.source_nodes if node.kind == "mlp"}
    check_mlps(model, [parts for parts in model.wiring.mlps if parts.block in whole])
    return open_mlps(model.wiring)


class Decomposition:
    """The relevant parts of some edges or nodes, stacked, on their way from block to block.

    Args:
        whole: the clean run.
        shared: share biases by magnitude, give coordinates of opposite sign to the larger part, and keep the attention
            pattern of the whole activation.
        watch: told of every port and the relevant part of what passes there.
    """

    def __init__(self, whole: Whole, *, shared: bool, watch: Watch | None = None) -> None:
        self.whole, self.shared, self.watch = whole, shared, watch
        self._stream: Part | None = None
        self._written: dict[WriteSite, Part] = {}
        self._injected: dict[ReadSite, Tensor] = {}
        self._edited = False

    def into_reader(
        self, site: ReadSite, delta: Part, nodes: list[int], positions: Int[Tensor, "batch answer"]
    ) -> tuple[Float[Tensor, "part batch answer vocab"], Bool[Tensor, "part batch"]]:
        """Logits of gamma where beta enters one reader each, and whether any of it enters.

        Args:
            site: a site of the model's own wiring.
            delta: what is relevant in each reader's stream.
            nodes: which reader of the site each part enters.
        """
        wiring = self.whole.wiring
        if site.block == len(wiring.blocks):
            return self._logits(delta, positions), (delta != 0).flatten(2).any(-1)
        for inner in _inside(self.whole.model.wiring, wiring, site):
            self._injected[inner] = self._one_reader_each(inner, delta, nodes)
        changed = torch.stack([(beta != 0).flatten(2).any(-1) for beta in self._injected.values()]).any(0)
        return self._run(site.block, len(delta), positions), changed

    def from_writer(
        self, row: int, delta: Part, positions: Int[Tensor, "batch answer"]
    ) -> Float[Tensor, "part batch answer vocab"]:
        """Logits of gamma where beta is in what a writer writes, for all its readers.

        Args:
            row: a writer of the inner wiring; all parts are of writers of its site.
        """
        site = next(s for s in self.whole.wiring.write_sites if s.rows.start <= row < s.rows.stop)
        if site.block < 0:
            self._stream = delta
            return self._run(0, len(delta), positions)
        self._written[site] = delta
        return self._run(site.block, len(delta), positions)

    def _run(self, start: int, n: int, positions: Tensor) -> Tensor:
        whole = self.whole
        rows = torch.arange(whole.run.batch, device=positions.device).repeat(n)
        for block in range(start, len(whole.wiring.blocks)):
            self._through(block, rows)
        assert self._stream is not None
        return self._logits(self._stream, positions)

    def _through(self, block: int, rows: Tensor) -> None:
        """Pass one block: read from the parts so far, run the block on gamma, add what the relevant parts become."""
        whole = self.whole
        reads = [site for site in whole.wiring.read_sites if site.block == block]
        writes = [site for site in whole.wiring.write_sites if site.block == block]
        if any(site in self._injected or self._stream_of(site) is not None for site in reads):
            self._edited = False
            hooks: list[Hook] = [(site.port, partial(self._read, site)) for site in reads]
            hooks += [(site.port, partial(self._write, site)) for site in writes if site not in self._written]
            whole.model.replay_block(whole.run, block, whole.run.inputs[block][rows], rows, hooks, writes[-1].port)
        parts = [*self._written.values(), *([] if self._stream is None else [self._stream])]
        self._stream = self._merged(sum(parts[1:], parts[0]), whole.run.inputs[block + 1])
        self._written, self._injected = {}, {}

    def _stream_of(self, site: ReadSite) -> Part | None:
        """The relevant part of the stream that a site reads: what entered the block, and what was written in it."""
        mask = self.whole.wiring.graph.mask
        parts = [part for written, part in self._written.items() if mask[written.first, site.first]]
        parts += [] if self._stream is None else [self._stream]
        return sum(parts[1:], parts[0]) if parts else None

    def _read(self, site: ReadSite, y: Tensor) -> Tensor | None:
        beta = self._injected.get(site)
        if beta is None:
            stream = self._stream_of(site)
            beta = None if stream is None else self._projected(site, stream)
        if beta is None:
            return None
        if self.watch is not None:
            self.watch(site.port, beta)
        self._edited = True
        gamma = at_least_float32(self.whole.seen[site.port]) - beta
        return gamma.reshape(y.shape).to(y.dtype)

    def _write(self, site: WriteSite, z: Tensor) -> None:
        if not self._edited:
            return  # what is left is rounding
        total = at_least_float32(self.whole.seen[site.port])
        beta = total - at_least_float32(z).reshape(-1, *total.shape)
        if self.watch is not None:
            self.watch(site.port, beta)
        if site.weight is not None:
            weight = site.weight.flatten(0, 1).to(beta.dtype)
            total, beta = total @ weight, beta @ weight
            if site.bias is not None:
                beta = self._with_bias(beta, total - beta, site.bias)
                total = total + site.bias.to(total.dtype)
            if site.post_norm is not None:
                beta, total = self._normed(site.post_norm, beta, total), site.post_norm(total)
        is_mlp = self.whole.wiring.graph.source_nodes[site.first].kind in ("mlp", "neuron")
        self._written[site] = self._merged(beta, total) if is_mlp else beta

    def _projected(self, site: ReadSite, stream: Part, nodes: slice = slice(None)) -> Tensor | None:
        """The relevant part of what readers make of a stream; None if it stays whole."""
        node = self.whole.wiring.graph.destination_nodes[site.first]
        if self.shared and node.slot in ("q", "k"):
            return None
        total = at_least_float32(self.whole.seen[site.port])
        normed = stream
        if site.norm is not None:
            normed = self._normed(site.norm, stream, at_least_float32(self.whole.seen[site.stream]))
        if site.weight is None:
            return normed
        width = site.weight.shape[-1]
        total = total.unflatten(-1, (-1, width))[..., nodes, :].flatten(-2)
        beta = normed @ site.weight[nodes].transpose(0, 1).flatten(1).to(normed.dtype)
        if site.bias is not None:
            bias = site.bias[nodes].flatten().to(beta.dtype)
            beta = self._with_bias(beta, total - bias - beta, bias)
        return self._merged(beta, total) if node.kind == "neuron" else beta

    def _one_reader_each(self, site: ReadSite, delta: Part, nodes: list[int]) -> Tensor:
        """What enters each part's own reader; the site's other readers have no relevant part."""
        total = self.whole.seen[site.port]
        out = delta.new_zeros(len(delta), *total.shape).unflatten(-1, (site.n, -1))
        where = torch.tensor(nodes, device=delta.device)
        for node in sorted(set(where.tolist())):
            beta = self._projected(site, delta[where == node], slice(node, node + 1))
            if beta is not None:
                out[where == node, ..., node, :] = beta
        return out.flatten(-2)

    def _normed(self, norm: Norm, beta: Tensor, total: Tensor) -> Tensor:
        part = norm.part(beta * norm.statistics(total)[1])
        if not self.shared or norm.bias is None:
            return part
        return part + norm.bias.to(part.dtype) * _share(beta, total - beta)

    def _with_bias(self, beta: Tensor, gamma: Tensor, bias: Tensor) -> Tensor:
        return beta + bias.to(beta.dtype) * _share(beta, gamma) if self.shared else beta

    def _merged(self, beta: Tensor, total: Tensor) -> Tensor:
        """Where the parts have opposite signs, the larger one takes all."""
        if not self.shared:
            return beta
        gamma = at_least_float32(total) - beta
        larger = torch.where(beta.abs() >= gamma.abs(), beta + gamma, 0.0)
        return torch.where(beta * gamma < 0, larger, beta)

    def _logits(self, beta: Part, positions: Tensor) -> Tensor:
        wiring = self.whole.wiring
        where = positions[..., None].expand(-1, -1, beta.shape[-1])
        last = self.whole.run.inputs[-1]
        total = at_least_float32(last.gather(1, where))
        picked = beta.gather(2, where.expand(len(beta), -1, -1, -1))
        gamma, hooks = total - picked, list[Hook]()
        if wiring.final_norm is not None and wiring.normed is not None:
            normed = wiring.final_norm(total) - self._normed(wiring.final_norm, picked, total)
            hooks = [(wiring.normed, lambda y: normed.reshape(y.shape).to(y.dtype))]
        with self.whole.model.quiet(), hooked(hooks):
            logits = wiring.tail(gamma.flatten(0, 1).to(last.dtype))
        return at_least_float32(logits).unflatten(0, (len(beta), -1))


def _share(beta: Tensor, gamma: Tensor) -> Tensor:
    """|beta| / (|beta| + |gamma|), and nothing where both are zero."""
    return beta.abs() / (beta.abs() + gamma.abs()).clamp(min=torch.finfo(beta.dtype).tiny)


def _inside(outer: Wiring, inner: Wiring, site: ReadSite) -> list[ReadSite]:
    """The sites of the inner wiring that make up a site of the model's own: the gate's and the other one of an MLP."""
    same = [s for s in inner.read_sites if s.port is site.port]
    kinds = inner.graph.destination_nodes
    return same or [s for s in inner.read_sites if s.block == site.block and kinds[s.first].kind == "neuron"]
