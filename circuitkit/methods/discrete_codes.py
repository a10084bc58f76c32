"""Discrete codes: pairs of codes of a small sparse autoencoder that clean inputs show together and corrupt ones never.

    x(e, u)       = what writer u adds to the stream on input e, mean over positions
    code(e, u)    = strongest latent of one autoencoder for all writers, trained on a few inputs
    pairs(E)      = {(code(e, u), code(e, w)) : e in E}                       w: the head or MLP that v is part of
    score(u -> v) = |pairs(clean inputs) - pairs(corrupt inputs)|

A reader is part of the head or MLP that it feeds (a key or value that several heads share: of the one with the largest
score). The input and the logits have one code always, so their edges score what the other end does alone, as in
``discrete-codes-nodes``. Mean and standard error are over autoencoders, not over examples.
Wrong where corrupt inputs show the behaviour too, with another answer: then what differs is chance. Where the
difference is at a position and not in the mean over positions, or graded and not a matter of kind. It counts, so a
writer that varies, whatever for, scores high, and higher still in pairs; it sees neither the metric nor any weight, and
a head's queries, keys and values score the same. Many scores are equal: judge them with ties counting half.
Cost: two forward passes and the training, which does not grow with the number of inputs.
Reference: O'Neill and Bui 2024, arXiv:2405.12522. Deviations: no softmax over scores, which changes no order; training
is `circuitkit.dictionaries.train`, in units of variance 1, decoder rows of norm 1 and a rate that falls to 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.codes import unique_pairs
from circuitkit.functional.stats import Moments
from circuitkit.graph import Graph
from circuitkit.methods.base import finished, method, run_bytes
from circuitkit.methods.plan import Plan
from circuitkit.methods.writer_codes import Coding, Means, code_tables, coded_writers, joined, mean_writes
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task


@method("discrete-codes")
def discrete_codes(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    latents: int = 300,
    steps: int = 500,
    sparsity: float = 0.01,
    examples: int = 10,
    seeds: int = 5,
    normalise: bool = False,
    mlps: bool = True,
) -> Scores:
    """Score every edge by the pairs of codes that only clean inputs show; ``normalise`` divides by the pairs seen.

    Raises:
        OptionError: for an option below its least value, nothing to code, or drawn inputs that do not differ.
    """
    coding, coded = Coding(latents, steps, sparsity, examples, seeds), coded_writers(model, mlps)

    def one_chunk(batch: Batch, _plan: Plan) -> tuple[Means, Means]:
        clean, corrupt = (mean_writes(model.record(side), batch) for side in (batch.clean, batch.corrupt))
        return clean, corrupt

    parts = list(plan.over(task, model.device, "writes", lambda b: 2 * run_bytes(model, b), one_chunk))
    positive, negative = joined([part[0] for part in parts]), joined([part[1] for part in parts])
    pairs, moments = component_pairs(model.graph, coded), Moments()
    for codes in code_tables(model, plan, positive, negative, coded, coding):
        tally = unique_pairs(*codes, pairs)
        moments.add(to_readers(model.graph, pairs, tally.share if normalise else tally.only.float())[None])
    return replace(finished(model, moments, signed=False), n_examples=len(task))


def component_pairs(graph: Graph, coded: Bool[Tensor, " src"]) -> Int[Tensor, "pair 2"]:
    """Writers and the components that read them, by row; the logits come after the last writer.

    Left out are writers without a code, other than the input, and components without one.
    """
    of_reader = torch.cat([graph.feeds, graph.sinks[:, None]], 1)
    reads = (graph.mask.float() @ of_reader.float()) > 0
    return (reads & (coded | graph.roots)[:, None] & torch.cat([coded, coded.new_ones(1)])).nonzero()


def to_readers(graph: Graph, pairs: Int[Tensor, "pair 2"], scores: Float[Tensor, " pair"]) -> Float[Tensor, "src dst"]:
    """Scores of pairs of components as scores of edges: of the components that a reader feeds, the largest."""
    table = scores.new_zeros(len(graph.sources), len(graph.sources) + 1)
    table[pairs[:, 0], pairs[:, 1]] = scores
    reader, component = torch.cat([graph.feeds, graph.sinks[:, None]], 1).nonzero(as_tuple=True)
    edges, from_reader = table.new_zeros(graph.mask.shape), reader.expand(len(table), -1)
    return edges.scatter_reduce(1, from_reader, table[:, component], "amax")
