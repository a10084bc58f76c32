"""Position-aware edge attribution patching: every edge scored in every span of the prompt, and how heads move things.

A span is a run of positions that belong together in all examples (subject, verb; or each position by itself), as the
task's schema says. The graph has every writer and reader once per span (see `circuitkit.positions`):

    within span s       score(u@s -> v@s)     = sum over pos in s of  <a_u(clean) - a_u(corrupt), dM/dx_v>
    key span j to i     score(h<k>@j -> h@i)  = sum over pos in i of  <z_h(clean) - z_h(k corrupt in j), dM/dz_h>

and so for values; a span's queries act on that span's own outputs, h<q>@i -> h@i. z_h is what head h makes of its
values, computed anew with its softmax: inside the head the score is exact, behind it linear. Summed over spans, scores
of the first kind are those of `eap`. ``aggregate`` "mean" divides by the length of the span that reads, "abs" adds the
magnitudes of positions (nothing cancels; no sign).

**Cost.** Two forward passes, one forward and backward pass, one batched product per block (as many multiplications as
`eap`, kept apart by position), and 2 x spans + 5 times the attention of each block. The edge matrix grows with the
square of the number of spans: 50 million entries for GPT-2 small with twelve.
**When it is wrong.** Behind a head, where `eap` is: a first-order estimate; flat metrics are refused. A schema that
puts different things into one span averages over them and cancels opposite signs there.
**Reference.** Haklay, Orgad, Bau, Mueller and Belinkov 2025, arXiv:2502.04577. Its code scores M(corrupt) - M(clean),
patches the keys of a span one by one (here together, as a removed edge does), splits edges of queries by key, and
leaves a BOS outside all spans without scores.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.functional.spans import by_span, check_aggregate, position_scores
from circuitkit.functional.stats import Moments
from circuitkit.methods.base import (
    CorruptWrites,
    backward_bytes,
    clean_and_corrupt,
    corrupt_writes,
    matrix_bytes,
    method,
    with_reference,
)
from circuitkit.methods.gradients import SMALL, refuse_flat, refuse_without_gradient
from circuitkit.methods.plan import Plan
from circuitkit.models.attention import attention_scores, attentions
from circuitkit.models.edits import reader_gradients
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import Hook
from circuitkit.models.wiring import Port
from circuitkit.positions import SLOTS, Layout, positional_graph
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task
from circuitkit.tasks.spans import answer_spans, spans_of, with_spans


@method("peap", positions=True)
def peap(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    spans: str = "auto",
    aggregate: str = "sum",
    corrupt_value: str = "counterfactual",
) -> Scores:
    """Score every edge in every span, and every way of a head from span to span.

    Raises:
        OptionError: for an unknown aggregate or way to count positions.
        MetricError: if the metric has no gradient, or a zero one although corrupting the input changes it.
        TaskError: if prompts differ in length and there is no schema of spans.
    """
    check_aggregate(aggregate)
    refuse_without_gradient(task, at_clean=True)
    task = with_spans(task, spans)
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    graph = positional_graph(model.graph, task.spans, answer_spans(task), causal=model.causal)
    layout = Layout.of(graph)
    moments, changes = Moments(), list[tuple[float, float]]()

    def size(batch: Batch) -> float:
        copies = (2 * len(task.spans) + batch.clean.shape[1] / len(model.wiring.blocks)) * model.graph.mask.numel()
        return 2 * matrix_bytes(model, batch) + backward_bytes(model, batch) + 4.0 * copies

    for chunk, change in plan.over(
        task, model.device, "scores by span", size, partial(_chunk, model, task, corrupt_of, layout, aggregate)
    ):
        moments.add(chunk)
        changes.append(change)
    refuse_flat(task, changes)
    values, stderr = (layout.matrix(t.float()) for t in (moments.mean, moments.stderr))
    return Scores(values, graph, "", stderr=stderr, signed=aggregate != "abs", n_examples=moments.n)


def _chunk(
    model: Model, task: Task, corrupt_of: CorruptWrites, layout: Layout, aggregate: str, batch: Batch, plan: Plan
) -> tuple[Float[Tensor, "batch edge"], tuple[float, float]]:
    """Scores of each example; and their largest, with the change of the metric it is compared with if it is small."""
    spans = spans_of(batch)
    run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
    batch = with_reference(model, task, batch, run)
    delta = model.wiring.expand_difference(run.writes, corrupt)
    slopes: dict[Port, Tensor] = {}
    inside = list(attentions(model))
    rules: list[Hook] = [(a.heads.port, partial(_watch, slopes, a.heads.port)) for a in inside]
    _, groups = reader_gradients(
        model, run, run.inputs[0][None], batch.positions, lambda x: task.metric(x, batch).sum(), rules
    )
    together = partial(by_span, spans=spans, n=len(layout.spans), aggregate=aggregate)
    same = delta.new_zeros(len(batch), len(layout.spans), *model.graph.mask.shape)
    for columns, gradient in groups:
        n = int(model.graph.mask[:, columns].any(1).nonzero().max()) + 1
        same[:, :, :n, columns] = together(position_scores(delta[:n], gradient))
    across = delta.new_zeros(len(batch), len(SLOTS), len(delta), len(layout.spans), len(layout.spans))
    at_once = plan.rows(backward_bytes(model, batch) / len(model.wiring.blocks), model.device) // len(batch)
    for a in inside:
        across[:, :, a.heads.rows] = attention_scores(
            model, run, a, delta, slopes[a.heads.port], spans, together, max(1, at_once)
        )
    scores = layout.join(same, across)
    largest = float(scores.abs().max())
    last = at_least_float32(run.inputs[-1])
    ends = (model.logits(x.to(run.inputs[-1].dtype), batch.positions) for x in (last, last - delta.sum(0)))
    here, there = (task.metric(x, batch) for x in ends) if largest <= SMALL else (scores, scores)
    return scores, (largest, float((here - there).abs().max()))


def _watch(slopes: dict[Port, Tensor], port: Port, z: Tensor) -> None:
    """Keep the gradient that arrives at a head's output while other gradients are taken."""
    z.register_hook(partial(slopes.__setitem__, port))
