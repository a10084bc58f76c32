"""Activation patching in a recurrent network: replace what a site holds at one step, or hold it over several.

    noising     score(n, t) = M(clean) - M(clean, with a_n corrupt at steps t .. t + hold - 1)       is it necessary?
    denoising   score(n, t) = M(corrupt, with a_n clean at these steps) - M(corrupt)                 is it sufficient?

``hold = 1`` is a kick: from the next step on the network is on its own. ``hold = 0`` clamps the site to the end. A kick
that an attractor undoes is no evidence of irrelevance, so look at both. Patching the whole state of a network that has
no other memory moves the whole effect at every step and localises nothing: patch gates, units or subspaces (``nodes =
"each"`` on `RecurrentModel.viewed`). A patched state far from all visited ones says little about the network:
``provenance["distance"]`` has, for every cell, how far it is from the nearest visited state, in units of the distance
between visited neighbours (nine visited states in ten are within 1; see `circuitkit.functional.manifold`).
Cost: one run per node and step; they are rows of a batch.
References: Vig et al. 2020, arXiv:2004.12265; Geiger et al. 2021, arXiv:2106.02997 (interchange interventions).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.manifold import distance_to_visited
from circuitkit.methods.base import method, run_bytes, with_reference
from circuitkit.methods.nodes import longest, node_moments, position_columns
from circuitkit.methods.plan import Plan
from circuitkit.models.recurrent.model import RecurrentModel
from circuitkit.models.recurrent.patching import Patches, SiteNodes, run_patched, site_nodes
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task

VISITED = 2000  # states that a patched one is compared with


@method("state-patching", level="node", families=("recurrent",))
def state_patching(
    model: RecurrentModel,
    task: Task,
    *,
    plan: Plan,
    site: str | None = None,
    nodes: Literal["all", "each"] = "all",
    hold: int = 1,
    direction: Literal["noising", "denoising"] = "noising",
    noise: float | None = None,
) -> NodeScores:
    """Patch a site of a recurrent network at every step.

    Args:
        site: a name from `RecurrentModel.trace`: a state (``l0.h``), a gate (``l0.z``), a summand (``l0.kept``); by
            default the state that the read-out reads.
        nodes: the site as a whole, or each node of the model's view by itself.
        hold: for how many steps; 0 to the end.
        direction: which run is patched.
        noise: put the run's own value plus Gaussian noise of so many standard deviations there, instead of the other
            run's value.

    Raises:
        OptionError: for an unknown site or direction, or options out of range.
    """
    if direction not in ("noising", "denoising") or nodes not in ("all", "each"):
        raise OptionError(
            f"got direction = {direction!r} and nodes = {nodes!r}, expected 'noising' or 'denoising', 'all' or 'each'"
        )
    if type(hold) is not int or hold < 0:
        raise OptionError(f"got hold = {hold!r}, expected a number of steps, or 0 for all that are left")
    if noise is not None and not noise > 0:
        raise OptionError(f"got noise = {noise!r}, expected a number of standard deviations above 0")
    found = site_nodes(model, site or model.network.features[0], each=nodes == "each")
    width, noising = longest(task), direction == "noising"
    generator = torch.Generator().manual_seed(plan.seed)

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        traces = [model.trace(side) for side in (batch.clean, batch.corrupt)]
        runs = [model.record_of(trace["input"]) for trace in traces]
        batch = with_reference(model, task, batch, runs[0])
        ends = [task.metric(model.logits(run.inputs[-1], batch.positions), batch) for run in runs]
        own, other = (0, 1) if noising else (1, 0)
        value = traces[other][found.site]
        if noise is not None:
            value = traces[own][found.site]
            drawn = torch.randn(value.shape, generator=generator).to(value)
            value = value + noise * value.std((0, 1)) * drawn
        visited = torch.cat([trace[found.site].flatten(0, 1) for trace in traces])
        columns = position_columns(batch, width)[..., 0]
        effect, distance = _patch(model, task, plan, batch, traces[own]["input"], found, value, columns, hold, visited)
        effect = ends[own][:, None, None] - effect
        effect = effect.masked_fill(columns[:, None] < 0, torch.nan)
        distance = distance.masked_fill(columns[:, None] < 0, torch.nan)
        return effect * (1 if noising else -1), torch.stack(ends, 1), distance

    parts = list(plan.over(task, model.device, f"patching {found.site}", lambda b: run_bytes(model, b), one_chunk))
    effects, ends, distances = (torch.cat(some) for some in zip(*parts, strict=True))
    mean, stderr = (m.float() for m in node_moments(effects))
    labels = tuple(str(i - width + 1) if i < width - 1 else "end" for i in range(width))
    clean, corrupt = ends.mean(0).tolist()
    far: dict[str, Any] = {"distance": distances.double().nanmean(0).tolist()}
    return NodeScores(mean, stderr, found.names, labels, clean, corrupt, n_examples=len(ends), provenance=far)


def _patch(
    model: RecurrentModel, task: Task, plan: Plan, batch: Batch, x: Tensor, found: SiteNodes, value: Tensor,
    columns: Tensor, hold: int, visited: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The metric of every patched run, and how far its state was from visited ones: ``[batch, node, column]``."""
    n, width = len(found.names), columns.shape[1]
    size = max(1, plan.rows(run_bytes(model, batch), model.device) // len(batch))
    units = torch.cartesian_prod(torch.arange(n), torch.arange(width))
    metrics, states = [], []
    for some in units.split(size):
        node, column = some.T
        rows = torch.arange(len(batch), device=x.device).repeat(len(some))
        first = columns[rows, column.to(x.device).repeat_interleave(len(batch))].clamp(min=0)
        stop = torch.full_like(first, x.shape[1]) if hold == 0 else (first + hold).clamp(max=x.shape[1])
        own = found.projections[node].to(x.device).repeat_interleave(len(batch), 0)
        features, held = run_patched(model, x[rows], Patches(found.site, own, value[rows], first, stop))
        many = batch.rows(rows)
        metrics.append(task.metric(model.logits(features, many.positions), many).unflatten(0, (len(some), -1)))
        states.append(held.unflatten(0, (len(some), -1)))
    far = _distance(torch.cat(states), visited)
    metric, far = (each.T.unflatten(1, (n, width)) for each in (torch.cat(metrics), far))
    return metric, far


def _distance(states: Tensor, visited: Tensor) -> Tensor:
    """How far states are from some visited ones; NaN where only one state was ever visited."""
    some = visited[:: -(-len(visited) // VISITED)]
    if len(some.unique(dim=0)) < 2:
        return torch.full(states.shape[:-1], torch.nan)
    return distance_to_visited(states, some).relative
