"""Relevance patching: edge attribution patching with relevance propagation in place of the gradient.

    score(u -> v) = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * R_v (clean)

R_v is what the backward pass gives at reader v's copy of the stream when norms keep their scale, activations act(x)
count as x * (act(x) / x) with the bracket held fixed, and products of a gate share their gradient half and half. So the
local slope, which is noise where a unit saturates, is replaced by the line through the origin. The forward pass is
untouched. With all rules off this is ``eap``.
Wrong where what matters changes the pattern of attention sharply, and where a unit's line through the origin is far
from its change between the two inputs; effects that cancel downstream still look small.
Cost: that of ``eap`` (two forward passes and a backward pass), plus each reader's projection once more.
Reference: Rezaei Jafari, Eberle, Khakzar and Nanda 2025, arXiv:2508.21258. Deviations: scores edges, not nodes; the
norm rule also holds at norms behind attention and MLPs and at those of queries and keys; nothing passes an activation
at x = 0 exactly.
"""

from __future__ import annotations

from functools import partial

from circuitkit.methods.base import method
from circuitkit.methods.gradients import path_scores
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.models.relevance import Rules, relevance_gradients
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("relp")
def relp(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    norm_rule: bool = True,
    activation_rule: bool = True,
    half_rule: bool = True,
    freeze_pattern: bool = False,
    corrupt_value: str = "counterfactual",
) -> Scores:
    """Score every edge by relevance patching.

    Raises:
        OptionError: if a rule has nothing known to work on in this model; the message names the rule.
        MetricError: if the metric has no gradient, or none at the clean run.
    """
    rules = Rules(norm=norm_rule, activation=activation_rule, half=half_rule, pattern=freeze_pattern)
    rules.check(model)
    backward = partial(relevance_gradients, rules=rules)
    return path_scores(model, task, plan, alphas=[1.0], weights=[1.0], corrupt_value=corrupt_value, gradients=backward)
