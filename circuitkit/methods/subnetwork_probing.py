"""Subnetwork probing: a hard-concrete mask over nodes, with a price on every node that stays.

    keep[u, v] = z_u z_v        z_u of each writer but the input, z_v of each reader but the logits: hard concrete
    minimise     KL(whole model || run with keep) + price * unit * sum over nodes of P(z > 0)
    unit         KL(whole model || run with every edge removed)

Scores are p_u p_v with p = sigmoid(a), the logits' chance; chosen are the edges between nodes with p above a half.
Cost: one masked run of the examples of a step and its backward pass, per step.
When it is wrong: edges are implied, so a circuit holds all edges between its nodes; few edges cannot be chosen well,
and edges of two important nodes score high though nothing passes between them.
Reference: Cao, Sanh and Rush 2021, arXiv:2104.03514 (with a probe, on weights); with activations of a corrupt input in
place of zeros, and on query, key, value and MLP: Conmy et al. 2023, arXiv:2304.14997. Here a writer and the readers
that feed it have masks of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from circuitkit.functional.sparsity import chance_open, hard_concrete, uniform_noise
from circuitkit.methods.base import method
from circuitkit.methods.checkpoint import Parameters
from circuitkit.methods.learning import Learning, Recipe, check_positive, chosen_edges, learn, learned_scores
from circuitkit.methods.plan import Plan
from circuitkit.methods.warm_start import WarmStart, warm_logits
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


@method("subnetwork-probing")
def subnetwork_probing(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    price: float = 0.01,
    steps: int = 300,
    lr: float = 0.1,
    examples: int = 16,
    start: float = 3.0,
    warm_start: WarmStart = None,
    objective: str | None = None,
    corrupt_value: str = "counterfactual",
    checkpoint: str | None = None,
) -> Scores:
    """Learn which nodes to keep.

    Args:
        price: what one node costs, as a share of what is lost when every edge is removed.
        steps: how many; more for large models.
        lr: learning rate of the logits.
        examples: how many examples a step draws.
        start: what the logits begin with.
        warm_start: an edge method, a file of scores or scores; the strongest edge of a node moves its start.
        objective: see `fidelity`: None for KL, "task" for the task's metric, or a metric's name.
        corrupt_value: what removed edges carry.
        checkpoint: a file to go on from after an interruption.

    Raises:
        OptionError: for an option out of range.
        MetricError: if learning diverges.
    """
    check_positive("price", price)
    own = {"price": price, "start": start}
    learning = Learning(
        "subnetwork-probing", steps, lr, examples, objective, corrupt_value, warm_start, checkpoint, own
    )
    edges = warm_logits(model, task, plan, warm_start, spread=1.0, corrupt_value=corrupt_value)
    graph = model.graph
    src, dst = (index.to(edges.device) for index in graph.mask.nonzero(as_tuple=True))
    # The masks of the input and the logits stay open: there is no circuit without them.
    free = {"writers": ~graph.roots.to(edges.device), "readers": ~graph.sinks.to(edges.device)}
    begin = {
        name: start + edges.new_full((len(free[name]),), -1.0).scatter_reduce(0, index, edges, "amax")
        for name, index in (("writers", src), ("readers", dst))
    }

    def gates(now: Parameters, opened: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        writers, readers = (torch.where(free[name], opened(now[name]), 1.0) for name in ("writers", "readers"))
        return writers[..., src], readers[..., dst]

    def sample(now: Parameters, _done: float, masks: int, generator: torch.Generator) -> Tensor:
        def draw(logits: Tensor) -> Tensor:
            return hard_concrete(logits, uniform_noise((masks, len(logits)), generator).to(logits))

        return torch.mul(*gates(now, draw))

    def penalty(now: Parameters, _done: float) -> Tensor:
        opened = torch.cat([chance_open(now[name])[free[name]] for name in free])
        return price * opened.sum()

    recipe = Recipe(
        begin=begin,
        rates={"writers": lr, "readers": lr},
        sample=sample,
        penalty=penalty,
        size=lambda now: float(torch.mul(*gates(now, chance_open)).sum()),
    )
    end = learn(model, task, plan, learning, recipe)
    writers, readers = gates(end.value, torch.sigmoid)
    scores = learned_scores(model, task, end, writers * readers)
    return replace(scores, selected=chosen_edges(model, end, (writers > 0.5) & (readers > 0.5)))
