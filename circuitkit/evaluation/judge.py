"""Runs many circuits of one graph on one task, for measures that compare a circuit with parts of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.errors import OptionError
from circuitkit.evaluation.faithfulness import circuit_metrics, scored_with
from circuitkit.evaluation.positions import layout_for, position_metrics
from circuitkit.graph import Graph
from circuitkit.methods.base import check_task
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.shapes import EdgeMask
from circuitkit.tasks.base import Task
from circuitkit.tasks.spans import fitted_to

# Entries of edge matrices held at once: circuits come one by one where a graph has millions of edges.
MOST_ENTRIES = 2**28


@dataclass(frozen=True, eq=False)
class Judge:
    """A model and a task, ready to run circuits.

    Args:
        model: whose circuits are run.
        task: what they are run on.
        graph: whose edges they are.
        corrupt_value: what removed edges carry.
        plan: how the work is cut.
    """

    model: Model
    task: Task
    graph: Graph
    corrupt_value: str
    plan: Plan

    @classmethod
    def of(cls, model: Model, task: Task, circuit: Circuit, corrupt_value: str | None, common: dict[str, Any]) -> Judge:
        """A judge of a circuit and its parts.

        Raises:
            GraphError: if the circuit belongs to another model's graph.
            OptionError: if it has no edge.
        """
        layout = layout_for(model, circuit.graph)
        check_task(model, task)
        if len(circuit) == 0:
            raise OptionError("this circuit has no edges, so it has no parts to test; take a larger one")
        task = task if layout is None else fitted_to(task, layout.spans)
        return cls(model, task, circuit.graph, corrupt_value or scored_with(circuit), Plan.of(**common))

    def metrics(self, masks: Iterable[EdgeMask]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "circuit batch"]]:
        """The metric of every example for the whole model and for each circuit."""
        layout = layout_for(self.model, self.graph)
        run = circuit_metrics if layout is None else partial(position_metrics, layout=layout)
        at_once, waiting = max(1, MOST_ENTRIES // self.graph.mask.numel()), iter(masks)
        clean, values = torch.zeros(0), []
        while group := list(islice(waiting, at_once)):
            clean, part = run(
                self.model, self.task, torch.stack(group), plan=self.plan, corrupt_value=self.corrupt_value
            )
            values.append(part)
        return clean, torch.cat(values)

    def means(self, masks: Iterable[EdgeMask]) -> list[float]:
        """The mean metric of each circuit."""
        means: list[float] = self.metrics(masks)[1].mean(1).tolist()
        return means

    def ends(self, circuit: EdgeMask) -> dict[str, float]:
        """Mean metrics of the whole model, of no edge at all and of the circuit, by their names in results."""
        clean, values = self.metrics([torch.zeros_like(circuit), circuit])
        corrupt, kept = values.mean(1).tolist()
        return {"clean": float(clean.mean()), "corrupt": corrupt, "circuit": kept}


def components(circuit: Circuit) -> list[int]:
    """Rows of the writers, roots (the input) left out, from which an edge of the circuit leads on.

    Raises:
        OptionError: if there is none.
    """
    rows = (circuit.mask.any(1) & ~circuit.graph.roots).nonzero().flatten().tolist()
    if not rows:
        raise OptionError("this circuit has no component besides the input, nothing to knock out; take a larger one")
    return rows


def without(base: EdgeMask, rows: Iterable[int]) -> EdgeMask:
    """Edges with some writers knocked out: what they write is read as corrupt everywhere."""
    mask = base.clone()
    mask[list(rows)] = False
    return mask


def check_counts(**counts: int) -> None:
    """Refuse a negative or fractional count. Raises OptionError naming it."""
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise OptionError(f"got {name} = {value!r}, expected a whole number of at least 0")
