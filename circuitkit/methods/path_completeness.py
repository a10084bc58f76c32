"""Whether integrated gradients of a recurrent network add up to what they explain.

    sum over edges u -> v out of the input of  score(u -> v)  ->  M(clean) - M(corrupt)      as steps -> infinity

All that differs comes in through the input, so these edges are a cut, and the integral along the path of inputs is
complete there. A network that settles into attractors has nearly all of its gradient where the path crosses from one
attractor's basin to another's; a few steps miss the place, and the sum tells.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.cautions import caution
from circuitkit.methods.base import CorruptWrites, backward_bytes, clean_and_corrupt, corrupt_writes, with_reference
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task

FAR = 0.5  # of the effects' mean size


def caution_if_incomplete(
    model: Model, task: Task, plan: Plan, scores: Scores, *, steps: int, corrupt_value: str
) -> None:
    """Warn if the scores of a recurrent network's input edges are far from adding up to the effect of its input.

    Costs three forward passes. Says nothing of transformers, whose scores are compared in
    `circuitkit.methods.eap_ig` with the exact ones instead.
    """
    if model.family != "recurrent":
        return
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)

    def one_chunk(batch: Batch, _plan: Plan) -> Tensor:
        return input_effects(model, task, batch, corrupt_of)

    # The same cost as a chunk of the scores, so that what fitted there fits here.
    chunks = plan.over(task, model.device, "effect of the input", lambda b: backward_bytes(model, b), one_chunk)
    effects = torch.cat(list(chunks))
    from_input = torch.tensor([node.kind == "input" for node in model.graph.source_nodes])
    found, effect = float(scores.values[from_input].double().sum()), float(effects.mean())
    if abs(found - effect) > FAR * float(effects.abs().mean()):
        caution(
            f"the scores of the input's edges add up to {found:.3g}, and corrupting the input changes "
            f"{task.metric.name} by {effect:.3g}: {steps} steps do not see where the gradient is, as is usual where a "
            f"network jumps (a threshold, the border between two attractors). Use more steps (steps={8 * steps}), or "
            "'exact'; until these numbers agree, trust the faithfulness of the circuits, not the size of the scores"
        )


def input_effects(model: Model, task: Task, batch: Batch, corrupt_of: CorruptWrites) -> Float[Tensor, " batch"]:
    """Metric of each example's clean input minus that of what its input carries when it is corrupt."""
    with torch.no_grad(), model.quiet():
        run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
        batch = with_reference(model, task, batch, run)
        there = model.record_of(corrupt[0].flatten(2))  # type: ignore[attr-defined]
        ends = [task.metric(model.logits(end.inputs[-1], batch.positions), batch) for end in (run, there)]
    return (ends[0] - ends[1]).double().cpu()
