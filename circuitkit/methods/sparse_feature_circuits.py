"""Sparse feature circuits: nodes first, by their effects; then the edges between nodes that were kept.

    effect(u)     = sum over pos of < a_u(clean) - a_u(corrupt), mean gradient along the path of u's site >
    score(u -> v) = sum over pos of < a_u(clean) - a_u(corrupt), mean of dM/dx_v along the path of inputs >
    the circuit   : edges with |score| >= edge_threshold between writers with |effect| >= node_threshold

Run it on a model with dictionaries spliced in (`circuitkit.dictionaries.splice`): latents and errors are nodes beside
heads and MLPs. dM/dx_v is dM/df_v times the derivative of the latent in its own copy of the stream, so the edges are
the vector-Jacobian products of the paper, all of a layer in one matrix product. An SAE's latents share the readers of
their layer: there an edge ends in the query, key or value of a head, or in the MLP, and not in a single latent;
`circuitkit.methods.node_edges` has the edges between nodes, as the paper draws them.
Cost: one forward and backward pass per site and step for the nodes (``steps=1``: one in all); for edges as `eap-ig`.
Wrong as attribution is: where a latent switches on or off between clean and corrupt, or the path leaves what the model
was trained on.
Reference: Marks et al. 2024, arXiv:2403.19647. Deviations: signed so that positive supports the behaviour; midpoints of
the path, where the paper starts at its clean end; gradients of edges averaged along the path of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.places import stem_of
from circuitkit.dictionaries.splice import active_latents, splice
from circuitkit.errors import OptionError
from circuitkit.functional.attribution import quadrature
from circuitkit.graph import Graph
from circuitkit.methods.base import method
from circuitkit.methods.gradients import path_scores
from circuitkit.methods.node_effects import effects_of, node_effects
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.result import NodeScores
from circuitkit.scores import Scores
from circuitkit.shapes import EdgeMask
from circuitkit.tasks.base import Task


@method("sparse-feature-circuits")
def sparse_feature_circuits(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    steps: int = 10,
    node_threshold: float = 0.1,
    edge_threshold: float = 0.01,
    corrupt_value: str = "counterfactual",
) -> Scores:
    """Score every edge, and choose those between writers whose own effect is large enough.

    Args:
        steps: points of the paths; 1 for plain attribution at the clean run.
        node_threshold: smallest effect of a writer that is kept, in units of the metric; the input always is.
        edge_threshold: smallest score of an edge that is kept, in units of the metric.

    Raises:
        OptionError: if steps is less than 1, or a threshold below 0.
        MetricError: if the metric has no gradient, or with one step none at the clean run.
    """
    if not (node_threshold >= 0 and edge_threshold >= 0):
        raise OptionError(f"got thresholds {node_threshold} and {edge_threshold}, expected numbers of at least 0")
    effects = effects_of(model, task, plan, steps, False, corrupt_value)
    alphas, weights = ([1.0], [1.0]) if steps == 1 else quadrature("midpoint", steps)
    scores = path_scores(model, task, plan, alphas=alphas, weights=weights, corrupt_value=corrupt_value)
    between = edges_between(model.graph, effects, node_threshold)
    return replace(scores, selected=between & (scores.values.abs() >= edge_threshold))


def edges_between(graph: Graph, effects: NodeScores, threshold: float) -> EdgeMask:
    """The possible edges from writers with a large effect to readers that feed one, or the logits."""
    kept = effects.values.sum(1).abs() >= threshold
    kept |= torch.tensor([node.kind == "input" for node in graph.source_nodes])
    readers = (graph.feeds & kept).any(1) | graph.sinks
    return graph.mask & kept[:, None] & readers


def strongest_latents(
    model: Model,
    task: Task,
    dictionary: Dictionary,
    n: int,
    *,
    steps: int = 10,
    corrupt_value: str = "counterfactual",
    progress: bool = True,
) -> list[int]:
    """Numbers of the ``n`` latents with the largest effects on a task, for `splice`; all others stay in the error.

    Args:
        n: how many; fewer are given if fewer are active on the task's inputs.

    Raises:
        OptionError: if n is less than 1, the dictionary does not fit, or no latent is active.
    """
    return strongest_of_each(
        model, task, [dictionary], n, steps=steps, corrupt_value=corrupt_value, progress=progress
    )[0]  # fmt: skip


def strongest_of_each(
    model: Model,
    task: Task,
    dictionaries: Sequence[Dictionary],
    n: int,
    *,
    steps: int = 10,
    corrupt_value: str = "counterfactual",
    progress: bool = True,
) -> list[list[int]]:
    """`strongest_latents` of several dictionaries of different sites, from one pass over all of them.

    Spliced in, a dictionary leaves the run as it is, so that none changes the effects of another's latents.

    Raises:
        OptionError: as `strongest_latents`.
    """
    if type(n) is not int or n < 1:
        raise OptionError(f"got n = {n!r}, expected a whole number of at least 1")
    spliced, names = model, list[dict[str, int]]()
    for one in dictionaries:
        inputs = (side for b in task.batches for side in (b.clean, b.corrupt))
        active = {i for side in inputs for i in active_latents(model, one, side)}
        spliced = splice(spliced, one, latents=sorted(active), check=False)
        names.append({f"{stem_of(one.writes[0])}.f{i}": i for i in active})
    effects = node_effects(spliced, task, steps=steps, corrupt_value=corrupt_value, progress=progress)
    order = [effects.rows[row] for row in effects.values[:, 0].abs().argsort(descending=True).tolist()]
    return [sorted([own[name] for name in order if name in own][:n]) for own in names]
