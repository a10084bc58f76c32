"""Shared by methods that score nodes: what corrupt activations are, positions as columns, and the finished table."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.ablation import check_corrupt_value, task_mean
from circuitkit.methods.base import run_bytes
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.models.sites import Place, activations
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task


def corrupt_activations(
    model: Model, task: Task, plan: Plan, site: str, places: list[Place], corrupt_value: str
) -> list[Tensor] | None:
    """What every place carries when it is corrupt, without a batch axis; None for the paired run itself.

    Raises:
        OptionError: for an unknown corrupt value, optimal constants, or a mean pattern over pairs of several lengths.
    """
    check_corrupt_value(corrupt_value)
    if corrupt_value == "counterfactual":
        return None
    if corrupt_value == "optimal":
        raise OptionError(
            "optimal constants are learned for what whole components write, not for single activations; "
            "use the method 'optimal-ablation', or corrupt_value = 'mean'"
        )
    if site == "pattern" and corrupt_value != "zero" and len({b.clean.shape[1] for b in task.batches}) > 1:
        raise OptionError("a mean pattern needs pairs of one length")

    def one_chunk(batch: Batch, _plan: Plan) -> tuple[list[Tensor], Tensor]:
        return activations(model, model.record(batch.clean), places), batch.lengths

    recorded = list(plan.over(task, model.device, "mean activations", lambda b: 2 * run_bytes(model, b), one_chunk))
    per_position = corrupt_value == "position-mean"
    means = [task_mean(((v[i], n) for v, n in recorded), per_position=per_position) for i in range(len(places))]
    return [torch.zeros_like(m) for m in means] if corrupt_value == "zero" else means


def longest(task: Task) -> int:
    """Positions of the longest input."""
    return max(batch.clean.shape[1] for batch in task.batches)


def position_columns(batch: Batch, width: int) -> Int[Tensor, "batch column 1"]:
    """Which position each column means in each example: counted from the end, so that answers line up; -1 for none."""
    ends = batch.lengths[:, None] - width + torch.arange(width, device=batch.clean.device)
    return ends.clamp(min=-1)[..., None]


def by_column(
    effects: Float[Tensor, "batch pos node"], columns: Int[Tensor, "batch column 1"] | None
) -> Float[Tensor, "batch node column"]:
    """Effects by column, NaN where an example has no such position; without columns their sum over positions."""
    if columns is None:
        return effects.sum(1)[..., None]
    where = columns.expand(-1, -1, effects.shape[2])
    picked = effects.gather(1, where.clamp(min=0)).masked_fill(where < 0, torch.nan)
    return picked.transpose(1, 2)


def node_moments(effects: Float[Tensor, "example *cell"]) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Mean over the examples that have a cell at all (the others are NaN there), and its standard error."""
    effects = effects.cpu().double()
    count = effects.isfinite().sum(0)
    mean = effects.nanmean(0)
    spread = (effects - mean).square().nansum(0) / (count - 1).clamp(min=1)
    return mean, (spread / count.clamp(min=1)).sqrt()


def node_table(
    site: str,
    places: list[Place],
    per_position: bool,
    width: int,
    moments: tuple[Float[Tensor, "node column"], Float[Tensor, "node column"]],
    ends: Float[Tensor, "example 2"],
    **fields: Any,
) -> NodeScores:
    """Means and standard errors, the nodes of one place after the other, with the labels of the usual heat maps.

    Args:
        ends: the metric of each example on the clean and on the corrupt input.
    """
    clean, corrupt = ends.mean(0).tolist()
    rows, names = _labels(site, places, per_position, width)
    mean, stderr = (m.float().reshape(len(rows), len(names)) for m in moments)
    return NodeScores(mean, stderr, rows, names, clean, corrupt, n_examples=len(ends), **fields)


def _labels(site: str, places: list[Place], per_position: bool, width: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    n, blocks = places[0].n, [f"L{place.block}" for place in places]
    letter = "N" if site == "neuron" else "H"
    if site == "resid":
        blocks[-1] = "final"
    if per_position:
        rows = [b if n == 1 else f"{b}{letter}{i}" for b in blocks for i in range(n)]
        return tuple(rows), tuple(str(i - width + 1) if i < width - 1 else "end" for i in range(width))
    return tuple(blocks), tuple("all" if n == 1 else f"{letter}{i}" for i in range(n))
