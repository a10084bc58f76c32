"""Contextual decomposition from nodes: split every activation into what a node brought, along all paths, and the rest.

    score(u) = M(logits) - M(logits - beta)      beta: the part of the logits that u brought

What u writes is relevant, as far as it differs from its corrupt value, for every reader of u, and is carried to the
logits by the rules of ``contextual-decomposition``. This is the paper's own form: the relevance of a source to the
logits.
Wrong where that method is; and a node that acts through another one is credited, with nothing said about the way.
With ``rules="difference"`` and a model without norms this is noising activation patching of u.
Cost: one propagation per node, from its block on; the nodes of a layer are rows of a batch. No gradient is needed.
Reference: Hsu et al. 2024, arXiv:2407.00886 (CD-T), whose sources are heads at one position: here all positions count
together, and the input, MLPs and neurons are nodes too. The paper's ranking of sources for a target head is not here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from circuitkit.functional.stats import Moments
from circuitkit.methods.base import (
    backward_bytes,
    clean_and_corrupt,
    corrupt_writes,
    matrix_bytes,
    method,
    with_reference,
)
from circuitkit.methods.contextual_decomposition import Rules
from circuitkit.methods.plan import Plan
from circuitkit.models.decomposition import Decomposition, inner_wiring, record_whole
from circuitkit.models.hooked import Model
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task


@method("contextual-decomposition-nodes", level="node")
def contextual_decomposition_nodes(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    rules: Rules = "difference",
    corrupt_value: str = "counterfactual",
) -> NodeScores:
    """Score every writer by the part of the logits that it brought.

    Raises:
        OptionError: for unknown rules or corrupt values.
        UnsupportedModel: if the inside of an MLP is not as the wiring says.
    """
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    wiring, moments, ends = inner_wiring(model), Moments(), Moments()
    with plan.bar(len(task) * len(model.graph.sources), "nodes") as bar:

        def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch, whole = with_reference(model, task, batch, run), record_whole(model, wiring, run)
            delta = model.wiring.expand_difference(run.writes, corrupt)
            streams = [run.inputs[-1], model.record(batch.corrupt).inputs[-1]]
            both = torch.stack([task.metric(model.logits(x, batch.positions), batch) for x in streams], 1)
            rows = max(1, plan.rows(backward_bytes(model, batch), model.device) // len(batch))
            scores = []
            for site in model.wiring.write_sites:
                for part in delta[site.rows].split(rows):
                    parts = Decomposition(whole, shared=rules == "authors")
                    logits = parts.from_writer(site.first, part, batch.positions)
                    many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(part)))
                    rest = task.metric(logits.flatten(0, 1), many).unflatten(0, (len(part), len(batch)))
                    changed = (part != 0).flatten(2).any(-1)
                    scores.append(torch.where(changed, both[:, 0] - rest, 0.0).T)
                    bar.update(len(part) * len(batch))
            return torch.cat(scores, 1), both

        silent = replace(plan, progress=False)
        for scores, both in silent.over(task, model.device, "", lambda b: 2 * matrix_bytes(model, b), one_chunk):
            moments.add(scores[..., None])
            ends.add(both)
    mean, stderr = (x.float().cpu() for x in (moments.mean, moments.stderr))
    clean, corrupted = ends.mean.tolist()
    return NodeScores(mean, stderr, model.graph.sources, ("all",), clean, corrupted, n_examples=moments.n)
