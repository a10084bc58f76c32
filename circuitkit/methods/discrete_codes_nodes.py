"""Discrete codes of components: how many codes of a small sparse autoencoder only clean inputs show.

    x(e, u)    = what component u adds to the stream on input e, mean over positions
    code(e, u) = strongest latent of one autoencoder for all components, trained on a few inputs
    score(u)   = |{code(e, u) : e clean} - {code(e, u) : e corrupt}|

Mean and standard error are over autoencoders, not over examples.
Wrong where ``discrete-codes`` is; and a component that takes no part but is different on every input scores highest.
Cost: two forward passes and the training, which does not grow with the number of inputs.
Reference: O'Neill and Bui 2024, arXiv:2405.12522. Deviations as in ``discrete-codes``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.functional.codes import unique_codes
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import method, run_bytes, with_reference
from circuitkit.methods.plan import Plan
from circuitkit.methods.writer_codes import Coding, Means, code_tables, coded_writers, joined, mean_writes
from circuitkit.models.hooked import Model
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task


@method("discrete-codes-nodes", level="node")
def discrete_codes_nodes(
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
) -> NodeScores:
    """Score every head and MLP by the codes that only clean inputs show; ``normalise`` divides by the codes seen.

    Raises:
        OptionError: for an option below its least value, nothing to code, or drawn inputs that do not differ.
    """
    coding, coded = Coding(latents, steps, sparsity, examples, seeds), coded_writers(model, mlps)

    def one_chunk(batch: Batch, _plan: Plan) -> tuple[Means, Means, Tensor]:
        runs = [model.record(side) for side in (batch.clean, batch.corrupt)]
        batch = with_reference(model, task, batch, runs[0])
        ends = [task.metric(model.logits(run.inputs[-1], batch.positions), batch) for run in runs]
        return mean_writes(runs[0], batch), mean_writes(runs[1], batch), torch.stack(ends, 1)

    parts = list(plan.over(task, model.device, "writes", lambda b: 2 * run_bytes(model, b), one_chunk))
    positive, negative = joined([part[0] for part in parts]), joined([part[1] for part in parts])
    moments = Moments()
    for codes in code_tables(model, plan, positive, negative, coded, coding):
        tally = unique_codes(*(side[:, :-1][:, coded] for side in codes))
        moments.add((tally.share if normalise else tally.only.float())[None, :, None])
    clean, corrupt = torch.cat([part[2] for part in parts]).double().mean(0).tolist()
    rows = tuple(name for name, one in zip(model.graph.sources, coded.tolist(), strict=True) if one)
    values, stderr = moments.mean.float(), moments.stderr.float()
    return NodeScores(values, stderr, rows, ("all",), clean, corrupt, n_examples=len(task), signed=False)
