"""How many nodes a behaviour needs: faithfulness and completeness of the strongest writers, all others ablated.

    faithfulness(C) = (M(C) - M(nothing)) / (M(model) - M(nothing))       M(C): all writers outside C ablated
    completeness(C) = the same of the complement: the writers in C ablated, all others left

A faithful and complete set has the first near 1 and the second near 0. Writers are taken in order of the magnitude of
their effect; the input is never ablated. The curve of single neurons (`Model.split_mlps`) is what latents must beat.
Reference: Marks et al. 2024, arXiv:2403.19647, where ablated nodes carry their mean at each position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.faithfulness import circuit_metrics, normalised
from circuitkit.methods.base import check_task
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Task

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class NodeCurves:
    """Faithfulness and completeness at several numbers of nodes.

    Args:
        sizes: how many writers are in the set.
        faithfulness: with all other writers ablated; None where clean and ablated metrics are equal.
        completeness: with these writers ablated, normalised in the same way.
        n_nodes: how many writers there are besides the input.
        clean: mean metric of the whole model.
        ablated: mean metric with every writer but the input ablated.
        corrupt_value: what ablated writers carry.
    """

    sizes: tuple[int, ...]
    faithfulness: tuple[float | None, ...]
    completeness: tuple[float | None, ...]
    n_nodes: int
    clean: float
    ablated: float
    corrupt_value: str

    def plot(self) -> go.Figure:
        """Both curves over the number of nodes."""
        from circuitkit.figures.node_curves import node_curves_figure

        return node_curves_figure(self)


def node_curves(
    model: Model,
    task: Task,
    effects: NodeScores,
    *,
    sizes: Sequence[int] | None = None,
    corrupt_value: str = "position-mean",
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> NodeCurves:
    """Measure the sets of the writers with the largest effects.

    Args:
        effects: a row for each writer of the model, from `circuitkit.methods.node_effects`.
        sizes: numbers of writers; by default about ten, from 0 to all, each half as many again and more.
        corrupt_value: what ablated writers carry.

    Raises:
        GraphError: if the effects are of another model's writers.
        OptionError: for a size that is negative or larger than the number of writers, or an unknown corrupt value.

    >>> import circuitkit as ck
    >>> from circuitkit.methods.node_effects import node_effects
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=8)
    >>> curves = node_curves(model, task, node_effects(model, task, steps=2))
    >>> curves.sizes, curves.faithfulness[0], curves.faithfulness[-1]
    ((0, 1, 2), 0.0, 1.0)
    """
    if effects.rows != model.graph.sources:
        raise GraphError(f"got effects of {len(effects.rows)} nodes that are not the writers of {model.name} as wired")
    check_task(model, task)
    strength = effects.values.nansum(1).abs()
    rows = [row for row in strength.argsort(descending=True).tolist() if not model.graph.roots[row]]
    sizes = _sizes(len(rows)) if sizes is None else sorted(set(sizes))
    if not sizes or sizes[0] < 0 or sizes[-1] > len(rows):
        raise OptionError(f"got sizes = {list(sizes)}, expected numbers from 0 to the {len(rows)} writers")
    masks = [_without(model, rows), *(_without(model, rows[n:]) for n in sizes)]
    masks += [_without(model, rows[:n]) for n in sizes]
    plan = Plan.of(batch_size, budget, progress, seed)
    clean, values = circuit_metrics(model, task, torch.stack(masks), plan=plan, corrupt_value=corrupt_value)
    nothing, found = values[0], [normalised(v, values[0], clean) for v in values[1:]]
    return NodeCurves(
        tuple(sizes), tuple(found[: len(sizes)]), tuple(found[len(sizes) :]), len(rows), float(clean.mean()),
        float(nothing.mean()), corrupt_value,
    )  # fmt: skip


def _sizes(n: int) -> list[int]:
    found, size = [0], 1.0
    while size < n:
        found.append(int(size))
        size = max(size + 1, size * n**0.125)
    return sorted({*found, n})


def _without(model: Model, rows: list[int]) -> torch.Tensor:
    mask = model.graph.mask.clone()
    mask[rows] = False
    return mask
