"""The graph of transcoder latents that does not depend on any input: which latents feed which, by weights alone.

    c_ij = W_dec[i] . W_enc[:, j]                            i below j, at one position, behind the norm that j reads
    c_ij = W_dec[i] W_V^h W_O^h . W_enc[:, j]                through a head h, or a chain of heads

On an input x, i adds z_i(x) c_ij / sigma(x) to j's pre-activation (and A_h[p, q] times that through a head). The gain
and centring of norms are in c_ij, their scale 1 / sigma is not (`circuitkit.features.weight_vectors`). With prompts,
partners are ranked by the mean or the largest z_i(x) c_ij instead.

Wrong as a picture of what happens: latents that are never active together have large c_ij too. Linear parts of skip
transcoders, and ways through latents in between, are not in it.
Cost: one product of [n_latents, d] and [d, n_latents] for each pair of layers, in chunks; ``top`` entries of each
column are kept, so memory grows with latents, not with their square.
Reference: Dunefsky, Chlenski, Nanda 2024, arXiv:2406.11944.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.sites import activations_at
from circuitkit.errors import OptionError
from circuitkit.features.weight_vectors import (
    Heads,
    check_heads,
    check_reader,
    highest_head,
    read_vectors,
    write_vectors,
)
from circuitkit.models.hooked import Model

if TYPE_CHECKING:
    import networkx

CHUNK = 2**24  # entries of one product
REDUCTIONS = ("mean", "max")


@dataclass(frozen=True, eq=False)
class WeightGraph:
    """The strongest connections between latents.

    Args:
        sources: layer and number of the latent that writes.
        targets: layer and number of the latent that reads.
        weights: of each connection, the strongest of each target first.
        through: heads that they lead through, lowest first.
        model: name of the model.
    """

    sources: Int[Tensor, "edge 2"]
    targets: Int[Tensor, "edge 2"]
    weights: Float[Tensor, " edge"]
    through: tuple[tuple[int, int], ...] = ()
    model: str = ""

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        ways = "".join(f" through a{layer}.h{head}" for layer, head in self.through)
        return f"WeightGraph({self.model}: {len(self)} connections{ways})"

    def top(self, n: int) -> WeightGraph:
        """The ``n`` strongest connections of all, in magnitude."""
        return self._part(self.weights.abs().argsort(descending=True, stable=True)[:n])

    def into(self, layer: int, index: int) -> WeightGraph:
        """The connections into one latent."""
        return self._part((self.targets == self.targets.new_tensor([layer, index])).all(1).nonzero().flatten())

    def _part(self, which: Int[Tensor, " edge"]) -> WeightGraph:
        sources, targets = self.sources[which], self.targets[which]
        return replace(self, sources=sources, targets=targets, weights=self.weights[which])

    def rows(self) -> list[tuple[str, str, float]]:
        """Source, target and weight of each connection, latents as ``m1.f5``."""
        names = ([f"m{layer}.f{index}" for layer, index in ends.tolist()] for ends in (self.sources, self.targets))
        return list(zip(*names, self.weights.tolist(), strict=True))

    def to_networkx(self) -> networkx.DiGraph:
        """Latents with ``layer`` and ``index``, connections with ``weight``."""
        import networkx

        graph = networkx.DiGraph(model=self.model, through=[list(head) for head in self.through])
        for layer, index in torch.cat((self.sources, self.targets)).unique(dim=0).tolist():
            graph.add_node(f"m{layer}.f{index}", layer=layer, index=index)
        graph.add_weighted_edges_from(self.rows())
        return graph


@torch.no_grad()
def weight_graph(
    dictionaries: Sequence[Dictionary],
    *,
    model: Model,
    top: int = 10,
    through: Heads = (),
    prompts: Int[Tensor, "prompt pos"] | None = None,
    reduce: str = "mean",
) -> WeightGraph:
    """The connections with most weight into each latent.

    Args:
        dictionaries: transcoders, skip transcoders or CLTs of one model, one for each layer at most.
        model: the model; its norms and heads lie between them.
        top: how many connections into each latent are kept, over all lower layers together.
        through: heads ``(layer, head)`` to lead through, lowest first; () for the direct way.
        prompts: if given, weights are multiplied with the source's activation on them.
        reduce: ``mean`` of that activation over all prompts and positions, or ``max``.

    Raises:
        OptionError: if dictionaries, heads or options do not fit.

    >>> from circuitkit.testing import tiny_model
    >>> from circuitkit.dictionaries.base import Site
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> coders = [SparseCoder(8, 4, 8).double() for _ in range(2)]
    >>> _ = [torch.nn.init.ones_(p) for coder in coders for p in coder.parameters()]
    >>> pair = [Dictionary(c, Site("mlp-in", i), (Site("mlp-out", i),)) for i, c in enumerate(coders)]
    >>> weight_graph(pair, model=tiny_model(), top=3)
    WeightGraph(random: 12 connections)
    """
    if top < 1 or reduce not in REDUCTIONS:
        raise OptionError(f"got top = {top} and reduce = {reduce!r}, expected at least 1 and {', '.join(REDUCTIONS)}")
    by_layer = _by_layer(model, dictionaries)
    if through:
        check_heads(model, through, max(by_layer))
    if prompts is not None and (prompts.dim() != 2 or not prompts.numel()):
        raise OptionError(f"got prompts of shape {tuple(prompts.shape)}, expected [prompt, pos], none of them empty")
    scales = None if prompts is None else _activity(model, list(by_layer.values()), prompts, reduce)
    parts = [_into(model, by_layer, layer, top, through, scales) for layer in by_layer]
    sources, targets, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    return WeightGraph(sources, targets, weights, tuple((a, b) for a, b in through), model.name)


def _by_layer(model: Model, dictionaries: Sequence[Dictionary]) -> dict[int, Dictionary]:
    if not dictionaries:
        raise OptionError("got no dictionaries, expected transcoders of at least two layers")
    found = dict[int, Dictionary]()
    for dictionary in dictionaries:
        check_reader(model, dictionary)
        if dictionary.read.layer in found:
            raise OptionError(f"got two transcoders that read {dictionary.read}, expected one; leave one of them out")
        found[dictionary.read.layer] = dictionary
    return dict(sorted(found.items()))


def _activity(
    model: Model, dictionaries: Sequence[Dictionary], prompts: Int[Tensor, "prompt pos"], reduce: str
) -> dict[int, Float[Tensor, " latent"]]:
    found = {d.read.layer: d.coder.W_enc.new_zeros(d.coder.n_latents) for d in dictionaries}
    for prompt in prompts:
        values = activations_at(model, [d.read for d in dictionaries], prompt[None].to(model.device))
        for d, x in zip(dictionaries, values, strict=True):
            latents, so_far = d.coder.encode(x[0].to(d.coder.W_enc)), found[d.read.layer]
            largest = torch.maximum(so_far, latents.amax(0))
            found[d.read.layer] = largest if reduce == "max" else so_far + latents.sum(0) / prompts.numel()
    return found


Ends = tuple[Int[Tensor, "edge 2"], Int[Tensor, "edge 2"], Float[Tensor, " edge"]]


def _into(
    model: Model,
    by_layer: dict[int, Dictionary],
    layer: int,
    top: int,
    through: Heads,
    scales: dict[int, Float[Tensor, " latent"]] | None,
) -> Ends:
    """The strongest connections into all latents of one layer."""
    reader = by_layer[layer]
    n, device = reader.coder.n_latents, reader.coder.W_enc.device
    reachable = not through or through[-1][0] <= highest_head(model, layer)
    reads = read_vectors(model, reader, through=through if reachable else ())
    best, ends = reads.new_zeros(0, n), torch.zeros(0, n, 2, dtype=torch.long, device=device)
    for below, dictionary in by_layer.items():
        writes = write_vectors(dictionary, through[0][0] if through else layer) if below < layer and reachable else None
        if writes is None:
            continue
        writes = writes.to(reads) if scales is None else writes.to(reads) * scales[below].to(reads)[:, None]
        some = max(1, CHUNK // n)
        for first in range(0, len(writes), some):
            products = writes[first : first + some] @ reads.T
            numbers = strongest(products, top)
            found = torch.stack((torch.full_like(numbers, below), first + numbers), -1)
            best, ends = torch.cat((best, products.gather(0, numbers))), torch.cat((ends, found))
            kept = strongest(best, top)
            best, ends = best.gather(0, kept), ends.gather(0, kept[..., None].expand(*kept.shape, 2))
    numbers = torch.arange(n, device=device)
    targets = torch.stack((torch.full_like(numbers, layer), numbers), 1)[:, None].expand(-1, len(best), 2)
    return ends.transpose(0, 1).reshape(-1, 2), targets.reshape(-1, 2), best.T.flatten()


def strongest(weights: Float[Tensor, "row latent"], top: int) -> Int[Tensor, "kept latent"]:
    """The rows of the largest magnitudes in each column, the largest first."""
    return weights.abs().topk(min(top, len(weights)), 0).indices
