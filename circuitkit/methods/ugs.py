"""Uniform gradient sampling: every edge is kept with a chance of its own, learned from masks that are 0 or 1 almost
everywhere.

    p_e = sigmoid(a_e)          m_e = 0 or 1, or with probability p_e (1 - p_e) uniform in (0, 1), so that E[m_e] = p_e
    minimise over a             E[ KL(whole model || run with mask m) ] + price * unit * sum_e p_e
    unit                        KL(whole model || run with every edge removed)

The gradient in a_e is dKL/dm_e wherever m_e is between 0 and 1, else 0: unbiased if the loss is linear in single edges
(see `uniform_window`). Scores are p; chosen are the edges with p above a half.
Cost: one masked run of the examples of a step and its backward pass, per step.
When it is wrong: an edge is learned from one mask in four at best and from fewer as it becomes certain, so it needs
more steps or examples than other learned masks. The price sets the size; another size needs another run.
Reference: Li and Janson 2024, arXiv:2409.09951. Left out: their constants in place of corrupt values (optimal
ablation), the regulariser on nodes, pruning dangling edges from every mask, and dividing by how often an edge was
inside, instead of by the chance of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from circuitkit.functional.sparsity import uniform_noise, uniform_window
from circuitkit.methods.base import EVERY_FAMILY, method
from circuitkit.methods.checkpoint import Parameters
from circuitkit.methods.learning import Learning, Recipe, check_positive, chosen_edges, learn, learned_scores
from circuitkit.methods.plan import Plan
from circuitkit.methods.warm_start import WarmStart, warm_logits
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("ugs", families=EVERY_FAMILY)
def ugs(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    price: float = 0.0035,
    steps: int = 400,
    lr: float = 0.1,
    examples: int = 16,
    start: float = 1.0,
    warm_start: WarmStart = "eap-ig",
    objective: str | None = None,
    corrupt_value: str = "counterfactual",
    checkpoint: str | None = None,
) -> Scores:
    """Learn the chance with which each edge is kept.

    Args:
        price: what one edge costs, as a share of what is lost when every edge is removed.
        steps: how many; more for large models.
        lr: learning rate of the logits.
        examples: how many examples a step draws, each with a mask of its own.
        start: what the logits begin with, on average.
        warm_start: an edge method, a file of scores or scores, whose ranking moves the start by up to 1; None for none.
        objective: see `fidelity`: None for KL, "task" for the task's metric, or a metric's name.
        corrupt_value: what removed edges carry.
        checkpoint: a file to go on from after an interruption.

    Raises:
        OptionError: for an option out of range.
        MetricError: if learning diverges.
    """
    check_positive("price", price)
    own = {"price": price, "start": start}
    learning = Learning("ugs", steps, lr, examples, objective, corrupt_value, warm_start, checkpoint, own)
    logits = start + warm_logits(model, task, plan, warm_start, spread=1.0, corrupt_value=corrupt_value)

    def sample(now: Parameters, _done: float, masks: int, generator: torch.Generator) -> Tensor:
        return uniform_window(now["logits"], uniform_noise((masks, len(logits)), generator).to(logits))

    recipe = Recipe(
        begin={"logits": logits},
        rates={"logits": lr},
        sample=sample,
        penalty=lambda now, _done: price * now["logits"].sigmoid().sum(),
        size=lambda now: float(now["logits"].sigmoid().sum()),
    )
    end = learn(model, task, plan, learning, recipe)
    chance = end.value["logits"].sigmoid()
    scores = learned_scores(model, task, end, chance)
    return replace(scores, selected=chosen_edges(model, end, chance > 0.5))
