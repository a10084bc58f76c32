"""A model that ends at a linear probe: the same module up to a layer, with the probe's answer in place of logits.

Every method works on it: the logit at a position is w . x + b there, and its mean over positions is the probe on the
mean of the stream, so a classifier's features and edges are found as a language model's are.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.norms import at_least_float32
from circuitkit.graph import Graph
from circuitkit.models.hooked import Model
from circuitkit.models.wiring import Port, ReadSite


def probed(model: Model, layer: int, weight: Float[Tensor, " d"], bias: float = 0.0) -> Model:
    """The model up to and with block ``layer``, read by one linear probe of the stream behind it.

    Raises:
        OptionError: for a layer that is not there, or a probe of another width.

    >>> import circuitkit as ck
    >>> short = probed(ck.load("stories260k"), 1, torch.ones(64))
    >>> short.graph.sources[-1], short.graph.destinations[-1]
    ('m1', 'logits')
    """
    wiring = model.wiring
    n = len(wiring.blocks)
    if not 0 <= layer < n:
        raise OptionError(f"got layer = {layer}, and {model.name} has layers 0 to {n - 1}")
    if weight.shape != (model.width,):
        raise OptionError(f"got a probe of shape {tuple(weight.shape)}, expected ({model.width},): the stream's width")
    final = wiring.final if layer == n - 1 else Port(wiring.blocks[layer + 1], "in")
    writes = tuple(site for site in wiring.write_sites if site.block <= layer)
    inner = tuple(site for site in wiring.read_sites if site.block <= layer)
    rows, columns = writes[-1].rows.stop, inner[-1].columns.stop
    last = replace(wiring.graph.destination_nodes[-1], layer=layer + 1, stage=2 * layer + 3)
    mask, feeds = wiring.graph.mask[:rows, :columns], wiring.graph.feeds[:columns, :rows]
    graph = Graph(
        wiring.graph.source_nodes[:rows],
        (*wiring.graph.destination_nodes[:columns], last),
        torch.cat([mask, torch.ones(rows, 1, dtype=torch.bool)], 1),
        torch.cat([feeds, torch.zeros(1, rows, dtype=torch.bool)]),
    )

    def tail(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        return (at_least_float32(x) @ weight.to(at_least_float32(x)) + bias)[..., None]

    short = copy.copy(model)
    short.wiring = replace(
        wiring, graph=graph, blocks=wiring.blocks[: layer + 1], write_sites=writes, tail=tail, final=final,
        read_sites=(*inner, ReadSite(columns, 1, layer + 1, final, final)), patterns=wiring.patterns[: layer + 1],
        mlps=tuple(parts for parts in wiring.mlps if parts.block <= layer), final_norm=None, normed=None,
    )  # fmt: skip
    return short
