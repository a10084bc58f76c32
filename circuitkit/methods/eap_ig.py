"""Edge attribution patching with integrated gradients over the input.

    score(u -> v) = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * sum_k w_k dM/dx_v (e_k)
    e_k           = e(corrupt) + alpha_k (e(clean) - e(corrupt)),   alpha_k and w_k by a quadrature rule on [0, 1]

Averaging along the path sees past saturation that the clean gradient misses. Still wrong where the straight path leaves
the inputs that the model was trained on, and more steps are not always better. KL works here, unlike with ``eap``.
Cost: two forward passes, and one forward and backward pass per step; steps are stacked on the batch axis.
Reference: Hanna, Pezzelle and Belinkov 2024, arXiv:2403.17806. Its code uses the ``left`` rule (corrupt end included,
clean end not); ``midpoint`` needs fewer steps for the same error on smooth paths and is the default.
"""

from __future__ import annotations

from circuitkit.errors import OptionError
from circuitkit.functional.attribution import QUADRATURES, quadrature
from circuitkit.methods.base import EVERY_FAMILY, method
from circuitkit.methods.gradients import path_scores
from circuitkit.methods.path_completeness import caution_if_incomplete
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("eap-ig", families=EVERY_FAMILY)
def eap_ig(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    steps: int = 5,
    rule: str = "midpoint",
    corrupt_value: str = "counterfactual",
) -> Scores:
    """Score every edge by edge attribution patching with integrated gradients.

    Raises:
        OptionError: if steps is less than 1 or the rule is unknown.
    """
    if type(steps) is not int or steps < 1:
        raise OptionError(f"got steps = {steps!r}, expected a whole number of at least 1 (5 is usual)")
    if rule not in QUADRATURES:
        raise OptionError(f"got rule = {rule!r}, expected one of {', '.join(QUADRATURES)}")
    alphas, weights = quadrature(rule, steps)
    scores = path_scores(model, task, plan, alphas=alphas, weights=weights, corrupt_value=corrupt_value)
    caution_if_incomplete(model, task, plan, scores, steps=steps, corrupt_value=corrupt_value)
    return scores
