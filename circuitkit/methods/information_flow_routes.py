"""Information flow routes: how near each writer is to what a reader reads, from one forward pass.

    prox(u, v)    = max(0, |y_v| - |y_v - a_u|)        y_v: the whole stream where v reads, a_u: what u adds to it
    score(u -> v) = prox(u, v) / sum of prox over the writers that v can see, mean over positions and examples

|.| is the sum of magnitudes over the width of the stream (L1), one number per position. Writers share out a reader's
input among them, so scores of different readers cannot be compared: circuits are grown from the logits. A position at
which no writer is near gives 0 to all. Biases of attention outputs belong to no writer: they count in y_v, and no
edge gets their share.
Wrong where what matters is small: it says what a reader's input is made of, not what the behaviour depends on. It sees
neither the metric, nor the corrupt inputs, nor the reader's weights: all readers of one stream get the same scores.
Cost: one forward pass, and for each stream that is read one pass over all writes before it.
Reference: Ferrando and Voita 2024, arXiv:2403.00824. Deviations: whole heads and whole inputs, not one edge per token
and attended token; magnitudes are cut at 0 and no threshold is applied; means over positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import finished, matrix_bytes, method
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, hooked, keeper
from circuitkit.models.wiring import Port
from circuitkit.scores import Scores
from circuitkit.shapes import Stream
from circuitkit.tasks.base import Batch, Task


@method("information-flow-routes")
def information_flow_routes(model: Model, task: Task, *, plan: Plan) -> Scores:
    """Score every edge by how near its writer is to what its reader reads, relative to the other writers."""
    moments = Moments()

    def one_chunk(batch: Batch, _plan: Plan) -> Float[Tensor, "batch src dst"]:
        run, streams = _record_streams(model, batch)
        real = torch.arange(batch.clean.shape[1], device=model.device) < batch.lengths[:, None]
        columns = {port: _shares(model, run, y, _seen(model, port)) for port, y in streams.items()}
        scores = torch.zeros(len(batch), *model.graph.mask.shape, device=model.device)
        for site in model.wiring.read_sites:
            shares = columns[site.stream].transpose(0, 1)  # example, writer, position
            mean = (shares * real[:, None]).sum(-1) / batch.lengths[:, None]
            scores[:, : mean.shape[1], site.columns] = mean[..., None].to(scores.dtype)
        return scores

    for chunk in plan.over(task, model.device, "proximities", lambda b: 2 * matrix_bytes(model, b), one_chunk):
        moments.add(chunk)
    return finished(model, moments, signed=False, comparable=False)


def _record_streams(model: Model, batch: Batch) -> tuple[Run, dict[Port, Stream]]:
    """The clean run and what every reader reads, from one forward pass."""
    seen: dict[Port, Stream] = {}
    ports = dict.fromkeys(site.stream for site in model.wiring.read_sites[:-1])
    hooks: list[Hook] = [(port, keeper(seen, port)) for port in ports]
    with hooked(hooks):
        run = model.record(batch.clean)
    return run, seen | {model.wiring.read_sites[-1].stream: run.inputs[-1]}


def _seen(model: Model, port: Port) -> int:
    """How many writers, from the first, the readers of a stream can see."""
    return max(model.wiring.writes_before(site) for site in model.wiring.read_sites if site.stream is port)


def _shares(model: Model, run: Run, stream: Stream, n: int) -> Float[Tensor, "src batch pos"]:
    """Each writer's share of the proximities to a stream at each position; zero where no writer is near."""
    y = at_least_float32(stream)
    whole = y.abs().sum(-1)
    near = y.new_zeros(n, *y.shape[:2])
    for site, written in zip(model.wiring.write_sites, run.writes, strict=True):
        if site.first < n:
            near[site.rows] = (whole - (y - site.expand(written)).abs().sum(-1)).clamp(min=0)
    total = near.sum(0)
    return near / total.where(total > 0, torch.ones_like(total))
