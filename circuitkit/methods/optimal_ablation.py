"""Optimal ablation: what the model loses at least when a component can say only one thing.

    score(n) = L(clean, with a_n replaced by c_n) - L(clean),     c_n = the constant with the least mean L

L is a loss: the KL divergence from the clean run, or minus the metric that ``objective`` names. The constant is one
vector for all positions of all inputs. Zero, mean and resampled values also take away what a component tells the
rest, but put something in its place that may mislead it, and that damage counts as importance; the best constant does
the least damage, so what is left is the price of the missing information alone. The score is never below 0 for KL.
Wrong where the constant has more freedom than pairs to learn from: it is judged on the pairs that it was trained on. A
paired corrupt value can score lower: it leaves in place whatever both inputs share.
Cost: a forward and backward pass per component and step, from its block on; components are rows of a batch.
Reference: Li and Janson 2024, arXiv:2409.09951.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import CorruptWrites, corrupt_writes, fidelity, matrix_bytes, method, with_reference
from circuitkit.methods.optimal_constants import STEPS, optimal_writes, replaced_metric, writer_groups
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task

OTHERS = ("mean", "zero", "counterfactual")


@method("optimal-ablation", level="node")
def optimal_ablation(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    objective: str | None = None,
    steps: int = STEPS,
    compare: bool = False,
) -> NodeScores:
    """Score every component by its loss under its optimal constant; ``compare`` puts other ablations beside it.

    Raises:
        OptionError: if steps is less than 1.
        MetricError: if the objective has no gradient.
    """
    if type(steps) is not int or steps < 1:
        raise OptionError(f"got steps = {steps!r}, expected a whole number of at least 1 ({STEPS} is usual)")
    judged = fidelity(task, objective)
    ablations: dict[str, CorruptWrites] = {
        "optimal": optimal_writes(model, task, plan, objective=objective, steps=steps)
    }
    if compare:
        ablations |= {name: corrupt_writes(model, task, plan, name) for name in OTHERS}

    def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
        run, other = model.record(batch.clean), model.record(batch.corrupt)
        batch = with_reference(model, judged, batch, run)
        ends = [judged.metric(model.logits(r.inputs[-1], batch.positions), batch) for r in (run, other)]
        gaps = ends[0].new_zeros(len(batch), len(model.graph.sources), len(ablations))
        for column, corrupt_of in enumerate(ablations.values()):
            carried = other.writes if corrupt_of is None else corrupt_of(run)
            shift = model.wiring.expand_difference(carried, run.writes)
            for _, site, nodes in writer_groups(model, batch, plan):
                rows = slice(site.first + nodes.start, site.first + nodes.stop)
                left = replaced_metric(model, judged, batch, run, site, shift[rows])
                gaps[:, rows, column] = (ends[0] - left).T
        return gaps, torch.stack(ends, 1)

    gaps, ends = Moments(), Moments()
    for chunk, both in plan.over(task, model.device, "ablations", lambda b: matrix_bytes(model, b), one_chunk):
        gaps.add(chunk)
        ends.add(both)
    clean, corrupt = ends.mean.tolist()
    values, stderr = gaps.mean.float(), gaps.stderr.float()
    return NodeScores(values, stderr, model.graph.sources, tuple(ablations), clean, corrupt, n_examples=len(task))
