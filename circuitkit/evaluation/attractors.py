"""A warning for circuits of networks whose state settles into attractors, where edges of single steps mislead.

    symptom     |f(C)| < 0.1  although C has at least 5 % of a recurrent graph, the whole model does the task, and
                |sum of scores over a cut| < (M(clean) - M(corrupt)) / 2
    cut         edges over the middle of time; where time is collapsed, edges out of the input

Such a network repairs a small change of its state within a few steps. Cutting one edge at one step then has next to no
effect, and scores of single edges rank these remainders, rightly; but thousands of edges cut together do not add up:
they carry the state across the border between two attractors at once, or not at all, whatever the ranking says. In a
network that repairs nothing (an integrator) first-order scores over any cut add up to the whole effect.
"""

from __future__ import annotations

import torch

from circuitkit.cautions import caution
from circuitkit.circuit import Circuit
from circuitkit.graph import Graph, Node
from circuitkit.models.views import windows_in
from circuitkit.result import Result
from circuitkit.scores import Scores

NEAR_NOTHING = 0.1  # faithfulness
LARGE_SHARE = 0.05  # of the possible edges
ADDS_UP = 0.5  # of the total effect


def caution_if_repaired(circuit: Circuit, result: Result) -> None:
    """Warn if a large circuit of a recurrent graph keeps next to nothing of what the model does.

    Args:
        result: what the circuit was measured to do.
    """
    if not shows_repair(circuit, result):
        return
    share = 100 * result.n_edges / result.n_possible
    caution(
        f"this circuit keeps {share:.0f} % of the edges and next to nothing of {result.task} "
        f"(faithfulness {result.faithfulness:.2f}), which the whole network does. In a network that settles into "
        "attractors this is usual, even if each edge is scored exactly: what one cut edge does is repaired, so scores "
        "of single edges say little about many cuts together, and edges out of the input come last. Score it by "
        f"'eap-ig' with steps=8 or more{_other_time(circuit.graph)}, and compare the faithfulness; or keep more edges"
    )


def shows_repair(circuit: Circuit, result: Result) -> bool:
    """Whether a result shows the symptom; False for transformers.

    Where the circuit's scores are unknown or have no sign, or time runs both ways, the cut is not looked at.

    >>> import circuitkit as ck
    >>> from circuitkit.graph import chain_graph
    >>> circuit = ck.Circuit.from_edges(chain_graph(1), ["input->logits"])
    >>> shows_repair(circuit, Result("copy", "kl", "zero", 1.0, 0.0, 0.0, 0.0, None, None, None, 9, 9, 9, (1.0, 1.0)))
    False
    """
    if not circuit.graph.is_recurrent or result.faithfulness is None:
        return False
    works = result.gap_interval is not None and result.gap_interval[0] > 0
    if not works or abs(result.faithfulness) >= NEAR_NOTHING or result.n_edges < LARGE_SHARE * result.n_possible:
        return False
    cut = over_input_cut if windows_in(circuit.graph) is None else over_time_cut
    crossing = None if circuit.scores is None else cut(circuit.scores)
    return crossing is None or abs(crossing) < ADDS_UP * (result.clean - result.corrupt)


def _other_time(graph: Graph) -> str:
    return "" if windows_in(graph) is None else ", with time='collapsed' or longer windows"


def over_input_cut(scores: Scores) -> float | None:
    """Sum of the scores of all edges out of the input; None for scores without a sign."""
    if not scores.signed:
        return None
    return float(scores.values[_are("input", scores.graph.source_nodes)].double().sum())


def over_time_cut(scores: Scores) -> float | None:
    """Sum of the scores of all edges that cross the middle of time, or enter after it from the input.

    Returns:
        None where there is no such cut: scores without a sign, a single window, or a network that runs backward too.
    """
    graph = scores.graph
    sources, destinations = (_windows(graph, nodes) for nodes in (graph.source_nodes, graph.destination_nodes))
    middle = int(sources.max()) // 2
    backward = graph.mask & (sources[:, None] > destinations)
    if not scores.signed or middle == int(sources.max()) or bool(backward.any()):
        return None
    before = (sources <= middle) | _are("input", graph.source_nodes)
    after = (destinations > middle) | _are("logits", graph.destination_nodes)
    return float(scores.values[before][:, after].double().sum())


def _windows(graph: Graph, nodes: tuple[Node, ...]) -> torch.Tensor:
    """Number of each node's window."""
    number = {span: i for i, span in enumerate(dict.fromkeys(node.span for node in graph.source_nodes))}
    return torch.tensor([number[node.span] for node in nodes])


def _are(kind: str, nodes: tuple[Node, ...]) -> torch.Tensor:
    return torch.tensor([node.kind == kind for node in nodes])
