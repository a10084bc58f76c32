"""The mean of the gradients at the clean and at the corrupt input: the trapezoid rule with two points.

    score(u -> v) = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * (dM/dx_v (clean) + dM/dx_v (corrupt)) / 2

Exact for a metric that is quadratic along the path. Sees saturation at one end only if the other is not saturated.
Cost: two forward passes for the writes, and a forward and backward pass over both inputs.
Reference: the ``clean-corrupted`` method of the EAP-IG library (Hanna et al. 2024, arXiv:2403.17806).
"""

from __future__ import annotations

from circuitkit.methods.base import EVERY_FAMILY, method
from circuitkit.methods.gradients import path_scores
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("clean-corrupted", families=EVERY_FAMILY)
def clean_corrupted(model: Model, task: Task, *, plan: Plan, corrupt_value: str = "counterfactual") -> Scores:
    """Score every edge by the mean gradient of the two ends."""
    return path_scores(model, task, plan, alphas=[0.0, 1.0], weights=[0.5, 0.5], corrupt_value=corrupt_value)
