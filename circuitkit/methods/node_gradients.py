"""Shared by the node methods that use a gradient: what nodes change, times what that change is worth.

    effect(n) = sum over pos, width of  (a_n(clean) - a_n(corrupt)) * dM/da_n (clean)

Averaged over examples with its sign or, where the sign is given up, as a magnitude over one or several passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.methods.base import backward_bytes, run_bytes
from circuitkit.methods.grad_drop import Slopes, clean_slopes, flatness, passes, worth_of_passes
from circuitkit.methods.gradients import refuse_flat, refuse_without_gradient
from circuitkit.methods.nodes import (
    by_column,
    corrupt_activations,
    longest,
    node_moments,
    node_table,
    position_columns,
)
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.models.sites import Place, activations, find_places
from circuitkit.models.wiring import Port
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task

INSTEAD = ("activation-patching",)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some examples, and what their nodes carry.

    Args:
        run: the clean run.
        corrupt: what each place carries when it is corrupt.
        slopes: gradients at the wanted ports, one set per pass.
    """

    model: Model
    plan: Plan
    batch: Batch
    run: Run
    per_position: bool
    corrupt: list[Float[Tensor, "*batch pos node width"]]
    slopes: list[Slopes]


Effect = Callable[[Chunk, int, Place], list[Float[Tensor, "batch pos node"]]]


def port_of(model: Model, place: Place) -> Port:
    """Where a place's tensor is found; the stream that enters a block too."""
    if place.port is not None:
        return place.port
    blocks = model.wiring.blocks
    return Port(blocks[place.block], "in") if place.block < len(blocks) else model.wiring.final


def linear_effect(chunk: Chunk, ports: Sequence[Port], i: int, place: Place) -> list[Float[Tensor, "batch pos node"]]:
    """What a place's nodes are worth to first order, at each position, in each pass."""
    found = []
    for slopes in chunk.slopes:
        clean, slope = (at_least_float32(place.by_node(x)) for x in slopes[ports[i]])
        gap = clean - at_least_float32(chunk.corrupt[i][..., : clean.shape[1], :, : clean.shape[3]])
        found.append((gap * slope).sum(-1))
    return found


def node_scores(
    model: Model,
    task: Task,
    plan: Plan,
    *,
    site: str,
    per_position: bool,
    corrupt_value: str,
    signed: bool = True,
    of_each: bool = False,
    grad_drop: bool = False,
    effect: Effect | None = None,
    also: Sequence[Port] = (),
) -> NodeScores:
    """A table of effects of all nodes of a site.

    Args:
        signed: whether effects keep their sign; else magnitudes are averaged over passes.
        of_each: whether the magnitude is that of each example's effect; else that of the mean over examples.
        grad_drop: one pass per block instead of one.
        effect: what a place's nodes are worth, if not to first order.
        also: where else gradients are needed.

    Raises:
        OptionError: for an unknown site or corrupt value, or a site that the model lacks.
        MetricError: if the metric has no gradient at the clean run.
    """
    places = find_places(model, site)
    means = corrupt_activations(model, task, plan, site, places, corrupt_value)
    refuse_without_gradient(task, at_clean=True, instead=INSTEAD)
    width, cuts = longest(task), passes(model, grad_drop)
    ports, end = [port_of(model, place) for place in places], model.wiring.final

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor, tuple[float, float]]:
        run, other = model.record(batch.clean), model.record(batch.corrupt)
        ends = torch.stack([task.metric(model.logits(r.inputs[-1], batch.positions), batch) for r in (run, other)], 1)
        values = activations(model, other, places) if means is None else [m.to(run.inputs[0]) for m in means]
        slopes = [clean_slopes(model, task, batch, run, [*ports, *also, end], cut) for cut in cuts]
        chunk = Chunk(model, plan, batch, run, per_position, values, slopes)
        columns = position_columns(batch, width) if per_position else None
        found = []
        for i, place in enumerate(places):
            worth = linear_effect(chunk, ports, i, place) if effect is None else effect(chunk, i, place)
            found.append(torch.stack([by_column(w, columns) for w in worth], 1))
        flat = flatness(task, batch, model, run, at_least_float32(other.inputs[-1]), slopes[0][end][1])
        return torch.cat(found, 2), ends, flat  # [example, pass, node, column]

    def size(batch: Batch) -> float:
        return (2 + len(cuts)) * run_bytes(model, batch) + backward_bytes(model, batch)

    parts = list(plan.over(task, model.device, f"{site} scores", size, one_chunk))
    refuse_flat(task, [flat for *_, flat in parts], INSTEAD)
    effects, ends = (torch.cat(some) for some in zip(*(part[:2] for part in parts), strict=True))
    mean, stderr = node_moments(effects.abs() if of_each else effects)
    if not signed:
        own = [None if place.port is None else place.block for place in places for _ in range(place.n)]
        share = torch.tensor([worth_of_passes(cuts, block) for block in own])[:, None]
        mean, stderr = mean.abs().sum(0, keepdim=True) / share, stderr.sum(0, keepdim=True) / share
    return node_table(site, places, per_position, width, (mean[0], stderr[0]), ends, signed=signed)
