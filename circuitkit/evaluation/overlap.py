"""Overlap: do two tasks use the same parts? (Merullo et al. 2024, arXiv:2310.08744)

    J = shared / all;   reuse of A in B = shared / size of A;   p = P(shared or more | random sets of these sizes)

p is hypergeometric: every edge (or component) is as likely as any other. Real circuits are connected, and few ways lead
out of the input and into the logits, so circuits of unrelated tasks share more than that; a small p says that two
circuits are not independent draws, not that the tasks are related. Nor does overlap say that the circuit of one task
does the other: run it there with `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.comparisons import Overlap
from circuitkit.errors import GraphError, OptionError
from circuitkit.graph import Graph
from circuitkit.scores import Scores

LEVELS = ("edges", "nodes", "heads")


def overlap(circuits: Mapping[str, Circuit], *, level: str = "edges") -> Overlap:
    """What each pair of circuits on one graph shares.

    Args:
        circuits: by the names they shall have in the figure, such as their tasks.
        level: ``edges``; ``nodes``, the components from which an edge leads on, the input left out; ``heads`` of these.

    Raises:
        OptionError: if there are fewer than two circuits, or no such level.
        GraphError: if they are not of one graph.

    >>> from circuitkit.graph import chain_graph
    >>> a = Circuit.from_edges(chain_graph(2), ["input->m0", "m0->logits"])
    >>> b = Circuit.from_edges(chain_graph(2), ["input->m1", "m1->logits"])
    >>> found = overlap({"a": a, "b": a | b})
    >>> found.jaccard(0, 1), found.reuse(0, 1), round(found.p_value(0, 1), 6)
    (0.5, 1.0, 0.4)
    """
    _check_level(level)
    if len(circuits) < 2:
        raise OptionError(f"got {len(circuits)} circuit, expected at least two to compare")
    graph = next(iter(circuits.values())).graph
    for name, circuit in circuits.items():
        if not circuit.graph.same_as(graph):
            raise GraphError(f"the circuit {name!r} is of another graph; compare circuits of one model")
    return _counted(tuple(circuits), [_members(c.graph, c.mask, level) for c in circuits.values()], graph, level)


def strongest_overlap(scores: Mapping[str, Scores], *, share: float = 0.02, level: str = "heads") -> Overlap:
    """What the strongest components of each ranking share: the top 2 % of heads, as Merullo et al. count.

    A component's strength is the sum of the magnitudes of its outgoing edges. At least one component is taken.

    Raises:
        OptionError: if there are fewer than two rankings, no such level, or the share is not between 0 and 1.
        GraphError: if they are not of one graph.
    """
    _check_level(level)
    if len(scores) < 2 or not 0 < share <= 1:
        raise OptionError(f"got {len(scores)} rankings and share = {share!r}, expected two or more, and 0 < share <= 1")
    graph = next(iter(scores.values())).graph
    members = []
    for name, ranking in scores.items():
        if not ranking.graph.same_as(graph):
            raise GraphError(f"the ranking {name!r} is of another graph; compare rankings of one model")
        strength = (ranking.values.abs() * graph.mask) if level == "edges" else ranking.values.abs().sum(1)
        strength = strength[_possible(graph, level)]
        taken = torch.zeros(len(strength), dtype=torch.bool)
        taken[strength.argsort(descending=True, stable=True)[: max(1, round(share * len(strength)))]] = True
        members.append(taken)
    return _counted(tuple(scores), members, graph, level)


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise OptionError(f"got level = {level!r}, expected one of {', '.join(LEVELS)}")


def _possible(graph: Graph, level: str) -> Tensor:
    """What could be in a circuit: edges as a matrix, components as a vector over sources."""
    if level == "edges":
        return graph.mask
    heads = torch.tensor([node.kind == "head" for node in graph.source_nodes])
    return heads if level == "heads" else ~graph.roots & graph.mask.any(1)


def _members(graph: Graph, mask: Tensor, level: str) -> Tensor:
    return (mask if level == "edges" else mask.any(1))[_possible(graph, level)]


def _counted(names: tuple[str, ...], members: list[Tensor], graph: Graph, level: str) -> Overlap:
    together = torch.stack(members).double()
    shared = (together @ together.T).round().long().tolist()
    return Overlap(
        level, names, tuple(row[i] for i, row in enumerate(shared)), int(_possible(graph, level).sum()),
        tuple(map(tuple, shared)),
    )  # fmt: skip
