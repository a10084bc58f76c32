"""Models whose circuit is known, and what is known: the entries of the benchmark of methods.

To add one, give `ground_truth` the model's name, the task, what removed edges carry, and a function that says which
edges are part and which are judged at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from circuitkit.errors import TaskError
from circuitkit.models.hooked import Model
from circuitkit.registry import Registry
from circuitkit.shapes import EdgeMask
from circuitkit.tasks.base import Task

Known = Callable[[Model, Task], tuple[EdgeMask, EdgeMask] | None]


@dataclass(frozen=True)
class GroundTruth:
    """What is known of one model.

    Args:
        model: name of the zoo model, and of this entry.
        task: name of the task.
        corrupt_value: what removed edges carry, in scoring (where the method can choose) and in faithfulness.
        known: which edges are part, and which edges are judged; None where no circuit is to be found.
        line: what is known, in one line.
    """

    model: str
    task: str
    corrupt_value: str
    known: Known
    line: str


TRUTHS: Registry[GroundTruth] = Registry("ground truth")


def ground_truth(*models: str, task: str, corrupt_value: str = "counterfactual", line: str) -> Callable[[Known], Known]:
    """Register what the decorated function knows of one or more zoo models."""

    def register(known: Known) -> Known:
        for model in models:
            TRUTHS.add(model)(GroundTruth(model, task, corrupt_value, known, line))
        return known

    return register


PROGRAMS = ("frac_prevs", "hist", "length", "pair_balance", "reverse", "sort_unique")


# Under zero ablation, because the compiler's circuit is about variables, and many of them (one, indices, whatever is
# computed from the length) are the same in both inputs of a pair: patched from there, their edges score 0 rightly.
@ground_truth(
    *(f"tracr/{program}" for program in PROGRAMS),
    task="tracr",
    corrupt_value="zero",
    line="a compiled program: the edges along which its variables travel",
)
@ground_truth("induction/trained", task="induction-letters", line="three edges in a row carry the contrast")
def edges_of_the_task(model: Model, task: Task) -> tuple[EdgeMask, EdgeMask]:
    """The circuit that the task carries, among all edges.

    Raises:
        TaskError: if it carries none.
    """
    if task.known is None:
        raise TaskError(f"task {task.name!r} carries no known circuit for {model.name}")
    return model.graph.edge_mask(task.known), model.graph.mask


@ground_truth("induction/damaged", task="induction-letters", line="negative control: there is nothing to be found")
def nothing(model: Model, task: Task) -> None:
    """No circuit: the weights cannot do the task."""
    return None


# Heads with constant attention were stored with query and key weights of exactly zero. What goes into the other
# queries and keys is not judged: in the deeper models softmax attention has a share of less than a percent.
@ground_truth(
    "modadd/half_trained_1layer",
    "modadd/mixed_attention_1layer",
    "modadd/modelA_pizza_uniform_attention",
    "modadd/three_layer",
    "modadd/two_layer",
    task="modular-addition",
    line="queries and keys of uniform heads have exactly no effect; values and MLPs have one",
)
def no_effect_of_uniform_queries_and_keys(model: Model, task: Task) -> tuple[EdgeMask, EdgeMask]:
    """Edges into values, MLPs and logits, judged against edges into queries and keys whose weights are zero."""
    part, without = model.graph.mask.clone(), model.graph.mask.clone()
    for site in model.wiring.read_sites:
        for i, column in enumerate(range(site.first, site.first + site.n)):
            attends = model.graph.destination_nodes[column].slot in ("q", "k")
            part[:, column] &= not attends
            without[:, column] &= attends and site.weight is not None and not site.weight[i].any()
    return part, part | without
