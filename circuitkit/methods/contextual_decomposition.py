"""Contextual decomposition: split every activation into what an edge brought and the rest, and see what it brings.

    score(u -> v) = M(logits) - M(logits - beta)      beta: the part of the logits that the edge u -> v brought

In the stream that v reads, a_u(clean) - a_u(corrupt) is relevant (beta), all else is not (gamma). The two parts are
carried to the logits, always adding up to the clean activation:

    linear     beta W                   the bias is gamma's
    norm       gain * beta / sigma      sigma of the whole activation
    other      f(beta + gamma) - f(gamma), with f an activation, a gate, the attention of a block

No gradient is needed, so any metric will do. Where a model has no norms this is ``exact``; where it has, the scales of
its norms stay as they were, so an edge is not credited with what it does to them: wrong where that is how it acts.
``rules="authors"`` follows the paper's code: biases are shared as |beta W| : |gamma W|, coordinates where the parts
have opposite signs go to the larger part, and attention patterns are those of the whole activation, so that edges into
queries and keys score 0. Those are not scores of a patched edge, not even on linear models.
Cost: one propagation per edge from the reader's block on, about the cost of ``exact``; edges are rows of a batch.
Reference: Hsu et al. 2024, arXiv:2407.00886 (CD-T). Theirs scores nodes: relevance along all paths from a source head
to a target head or the logits (see ``contextual-decomposition-nodes``); direct edges, the rules for rotary positions,
grouped queries, gates and post-norms, and ``corrupt_value`` other than a mean are ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.functional.stats import Moments
from circuitkit.methods.base import (
    backward_bytes,
    clean_and_corrupt,
    corrupt_writes,
    finished,
    matrix_bytes,
    method,
    with_reference,
)
from circuitkit.methods.plan import Plan
from circuitkit.models.decomposition import Decomposition, inner_wiring, record_whole
from circuitkit.models.edits import edge_chunks
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task

Rules = Literal["difference", "authors"]


@method("contextual-decomposition")
def contextual_decomposition(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    rules: Rules = "difference",
    corrupt_value: str = "counterfactual",
) -> Scores:
    """Score every edge by the part of the logits that it brought.

    Raises:
        OptionError: for unknown rules or corrupt values.
        UnsupportedModel: if the inside of an MLP is not as the wiring says.
    """
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    wiring, moments = inner_wiring(model), Moments()
    with plan.bar(len(task) * model.graph.n_edges, "edges") as bar:

        def one_chunk(batch: Batch, plan: Plan) -> Float[Tensor, "batch src dst"]:
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch, whole = with_reference(model, task, batch, run), record_whole(model, wiring, run)
            delta = model.wiring.expand_difference(run.writes, corrupt)
            clean = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
            scores = delta.new_zeros(len(batch), *model.graph.mask.shape)
            rows = plan.rows(backward_bytes(model, batch), model.device)
            for site in model.wiring.read_sites:
                for edges in edge_chunks(model, site, max(1, rows // len(batch))):
                    src, dst = torch.tensor(edges, device=delta.device).T
                    parts = Decomposition(whole, shared=rules == "authors")
                    nodes = (dst - site.first).tolist()
                    logits, changed = parts.into_reader(site, delta[src], nodes, batch.positions)
                    many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(edges)))
                    rest = task.metric(logits.flatten(0, 1), many).unflatten(0, (len(edges), len(batch)))
                    scores[:, src, dst] = torch.where(changed, clean - rest, 0.0).T.to(scores.dtype)
                    bar.update(len(edges) * len(batch))
            return scores

        silent = replace(plan, progress=False)
        for scores in silent.over(task, model.device, "", lambda b: 2 * matrix_bytes(model, b), one_chunk):
            moments.add(scores)
    return finished(model, moments)
