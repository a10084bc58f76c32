"""Moving what one writer adds to the stream, for every reader behind it at once, and the gradients met on the way.

    x_v = x + shift        for all readers v that can see writer u, as if u had written a_u + shift

Nothing before the writer changes, so the replay starts at its block. Every reader sees the same stream here, so the
model runs fused: this is one replay, where a general circuit gives each reader a stream of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import MetricError
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.edits import Objective, own_copy, pulled
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.wiring import Port, ReadSite, WriteSite
from circuitkit.shapes import Stream


def replay_moved(
    model: Model, run: Run, site: WriteSite, shift: Stream, rows: Int[Tensor, " row"], hooks: Sequence[Hook] = ()
) -> Stream:
    """The stream after the last block when a writer of ``site`` adds ``shift`` more; differentiable in ``shift``.

    Args:
        run: the run that is changed.
        site: where the writer writes; each row may move another writer of it.
        shift: what is added to the stream, for each row.
        rows: which example of the run each row continues.
        hooks: what else to attach; they see the moved values.
    """
    blocks, inside, after = model.wiring.blocks, _readers_inside(model, site), site.block + 1
    streams: dict[Port, Tensor] = {}
    edits: list[Hook] = [(reader.stream, keeper(streams, reader.stream)) for reader in inside]
    edits += [(reader.port, partial(_read_again, reader, streams, shift)) for reader in inside]
    if not inside:
        return model.replay(run, after, _moved(run.inputs[after][rows], shift), rows, hooks)
    if after < len(blocks):
        edits.append((Port(blocks[after], "in"), partial(_moved, shift=shift)))
    last = model.replay(run, site.block, run.inputs[site.block][rows], rows, [*edits, *hooks])
    return last if after < len(blocks) else _moved(last, shift)


def moved_gradients(
    model: Model,
    run: Run,
    site: WriteSite,
    shift: Float[Tensor, "step row pos d"],
    rows: Int[Tensor, " row"],
    positions: Int[Tensor, "batch answer"],
    objective: Objective,
) -> Iterator[tuple[slice, Float[Tensor, "node row pos d"]]]:
    """Gradient of an objective at every private copy of the stream behind a writer that is moved, summed over steps.

    Args:
        shift: how far the writer is moved at each step.
        rows: which example of the run each row continues.
        positions: where logits are read.
        objective: from logits ``[step * row, answer, vocab]`` to one number.

    Returns:
        from the last block to the first, columns of the edge matrix with the gradients of those readers (in one
        buffer: used before the next is asked for).

    Raises:
        MetricError: if the objective does not depend on the logits.
    """
    seen: dict[Port, Tensor] = {}
    wiring, inside, many = model.wiring, _readers_inside(model, site), rows.repeat(len(shift))
    sites = [s for s in wiring.read_sites if site.block < s.block < len(wiring.blocks)]
    flat = shift.flatten(0, 1).detach().requires_grad_(True)
    with torch.enable_grad():
        hooks: list[Hook] = [(port, keeper(seen, port)) for port in dict.fromkeys(s.stream for s in [*inside, *sites])]
        hooks += [(s.port, own_copy(seen, s.port)) for s in [*inside, *sites]]
        last = replay_moved(model, run, site, flat, many, hooks)
        value = objective(model.logits(last, positions[many]))
        if not value.requires_grad:
            raise MetricError("the metric does not depend on the logits, so it has no gradient")
        wanted = [*(seen[s.port] for s in [*inside, *sites]), last]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
    found = {s: (seen[s.port], at_least_float32(seen[s.stream]) + flat) for s in inside}
    found |= {s: (seen[s.port], seen[s.stream]) for s in sites} | {wiring.read_sites[-1]: (last, last)}
    slopes = dict(zip(found, gradients, strict=True))
    return pulled(found, slopes, (*shift.shape[:2], shift.shape[2]), False)


def _readers_inside(model: Model, site: WriteSite) -> list[ReadSite]:
    """Readers of the writer's own block that see what it writes: the MLP that follows its attention."""
    mask = model.graph.mask[site.rows]
    return [s for s in model.wiring.read_sites if s.block == site.block and bool(mask[:, s.columns].any())]


def _moved(x: Stream, shift: Stream) -> Stream:
    return (at_least_float32(x) + shift).to(x.dtype)


def _read_again(reader: ReadSite, streams: dict[Port, Tensor], shift: Stream, y: Tensor) -> Tensor:
    values = reader.read((at_least_float32(streams[reader.stream]) + shift)[None].expand(reader.n, -1, -1, -1))
    return values.movedim(0, 2).reshape(y.shape).to(y.dtype)
