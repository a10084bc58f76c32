"""Edge attribution patching: what every edge is worth to first order, from one gradient at the clean input.

    score(u -> v) = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * dM/dx_v (clean)

Exact where the model is linear between the edge's reader and the logits. Wrong where something saturates: attention
patterns near 0 or 1, a metric that is flat at the clean run (KL: its gradient there is zero, so it is refused).
Cost: two forward passes and one backward pass, none with respect to parameters.
This is plain attribution patching (AtP) of edges; ``local-exact`` runs the reader's own nonlinearity.
Reference: Syed, Rager and Conmy 2023, arXiv:2310.10348. Deviation: signed, not absolute; no split-QKV forward.
"""

from __future__ import annotations

from circuitkit.methods.base import EVERY_FAMILY, method
from circuitkit.methods.gradients import path_scores
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("eap", families=EVERY_FAMILY)
def eap(model: Model, task: Task, *, plan: Plan, corrupt_value: str = "counterfactual") -> Scores:
    """Score every edge by edge attribution patching."""
    return path_scores(model, task, plan, alphas=[1.0], weights=[1.0], corrupt_value=corrupt_value)
