"""Head importance for pruning: how fast the metric moves when a gate on a node starts to close.

    score(n) = mean over examples of |dM/dm_n| at m_n = 1,     m_n a_n(clean) + (1 - m_n) a_n(corrupt) in place of a_n
             = mean over examples of |sum over pos, width of (a_n(clean) - a_n(corrupt)) * dM/da_n|

and then, within each layer, divided by the root of the sum of squares. Magnitudes only: a node that works against the
behaviour scores as high as one that supports it. Normalising makes layers comparable by decree: in a layer where
nothing matters, something still scores; and a site with one node per layer (``mlp``) scores 1 everywhere, so switch it
off there. Wrong where ``atp`` is wrong. KL is flat at the clean run and is refused.
Cost: three forward passes and one backward pass; gates are not built, their gradient is the product above.
Reference: Michel, Levy and Neubig 2019, arXiv:1905.10650, gates on head outputs with ``corrupt_value='zero'``; as the
baseline of Conmy et al. 2023, arXiv:2304.14997, gates on queries, keys, values and MLPs.
"""

from __future__ import annotations

from dataclasses import replace

from circuitkit.errors import OptionError
from circuitkit.methods.base import method
from circuitkit.methods.node_gradients import node_scores
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Task

GATED = ("head", "q", "k", "v", "mlp")


@method("hisp", level="node")
def hisp(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    site: str = "head",
    normalise: bool = True,
    corrupt_value: str = "counterfactual",
) -> NodeScores:
    """Score every node of one kind by the gradient of its gate.

    Raises:
        OptionError: for an unknown site or corrupt value, or a site that the model lacks.
        MetricError: if the metric has no gradient at the clean run.
    """
    if site not in GATED:
        raise OptionError(
            f"got site = {site!r}, expected one of {', '.join(GATED)}: nodes that can be gated one by one"
        )
    scores = node_scores(
        model, task, plan, site=site, per_position=False, corrupt_value=corrupt_value, signed=False, of_each=True
    )
    if not normalise:
        return scores
    size = scores.values.double().norm(dim=1, keepdim=True)
    size = size.where(size > 0, 1.0)  # a layer without any effect stays at 0
    return replace(scores, values=(scores.values / size).float(), stderr=(scores.stderr / size).float())
