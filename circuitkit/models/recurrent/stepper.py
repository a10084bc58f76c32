"""Running a recurrent network step by step, on the weights of the user's module, with every value in reach.

One loop serves plain runs, circuits and single patched edges; they differ in what the links inside a block add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuitkit.models.recurrent.parts import Block, Link, Network, Slot, Stage, Weights

Values = dict[str, Float[Tensor, "*_ _ _"]]
Outer = Mapping[Slot, Tensor | None]
Inner = Callable[[Link, Tensor, int], Tensor]
Edit = Callable[[str, Tensor, int | None], Tensor]


def shifted(
    values: Float[Tensor, "*row step size"], lag: int, start: Float[Tensor, " size"], *, reverse: bool
) -> Float[Tensor, "*row step size"]:
    """What was written ``lag`` steps earlier (later, where time runs backward); the start before the first step."""
    if lag == 0:
        return values
    lag = min(lag, values.shape[-2])
    edge = start.expand(*values.shape[:-2], lag, -1)
    if reverse:
        return torch.cat((values[..., lag:, :], edge), -2)
    return torch.cat((edge, values[..., : values.shape[-2] - lag, :]), -2)


def rows_of(stage: Stage, link: Link) -> list[tuple[Slot, slice]]:
    """The slots that a link feeds, each with its rows of the matrix."""
    found, first = [], 0
    for name in link.slots:
        slot = stage.slot(name)
        found.append((slot, slice(first, first + slot.size)))
        first += slot.size
    return found


def outer_sums(block: Block, values: Mapping[str, Tensor], weights: Weights) -> dict[Slot, Tensor | None]:
    """What biases and links from other blocks add to every slot, for all steps with one product per link."""
    out: dict[Slot, Tensor | None] = {}
    for stage in block.stages:
        out |= {slot: weights.biases[slot] for slot in stage.slots}
        for link in stage.links:
            if link.source in block.own:
                continue
            x = shifted(values[link.source], link.lag, weights.starts[link.source], reverse=block.reverse)
            y = through(x, weights.links[link])
            for slot, rows in rows_of(stage, link):
                out[slot] = plus(out[slot], y[..., rows])
    return out


def through(x: Tensor, weight: Float[Tensor, "source row"] | None) -> Tensor:
    """A link's matrix applied; the identity if it is None."""
    return x if weight is None else x @ weight


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """A sum in which None is zero."""
    return b if a is None else a if b is None else a + b


def run_block(
    block: Block,
    n_steps: int,
    outer: Outer,
    inner: Inner,
    weights: Weights,
    *,
    edit: Edit | None = None,
    before: Mapping[str, list[Tensor]] | None = None,
    first: int = 0,
    segment: int | None = None,
) -> Values:
    """What a block writes at every step.

    Args:
        n_steps: length of the input.
        outer: what biases and links from other blocks add to each slot, ``[..., step, size]`` or ``[size]``.
        inner: ``(link, what was written, step) -> what the link adds to its slots``.
        weights: for the vectors before the first step.
        edit: ``(site, value, step) -> value``; the step is None where all steps are computed at once.
        before: what was written just before step ``first`` (latest last), where that is not the start.
        first: the first step to be computed; earlier ones are not in the result.
        segment: steps between checkpoints of the backward pass, or None for none.
    """
    if not block.recurrent:
        return _all_at_once(block, n_steps, outer, edit, first)
    order = range(n_steps - 1, -1, -1) if block.reverse else range(first, n_steps)
    state = {w.name: list(before[w.name]) if before else [weights.starts[w.name]] for w in block.writes}
    size = max(1, len(order)) if segment is None else segment
    cuts = [order[begin : begin + size] for begin in range(0, len(order), size)]
    pieces = {slot: _pieces(x, cuts, n_steps) for slot, x in outer.items()}
    if len(cuts) == 1:
        only = {slot: piece[0] for slot, piece in pieces.items()}
        return _joined([_some_steps(block, cuts[0], only, inner, edit, weights, state)], block.reverse)
    parts, memory = [], max(block.memory, 1)
    for number, steps in enumerate(cuts):
        own = {slot: piece[number] for slot, piece in pieces.items()}
        part: Any = checkpoint(
            _some_steps, block, steps, own, inner, edit, weights, state, use_reentrant=False, preserve_rng_state=False
        )
        parts.append(part)
        state = {name: (state[name] + list(made[-memory:]))[-memory:] for name, made in part.items()}
    return _joined(parts, block.reverse)


def _joined(parts: list[dict[str, list[Tensor]]], reverse: bool) -> Values:
    out: Values = {}
    for name in parts[0]:
        made = [x for part in parts for x in part[name]]
        if made[0].shape != made[-1].shape:  # the first step may depend on the start alone, which has no batch
            made = list(torch.broadcast_tensors(*made))
        out[name] = torch.stack(made[::-1] if reverse else made, -2)
    return out


def _some_steps(
    block: Block,
    steps: range,
    outer: Outer,
    inner: Inner,
    edit: Edit | None,
    weights: Weights,
    state: Mapping[str, list[Tensor]],
) -> dict[str, list[Tensor]]:
    """What is written at each of some steps, in the order of time."""
    past = {name: list(made) for name, made in state.items()}
    plan = [
        (stage, [(link, rows_of(stage, link)) for link in stage.links if link.source in block.own])
        for stage in block.stages
    ]
    kept = {name: len(made) for name, made in past.items()}
    # Taken apart once: the backward pass of indexing step by step would fill a tensor of all steps at each of them.
    first = min(steps[0], steps[-1])
    parts = {slot: [x] * len(steps) if x is None or x.dim() == 1 else x.unbind(-2) for slot, x in outer.items()}
    for done, t in enumerate(steps):

        def see(name: str, value: Tensor, t: int = t) -> Tensor:
            return value if edit is None else edit(f"{block.stem}.{name}", value, t)

        for stage, links in plan:
            slots = {slot.name: parts[slot][t - first] for slot in stage.slots}
            for link, rows in links:
                made_at = kept[link.source] + done - link.lag
                value = past[link.source][made_at] if made_at >= 0 else weights.starts[link.source]
                y = inner(link, value, t)
                for slot, part in rows:
                    slots[slot.name] = plus(slots[slot.name], y if len(rows) == 1 else y[..., part])
            if edit is not None:
                slots = {name: see(_site(name, stage), x) for name, x in slots.items() if x is not None}
            for name, made in stage.step(slots, see).items():  # type: ignore[arg-type]
                past[name].append(made)
    return {name: made[kept[name] :] for name, made in past.items()}


def _site(slot: str, stage: Stage) -> str:
    """A pre-activation's name as a site: the slot's with a mark, ``z_pre``; ``pre`` if the stage has one slot only."""
    return f"{slot}_pre" if slot else "pre"


def _pieces(x: Tensor | None, cuts: Sequence[range], n_steps: int) -> Sequence[Tensor | None]:
    """What a slot gets from outside in each of some stretches of time, cut once."""
    if x is None or x.dim() == 1:
        return [x] * len(cuts)
    starts = sorted(min(cut[0], cut[-1]) for cut in cuts)
    sizes = [b - a for a, b in zip(starts, [*starts[1:], n_steps], strict=True)]
    made = x[..., starts[0] :, :].split(sizes, -2)
    return made if cuts[0][0] <= cuts[-1][0] else made[::-1]


def _all_at_once(block: Block, n_steps: int, outer: Outer, edit: Edit | None, first: int) -> Values:
    stage = block.stages[0]

    def see(name: str, value: Tensor) -> Tensor:
        return value if edit is None else edit(f"{block.stem}.{name}", value, None)

    slots = {}
    for slot in stage.slots:
        x = outer[slot]
        if x is not None:
            x = x if x.dim() > 1 else x.expand(n_steps, -1)
            slots[slot.name] = see(_site(slot.name, stage), x if block.across else x[..., first:, :])
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in slots.values()))
    made = stage.step({name: x.expand(*lead, x.shape[-1]) for name, x in slots.items()}, see)
    return {name: x[..., first:, :] if block.across else x for name, x in made.items()}


def run_network(
    network: Network,
    x: Float[Tensor, "batch step size"],
    *,
    edit: Edit | None = None,
    probes: Mapping[Slot, Tensor] | None = None,
    segment: int | None = None,
) -> Values:
    """All writes of a plain run, and what the read-out reads under the name `FEATURES`.

    Args:
        x: the input vectors.
        edit: ``(site, value, step) -> value``.
        probes: added to the slots: zeros with a gradient tell what each pre-activation is worth.
        segment: steps between checkpoints of the backward pass, or None for none.
    """
    weights = Weights.of(network, x)
    values: Values = {network.input.name: x}

    def inner(link: Link, value: Tensor, _step: int) -> Tensor:
        return through(value, weights.links[link])

    for block in (*network.blocks, network.readout):
        outer = outer_sums(block, values, weights)
        if probes is not None:
            outer = {slot: plus(y, probes[slot]) for slot, y in outer.items()}
        made = run_block(block, x.shape[-2], outer, inner, weights, edit=edit, segment=segment)
        shape = x.shape[:-1]
        values |= {name: y.expand(*shape, y.shape[-1]) for name, y in made.items()}
    return values
