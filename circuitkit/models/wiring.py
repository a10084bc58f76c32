"""How one model is wired, as data: where each writer writes, where each reader reads, and the maps between.

A site is one tensor of the running module that several nodes share: all heads of a layer write through one ``z``, read
through one ``q``. Writers stay factored (``z`` with its map ``W_O``); readers stay fused (``q`` with ``W_Q`` and the
norm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.functional.norms import Norm, at_least_float32
from circuitkit.graph import Graph


@dataclass(frozen=True, eq=False)
class Port:
    """One tensor of a running module: what goes into (``in``) or comes out of (``out``) a submodule."""

    module: nn.Module
    side: str = "out"


@dataclass(frozen=True, eq=False)
class WriteSite:
    """Consecutive writers that share a tensor.

    Args:
        first: row of the first one.
        n: how many.
        block: index of the block they are in; -1 for the input.
        port: where the tensor ``[batch, pos, n * width]`` is found.
        weight: each writer's map to the stream, or None if the tensor is what is written.
        bias: added to the sum of the writes inside the block (a constant, unless a post-norm follows).
        post_norm: norm of the sum before it joins the stream, or None.
    """

    first: int
    n: int
    block: int
    port: Port
    weight: Float[Tensor, "node width d"] | None = None
    bias: Float[Tensor, " d"] | None = None
    post_norm: Norm | None = None

    @property
    def rows(self) -> slice:
        """The writers' rows in the edge matrix."""
        return slice(self.first, self.first + self.n)

    def kept(self, values: Float[Tensor, "batch pos node width"]) -> Float[Tensor, "batch pos node width"]:
        """The tensor as runs keep it: before a post-norm it is multiplied by the run's 1 / sigma.

        So what is kept expands linearly, and the expansion of a mean is the mean of the writes.
        """
        if self.post_norm is None or self.weight is None:
            return values
        values = at_least_float32(values)
        total = values.flatten(2) @ self.weight.to(values.dtype).flatten(0, 1)
        total = total if self.bias is None else total + self.bias.to(total.dtype)
        return values * self.post_norm.statistics(total)[1][..., None]

    def expand(self, values: Float[Tensor, "batch pos node width"]) -> Float[Tensor, "node batch pos d"]:
        """What each writer adds to the stream, from what `kept` gave."""
        values = at_least_float32(values)
        if self.weight is None:
            return values.movedim(2, 0)
        nodes = values.flatten(0, 1).transpose(0, 1) @ self.weight.to(values.dtype)
        writes = nodes.unflatten(1, values.shape[:2])
        return writes if self.post_norm is None else self.post_norm.part(writes)

    def difference(
        self,
        values: Float[Tensor, "batch pos node width"],
        others: Float[Tensor, "batch pos node width"],
        out: Float[Tensor, "node batch pos d"],
    ) -> None:
        """Write expand(values) - expand(others) into ``out``, with one product."""
        values, others = at_least_float32(values), at_least_float32(others)
        if self.weight is None:
            torch.sub(values.movedim(2, 0), others.movedim(2, 0), out=out)
            return
        nodes = (values - others).flatten(0, 1).transpose(0, 1)
        torch.bmm(nodes, self.weight.to(values.dtype), out=out.flatten(1, 2))
        if self.post_norm is not None:
            out.copy_(self.post_norm.part(out))


@dataclass(frozen=True, eq=False)
class ReadSite:
    """Consecutive readers that share a tensor: y_v = W_v^T norm(x_v) + b_v.

    Args:
        first: column of the first one.
        n: how many.
        block: index of the block they are in; the number of blocks for the final read.
        port: where the tensor y ``[batch, pos, n * width]`` is found.
        stream: where the stream x that they read is found.
        weight: each reader's projection, or None if it reads the normed stream whole.
        bias: each reader's offset, or None.
        norm: between stream and projection, or None.
    """

    first: int
    n: int
    block: int
    port: Port
    stream: Port
    weight: Float[Tensor, "node d width"] | None = None
    bias: Float[Tensor, "node width"] | None = None
    norm: Norm | None = None

    @property
    def columns(self) -> slice:
        """The readers' columns in the edge matrix."""
        return slice(self.first, self.first + self.n)

    def read(
        self, streams: Float[Tensor, "node *batch d"], nodes: slice | Tensor = slice(None)
    ) -> Float[Tensor, "node *batch width"]:
        """What the readers make of a private stream each."""
        normed = streams if self.norm is None else self.norm(streams)
        if self.weight is None:
            return normed
        weight = self.weight[nodes].to(normed.dtype)
        y = (normed.flatten(1, -2) @ weight).unflatten(1, normed.shape[1:-1])
        if self.bias is None:
            return y
        bias = self.bias[nodes].to(y.dtype)
        return y + bias.reshape(len(bias), *[1] * (y.dim() - 2), -1)


@dataclass(frozen=True, eq=False)
class MlpParts:
    """The inside of one block's MLP: hidden = act(gate) * pre, or act(pre) without a gate; out = hidden W_out + b_out.

    Args:
        block: index of the block.
        pre: where the up-projection's output ``[batch, pos, d_mlp]`` is found.
        gate: where the gate's pre-activation is found, or None.
        hidden: where what the down-projection reads is found.
        w_in: up-projection ``[d, d_mlp]``; ``b_in`` its bias as far as it is in ``pre``, or None.
        w_gate: the gate's projection and bias, or None.
        w_out: down-projection ``[d_mlp, d]`` and bias.
        activation: the nonlinearity.
        post_norm: norm of what the MLP gives before it joins the stream, or None.
    """

    block: int
    pre: Port
    gate: Port | None
    hidden: Port
    w_in: Float[Tensor, "d d_mlp"]
    b_in: Float[Tensor, " d_mlp"] | None
    w_gate: Float[Tensor, "d d_mlp"] | None
    b_gate: Float[Tensor, " d_mlp"] | None
    w_out: Float[Tensor, "d_mlp d"]
    b_out: Float[Tensor, " d"] | None
    activation: Callable[[Tensor], Tensor]
    post_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class Wiring:
    """The sites of one model, in order of computation.

    Args:
        graph: names of all writers and readers, and the possible edges.
        blocks: the modules through which the stream passes, one after the other.
        write_sites: in order of rows.
        read_sites: in order of columns.
        tail: from the stream after the last block to logits; takes any leading axes.
        final: where the stream after the last block is found in a full run.
        patterns: where each block's attention pattern ``[batch, head, query, key]`` is found, or ().
        mlps: the inside of each block's MLP, or () where it is not known.
        final_norm: the norm before the unembedding as data, or None.
        normed: where the output of that norm is found, or None.
        inner_norms: norms between what is read and what is written (after attention or MLP, of queries and keys), each
            with where its output is found; the norm as data is None if it is of no known form.
    """

    graph: Graph
    blocks: tuple[nn.Module, ...]
    write_sites: tuple[WriteSite, ...]
    read_sites: tuple[ReadSite, ...]
    tail: Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch vocab"]]
    final: Port
    patterns: tuple[Port, ...] = ()
    mlps: tuple[MlpParts, ...] = ()
    final_norm: Norm | None = None
    normed: Port | None = None
    inner_norms: tuple[tuple[Norm | None, Port], ...] = ()

    @property
    def width(self) -> int:
        """Width of the stream."""
        weight = next(site.weight for site in self.read_sites if site.weight is not None)
        return weight.shape[1]

    def writes_before(self, site: ReadSite) -> int:
        """How many writers, from the first, can reach a reader of this site."""
        reachable = self.graph.mask[:, site.columns].any(1).nonzero()
        return int(reachable.max()) + 1 if len(reachable) else 0

    def expand_difference(
        self, values: tuple[Tensor, ...], others: tuple[Tensor, ...]
    ) -> Float[Tensor, "src batch pos d"]:
        """What all writers wrote in one run minus what they wrote in another."""
        like = at_least_float32(values[0][:0])
        out = like.new_empty(len(self.graph.sources), *values[0].shape[:2], values[0].shape[-1])
        for site, a, b in zip(self.write_sites, values, others, strict=True):
            site.difference(a, b, out=out[site.rows])
        return out


def transformer_graph(
    n_layers: int,
    n_heads: int,
    n_kv: int,
    *,
    attention: bool = True,
    mlp: bool = True,
    parallel: bool = False,
) -> Graph:
    """Writers of a decoder: input, heads, MLPs; readers: q per head, k and v per key/value head, MLPs, logits.

    >>> graph = transformer_graph(12, 12, 12)
    >>> len(graph.sources), len(graph.destinations), graph.n_edges
    (157, 445, 32491)
    """
    from circuitkit.graph import Node

    sources = [Node("input", "input", -1, 0)]
    destinations: list[Node] = []
    sees: list[int] = []
    feeds: list[tuple[int, int]] = []
    for layer in range(n_layers):
        before = len(sources)
        if attention:
            first = len(sources)
            kind, stem = ("kv", f"a{layer}.kv") if n_kv != n_heads else ("head", f"a{layer}.h")
            sources += [Node(f"a{layer}.h{h}", "head", layer, 2 * layer + 1, h) for h in range(n_heads)]
            for h in range(n_heads):
                feeds.append((len(destinations), first + h))
                destinations.append(Node(f"a{layer}.h{h}<q>", "head", layer, 2 * layer + 1, h, "q"))
            for slot in "kv":
                for g in range(n_kv):
                    members = range(g * n_heads // n_kv, (g + 1) * n_heads // n_kv)
                    feeds += [(len(destinations), first + h) for h in members]
                    destinations.append(Node(f"{stem}{g}<{slot}>", kind, layer, 2 * layer + 1, g, slot))
            sees += [before] * (n_heads + 2 * n_kv)
        if mlp:
            sees.append(before if parallel else len(sources))
            feeds.append((len(destinations), len(sources)))
            destinations.append(Node(f"m{layer}", "mlp", layer, 2 * layer + 2))
            sources.append(Node(f"m{layer}", "mlp", layer, 2 * layer + 2))
    sees.append(len(sources))
    destinations.append(Node("logits", "logits", n_layers, 2 * n_layers + 1))
    mask = torch.arange(len(sources))[:, None] < torch.tensor(sees)[None, :]
    fed = torch.zeros(len(destinations), len(sources), dtype=torch.bool)
    for dst, src in feeds:
        fed[dst, src] = True
    return Graph(tuple(sources), tuple(destinations), mask, fed)
