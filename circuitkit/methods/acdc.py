"""ACDC: go through all edges from the logits down and drop each that the behaviour does not miss.

    r(e) = M(H) - M(H without e)        H: the circuit so far, at first the whole model; M: mean over the task
    r(e) < tau  drops e for good, else it is kept

M is minus the KL divergence from the whole model unless `objective` names another metric.
Cost: one circuit per edge into readers that still lead to the logits. Readers are taken from the logits down, so all
before a reader is as in the clean run and only what a removal changes is computed; tests run together on the batch
axis, as a chain that assumes the outcome of each, and what follows the first wrong assumption runs again.
When it is wrong: the result depends on the order (`order`), since of two edges that can replace each other the one
tested first goes. Many edges with effects just under tau may all go: M falls by less than tau for each, no more is
promised. Edges that work against the behaviour go unless `magnitude` is set.
Reference: Conmy et al. 2023, arXiv:2304.14997, where readers' inputs and the like are edges too, which are always kept.
`magnitude` is the absolute threshold of their code. Edges into heads and MLPs that no longer lead to the logits are
dropped untested: their effect is exactly zero. Scores are r as tested, 0 for edges never tested.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.ablation import check_corrupt_value
from circuitkit.methods.base import EVERY_FAMILY, fidelity, method
from circuitkit.methods.plan import Plan
from circuitkit.methods.search import Judge, Rule, Search
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task

Order = Literal["reverse", "forward", "random"]


@method("acdc", families=EVERY_FAMILY)
def acdc(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    tau: float = 0.01,
    objective: str | None = None,
    magnitude: bool = False,
    order: Order = "reverse",
    corrupt_value: str = "counterfactual",
    width: int | Literal["auto"] = "auto",
) -> Scores:
    """Drop every edge whose removal lowers the metric by less than tau.

    Args:
        tau: the threshold, in units of the metric.
        objective: the metric that judges: None for the KL divergence, ``"task"`` for the task's own, or a name.
        magnitude: keep edges whose removal raises the metric by tau or more, too.
        order: which of a reader's senders are tested first: the last ones, the first ones, or at random.
        corrupt_value: what dropped edges carry.
        width: how many tests run together; the result does not depend on it.

    Raises:
        OptionError: for an option out of range.
    """
    check_corrupt_value(corrupt_value)
    if order not in get_args(Order):
        raise OptionError(f"got order = {order!r}, expected one of {', '.join(get_args(Order))}")
    rule = Rule(tau, magnitude, width)
    generator = torch.Generator().manual_seed(plan.seed)

    def ordered(senders: Int[Tensor, " src"]) -> Int[Tensor, " src"]:
        if order == "random":
            return senders[torch.randperm(len(senders), generator=generator)]
        return senders.flip(0) if order == "reverse" else senders

    judge = Judge(model, fidelity(task, objective), plan, corrupt_value)
    return Search(judge, rule, plan).run(ordered, groups=False)
