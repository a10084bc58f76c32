"""Attribution patching: the first-order guess of what `activation-patching` measures, for all nodes from one gradient.

    score(n) = sum over pos, width of  (a_n(clean) - a_n(corrupt)) * dM/da_n (clean)

a_n is a head's or an MLP's output, a query, key or value, a pattern or the stream: the same sites, and tables of the
same layout, as ``activation-patching``, which is exact and costs a replay per node. The edge version is ``eap``.
Wrong where a_n enters something saturated: the softmax that queries and keys go through has no gradient where attention
is all on one position (``atp-star`` runs it). Wrong too where effects that cancel to first order do not cancel in full.
KL is flat at the clean run and is refused.
Cost: three forward passes and one backward pass, whatever the number of nodes.
Reference: Nanda 2022, "Attribution patching", and Kramár et al. 2024, arXiv:2403.00745. Deviation: signed, with the
sign of ``activation-patching`` by noising.
"""

from __future__ import annotations

from circuitkit.methods.base import method
from circuitkit.methods.node_gradients import node_scores
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Task


@method("atp", level="node")
def atp(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    site: str = "head",
    per_position: bool = False,
    corrupt_value: str = "counterfactual",
) -> NodeScores:
    """Score every node of one kind by attribution patching, at every position or at all positions together.

    Raises:
        OptionError: for an unknown site or corrupt value, or a site that the model lacks.
        MetricError: if the metric has no gradient at the clean run.
    """
    return node_scores(model, task, plan, site=site, per_position=per_position, corrupt_value=corrupt_value)
