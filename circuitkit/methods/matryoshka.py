"""One ranking for circuits of every size, learned in one run: each mask holds about k edges, k drawn anew.

    k_i     log-uniform between ``smallest`` and all edges, for every example i of a step
    s_i     sigmoid((b_i - c_i) / temperature), b_i = a + noise * logit(u_i), with c_i such that these add up to k_i
    m_i     (1 - h_i) s_i + h_i [b_i is among the k_i highest], with the gradient of s_i;  u_i, h_i uniform in (0, 1)
    minimise over a     mean over i of KL(whole model || run with mask m_i)

Masks of one ranking lie one in the other. No price: a size is met exactly. Scores are sigmoid(a).
Cost: one masked run of the examples of a step and its backward pass, per step.
When it is wrong: an average over sizes is learned, so a method made for one size can win there; sizes below the
smallest circuit that does anything teach nothing. Only the order of the scores means something.
Reference: Arora et al. 2026, arXiv:2609.25518 (Matryoshka attribution), whose sigmoid top-k and log-uniform sizes these
are. Deviations: masks between the soft and the hard top-k, and noise on the order, which made small circuits
better and depend less on the seed; KL as the loss; a warm start; one size for each example.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.sparsity import logistic, nested, uniform_noise
from circuitkit.methods.base import EVERY_FAMILY, method
from circuitkit.methods.checkpoint import Parameters
from circuitkit.methods.learning import Learning, Recipe, check_positive, edge_number, learn, learned_scores
from circuitkit.methods.plan import Plan
from circuitkit.methods.warm_start import WarmStart, warm_logits
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("matryoshka", families=EVERY_FAMILY)
def matryoshka(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    steps: int = 400,
    lr: float = 0.1,
    temperature: float = 1.0,
    noise: float = 0.5,
    smallest: int | float = 0.005,
    examples: int = 16,
    warm_start: WarmStart = "eap-ig",
    objective: str | None = None,
    corrupt_value: str = "counterfactual",
    checkpoint: str | None = None,
) -> Scores:
    """Learn a ranking of all edges that holds at every size.

    Args:
        steps: how many; more for large models.
        lr: learning rate of the logits.
        noise: how much the order is shaken when a mask is drawn; 0 for not at all.
        temperature: how soft the top-k is, in units of the logits, which begin between -1 and 1.
        smallest: the smallest size drawn: a number of edges, or a share of all if below 1.
        examples: how many examples a step draws, each with a size and a mask of its own.
        warm_start: an edge method, a file of scores or scores, in whose order the logits begin, from -1 to 1.
        objective: see `fidelity`: None for KL, "task" for the task's metric, or a metric's name.
        corrupt_value: what removed edges carry.
        checkpoint: a file to go on from after an interruption.

    Raises:
        OptionError: for an option out of range.
        MetricError: if learning diverges.
    """
    check_positive("temperature", temperature)
    if not 0 <= noise < math.inf:
        raise OptionError(f"got noise = {noise!r}, expected 0 or more")
    least = edge_number("smallest", smallest, model.graph.n_edges)
    own = {"temperature": temperature, "noise": noise, "smallest": least}
    learning = Learning("matryoshka", steps, lr, examples, objective, corrupt_value, warm_start, checkpoint, own)
    logits = warm_logits(model, task, plan, warm_start, spread=1.0, corrupt_value=corrupt_value)
    n = len(logits)

    def sample(now: Parameters, _done: float, masks: int, generator: torch.Generator) -> Tensor:
        # One size from each of as many equal parts of the log scale: every step sees small and large circuits.
        share = (torch.arange(masks) + torch.rand(masks, generator=generator)) / masks
        size = (least * (n / least) ** share).to(logits)
        hardness = torch.rand(masks, generator=generator).to(logits)
        shaken = now["logits"] + noise * logistic(uniform_noise((masks, n), generator).to(logits))
        return nested(shaken, size, hardness, temperature)

    recipe = Recipe(
        begin={"logits": logits},
        rates={"logits": lr},
        sample=sample,
        penalty=lambda now, _done: now["logits"].new_zeros(()),
        size=lambda _: float(n),
    )
    end = learn(model, task, plan, learning, recipe)
    return learned_scores(model, task, end, end.value["logits"].sigmoid())
