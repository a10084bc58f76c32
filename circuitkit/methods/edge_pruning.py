"""Edge pruning: a hard-concrete mask over edges, learned to stay close to the whole model with a given number of them.

    z_e       = clamp(-0.1 + 1.2 sigmoid((a_e + logit(u_e)) / (2/3)), 0, 1)           u_e uniform, drawn anew each time
    minimise over a, maximise over lambda
                KL(whole model || run with mask z) + unit * (lambda_1 g + lambda_2 g^2)
    g         = log(sum_e P(z_e > 0) / goal),        unit = KL(whole model || run with every edge removed)

The goal falls from all edges to the target over the first ``warmup`` of the steps, then stays. Scores are sigmoid(a);
chosen are the highest, cut where as many connected edges are left as the target allows.
Cost: one masked run of the examples of a step and its backward pass, per step.
When it is wrong: the ranking is made for one size; far from the target it says little. Another seed finds another
circuit of the same quality. A KL judges the whole output, not only the answer (``objective="task"`` does).
Reference: Bhaskar et al. 2024, arXiv:2406.16778. Theirs counts sparsity as a share and lets it grow linearly; a log
of the number of edges gives small circuits the same weight, and reaches them in hundreds of steps. No node masks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.sparsity import chance_open, hard_concrete, lagrangian, uniform_noise
from circuitkit.methods.base import EVERY_FAMILY, method
from circuitkit.methods.checkpoint import Parameters
from circuitkit.methods.learning import Learning, Recipe, check_positive, edge_number, learn, learned_scores
from circuitkit.methods.plan import Plan
from circuitkit.methods.warm_start import WarmStart, warm_logits
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("edge-pruning", families=EVERY_FAMILY)
def edge_pruning(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    target: int | float = 0.02,
    steps: int = 400,
    lr: float = 0.1,
    lr_multipliers: float = 0.02,
    warmup: float = 0.8,
    examples: int = 16,
    start: float = 1.0,
    warm_start: WarmStart = "eap-ig",
    objective: str | None = None,
    corrupt_value: str = "counterfactual",
    checkpoint: str | None = None,
) -> Scores:
    """Learn which edges to keep.

    Args:
        target: how many edges to keep, or which share of all if below 1.
        steps: how many; more for large models.
        lr: learning rate of the logits.
        lr_multipliers: learning rate of the two multipliers.
        warmup: share of the steps over which the goal falls to the target.
        examples: how many examples a step draws.
        start: what the logits begin with, on average.
        warm_start: an edge method, a file of scores or scores, whose ranking moves the start by up to 1; None for none.
        objective: see `fidelity`: None for KL, "task" for the task's metric, or a metric's name.
        corrupt_value: what removed edges carry.
        checkpoint: a file to go on from after an interruption.

    Raises:
        OptionError: for an option out of range.
        MetricError: if learning diverges.
    """
    goal = edge_number("target", target, model.graph.n_edges)
    check_positive("lr_multipliers", lr_multipliers)
    if not 0 <= warmup <= 1:
        raise OptionError(f"got warmup = {warmup!r}, expected a share of the steps between 0 and 1")
    own = {"target": goal, "lr_multipliers": lr_multipliers, "warmup": warmup, "start": start}
    learning = Learning("edge-pruning", steps, lr, examples, objective, corrupt_value, warm_start, checkpoint, own)
    logits = start + warm_logits(model, task, plan, warm_start, spread=1.0, corrupt_value=corrupt_value)
    n = len(logits)

    def sample(now: Parameters, _done: float, masks: int, generator: torch.Generator) -> Tensor:
        return hard_concrete(now["logits"], uniform_noise((masks, n), generator).to(logits))

    def penalty(now: Parameters, done: float) -> Tensor:
        falling = n * (goal / n) ** (min(done / warmup, 1.0) if warmup else 1.0)
        return lagrangian(chance_open(now["logits"]).sum(), falling, now["multipliers"])

    recipe = Recipe(
        begin={"logits": logits, "multipliers": logits.new_tensor([0.25, 0.0])},
        rates={"logits": lr, "multipliers": -lr_multipliers},
        sample=sample,
        penalty=penalty,
        size=lambda now: float(chance_open(now["logits"]).sum()),
    )
    end = learn(model, task, plan, learning, recipe)
    scores = learned_scores(model, task, end, end.value["logits"].sigmoid())
    # A path from input to logits may need more edges than the goal allows; then the shortest connected cut is taken.
    cuts = (scores.top(n_edges).mask & (scores.values > 0) for n_edges in range(goal, n + 1))
    return replace(scores, selected=next((cut for cut in cuts if cut.any()), torch.zeros_like(model.graph.mask)))
