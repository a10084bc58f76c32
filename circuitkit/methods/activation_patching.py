"""Activation patching: replace one activation and see what the metric does.

    noising     score(n) = M(clean) - M(clean, with a_n corrupt)            is n necessary?
    denoising   score(n) = M(corrupt, with a_n clean) - M(corrupt)          is n sufficient?

Positive means that n supports the behaviour, in both directions; they answer different questions and find different
heads. Patching whole-stream sites late in the network always works and localises nothing.
Cost: one replay from n's layer on per component (and position); components are rows of a batch.
References: Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262;
Zhang and Nanda 2024, arXiv:2309.16042.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.ablation import check_corrupt_value
from circuitkit.methods.base import method, run_bytes, with_reference
from circuitkit.methods.nodes import corrupt_activations, longest, node_moments, node_table, position_columns
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.models.sites import Place, activations, editor, find_places, selection
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task


@method("activation-patching", level="node")
def activation_patching(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    site: str = "resid",
    direction: str = "noising",
    per_position: bool = True,
    corrupt_value: str = "counterfactual",
) -> NodeScores:
    """Patch every component of one kind, at every position or at all positions together.

    Raises:
        OptionError: for an unknown site, direction or corrupt value, a site that the model lacks, or denoising with a
            corrupt value that is not a run.
    """
    check_corrupt_value(corrupt_value)
    if direction not in ("noising", "denoising"):
        raise OptionError(f"got direction = {direction!r}, expected 'noising' or 'denoising'")
    if direction == "denoising" and corrupt_value != "counterfactual":
        raise OptionError(
            "denoising patches clean activations into a corrupt run, so corrupt_value must be 'counterfactual'"
        )
    places = find_places(model, site)
    means = corrupt_activations(model, task, plan, site, places, corrupt_value)
    width = longest(task)
    noising = direction == "noising"

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
        runs = model.record(batch.clean), model.record(batch.corrupt)
        batch = with_reference(model, task, batch, runs[0])
        ends = [task.metric(model.logits(run.inputs[-1], batch.positions), batch) for run in runs]
        base, source, reference = (*runs, ends[0]) if noising else (*runs[::-1], ends[1])
        values = activations(model, source, places) if means is None else [m.to(source.inputs[0]) for m in means]
        columns = position_columns(batch, width) if per_position else _all_positions(batch)
        effects = [
            _patch(model, task, plan, batch, base, place, value, columns, reference)
            for place, value in zip(places, values, strict=True)
        ]
        return torch.cat(effects, 1) * (1 if noising else -1), torch.stack(ends, 1)

    parts = list(plan.over(task, model.device, f"patching {site}", lambda b: run_bytes(model, b), one_chunk))
    effects, ends = (torch.cat(some) for some in zip(*parts, strict=True))
    return node_table(site, places, per_position, width, node_moments(effects), ends)


def _all_positions(batch: Batch) -> Tensor:
    return torch.arange(batch.clean.shape[1], device=batch.clean.device).expand(len(batch), 1, -1)


def _patch(
    model: Model, task: Task, plan: Plan, batch: Batch, base: Run, place: Place, value: Tensor,
    columns: Tensor, reference: Tensor,
) -> Tensor:  # fmt: skip
    """reference - M(patched) for every node and column of one block: [batch, node, column]."""
    n = place.n
    units = [(node, column) for node in range(n) for column in range(columns.shape[1])]
    size = max(1, plan.rows(run_bytes(model, batch), model.device) // len(batch))
    found: list[Tensor] = []
    for first in range(0, len(units), size):
        node, column = torch.tensor(units[first : first + size], device=batch.clean.device).T
        rows = torch.arange(len(batch), device=batch.clean.device).repeat(len(node))
        where = columns[rows, column.repeat_interleave(len(batch))]
        chosen = selection(where, node.repeat_interleave(len(batch)), batch.clean.shape[1], n)
        edit = editor(place, value, rows, chosen)
        x, hooks = base.inputs[place.block][rows], []
        if place.port is None:
            x = edit(x)
        else:
            hooks = [(place.port, edit)]
        last = model.replay(base, place.block, x, rows, hooks)
        many = batch.rows(rows)
        patched = task.metric(model.logits(last, many.positions), many)
        effect = torch.where((where >= 0).any(1), reference[rows] - patched, torch.nan)
        found.append(effect.unflatten(0, (len(node), len(batch))).T)
    return torch.cat(found, 1).unflatten(1, (n, -1))
