"""Kinds of activations that can be patched as a whole: where they are found, read and replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.patterns import check_patterns
from circuitkit.models.wiring import Port

SITES = ("resid", "head", "q", "k", "v", "pattern", "mlp", "neuron")


@dataclass(frozen=True, eq=False)
class Place:
    """One tensor of one block whose nodes can be replaced.

    Args:
        block: index of the block.
        port: where the tensor is found; None for the stream that enters the block.
        n: nodes that share it.
        pattern: whether it is ``[batch, head, query, key]`` rather than ``[batch, pos, node * width]``.
    """

    block: int
    port: Port | None
    n: int
    pattern: bool = False

    def by_node(self, x: Tensor) -> Float[Tensor, "batch pos node width"]:
        """The tensor with its nodes on an axis of their own."""
        return x.transpose(1, 2) if self.pattern else x.reshape(*x.shape[:2], self.n, -1)

    def fuse(self, y: Float[Tensor, "batch pos node width"], like: Tensor) -> Tensor:
        """The inverse of `by_node`."""
        return y.transpose(1, 2) if self.pattern else y.reshape(like.shape)


def find_places(model: Model, site: str) -> list[Place]:
    """Where a kind of activation is found, block by block.

    Raises:
        OptionError: if the model has none, or patterns that it does not use.
    """
    wiring, n = model.wiring, len(model.wiring.blocks)
    if site not in SITES:
        raise OptionError(f"got site = {site!r}, expected one of {', '.join(SITES)}")
    if site == "resid":
        return [Place(block, None, 1) for block in range(n + 1)]
    if site == "pattern" and wiring.patterns:
        check_patterns(model)
        heads = wiring.graph.sources
        return [
            Place(i, port, sum(name.startswith(f"a{i}.h") for name in heads), True)
            for i, port in enumerate(wiring.patterns)
        ]
    if site in ("head", "mlp", "neuron"):
        kinds = wiring.graph.source_nodes
        found = [Place(s.block, s.port, s.n) for s in wiring.write_sites if kinds[s.first].kind == site]
    else:
        slots = wiring.graph.destination_nodes
        found = [Place(s.block, s.port, s.n) for s in wiring.read_sites if slots[s.first].slot == site]
    if not found:
        raise OptionError(f"{model.name} has no {site}; choose another site")
    return found


def activations(model: Model, run: Run, places: list[Place]) -> list[Float[Tensor, "batch pos node width"]]:
    """What a run has at each place; a pattern's positions are its queries, its width the keys."""
    seen: dict[int, Tensor] = {}
    hooks: list[Hook] = [(place.port, keeper(seen, i)) for i, place in enumerate(places) if place.port is not None]
    rows = torch.arange(run.batch, device=run.inputs[0].device)
    model.replay(run, 0, run.inputs[0], rows, hooks)
    return [
        run.inputs[place.block][:, :, None] if place.port is None else place.by_node(seen[i])
        for i, place in enumerate(places)
    ]


def editor(
    place: Place,
    value: Float[Tensor, "*batch pos node width"],
    rows: Int[Tensor, " row"],
    chosen: Bool[Tensor, "row pos node"],
) -> Callable[[Tensor], Tensor]:
    """A hook that replaces the chosen nodes and positions of each row.

    Args:
        value: one per example, or without the batch axis a mean over the task.
        rows: which example each row continues.
    """

    def edit(x: Tensor) -> Tensor:
        y = place.by_node(x)
        new = value[rows] if value.dim() == 4 else value[: y.shape[1]][None]
        return place.fuse(torch.where(chosen[..., None], new.to(y.dtype), y), x)

    return edit


def selection(
    where: Int[Tensor, "row place"], node: Int[Tensor, " row"], length: int, n: int
) -> Bool[Tensor, "row pos node"]:
    """One node and some positions (-1 for none) per row, as a mask."""
    chosen = torch.zeros(len(where), length, n, dtype=torch.bool, device=where.device)
    row = torch.arange(len(where), device=where.device)[:, None].expand_as(where)
    real = where >= 0
    chosen[row[real], where[real], node[:, None].expand_as(where)[real]] = True
    return chosen
