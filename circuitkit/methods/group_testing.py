"""Group testing: drop whole groups of edges that the behaviour does not miss, and halve those that it does.

    r(g) = M(H) - M(H without g)        H: the circuit so far, at first the whole model; M: mean over the task
    r(g) < tau  drops g for good;  else both halves of g are tested in turn; a single edge that fails is kept

From the logits down, a first group is all edges into the readers that compute at the same time: the attention of one
layer, or one MLP. M is minus the KL divergence from the whole model unless `objective` names another metric.
What holds: every kept edge lowered M by tau or more when it was tested alone on the circuit as it then was; and M falls
by less than tau for each drop, so in all by less than tau times `provenance["drops"]`, of which there are few.
Cost: if k of E edges matter and edges do not interact, about k log2(E / k) circuits, at most twice that: the second
half of a group needs no run if the first half was dropped. If every edge matters, nearly 2 E, where ACDC needs E.
When it is wrong: edges whose effects cancel within a group are dropped together, although each of them matters. As with
ACDC, of two edges that can replace each other only one is kept.
Reference: adaptive group testing by halving (Dorfman 1943; Hwang 1972) on the criterion of Conmy et al. 2023,
arXiv:2304.14997. Scores are r of edges tested alone, 0 for edges dropped in a group.
"""

from __future__ import annotations

from typing import Literal

from circuitkit.functional.ablation import check_corrupt_value
from circuitkit.methods.base import EVERY_FAMILY, fidelity, method
from circuitkit.methods.plan import Plan
from circuitkit.methods.search import Judge, Rule, Search
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("group-testing", families=EVERY_FAMILY)
def group_testing(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    tau: float = 0.01,
    objective: str | None = None,
    magnitude: bool = False,
    corrupt_value: str = "counterfactual",
    width: int | Literal["auto"] = "auto",
) -> Scores:
    """Drop groups of edges whose removal lowers the metric by less than tau; halve the others.

    Args:
        tau: the threshold, in units of the metric.
        objective: the metric that judges: None for the KL divergence, ``"task"`` for the task's own, or a name.
        magnitude: count a rise of the metric by tau or more as a reason to keep, too.
        corrupt_value: what dropped edges carry.
        width: how many circuits run together at most; the result does not depend on it.

    Raises:
        OptionError: for an option out of range.
    """
    check_corrupt_value(corrupt_value)
    rule = Rule(tau, magnitude, width)
    judge = Judge(model, fidelity(task, objective), plan, corrupt_value)
    return Search(judge, rule, plan).run(lambda senders: senders.flip(0), groups=True)
