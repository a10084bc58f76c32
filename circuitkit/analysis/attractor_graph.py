"""Which stable points a network's saddles join, tested by pushing it off every saddle.

Nodes are stable points, edges are saddles with one unstable direction v: the network is started at ``h* + eps v`` and
at ``h* - eps v`` and runs under the same constant input until it rests. Where it ends are the edge's two ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.analysis.fixed_points import FixedPoints, Step
from circuitkit.errors import OptionError

if TYPE_CHECKING:
    import networkx as nx
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class AttractorGraph:
    """Stable points joined by one-dimensional saddles.

    Args:
        points: what was found.
        stable: which of the points are stable: the nodes.
        saddles: which have exactly one unstable direction, a real one: the edges.
        ends: for each saddle the two nodes (numbers of ``stable``) that it leads to; -1 where the network did not
            come to rest at one.
        steps: how many steps each of the two runs took to rest; -1 where it did not.
    """

    points: FixedPoints
    stable: Int[Tensor, " node"]
    saddles: Int[Tensor, " edge"]
    ends: Int[Tensor, "edge 2"]
    steps: Int[Tensor, "edge 2"]

    @property
    def fraction_joining(self) -> float | None:
        """Share of the saddles that lead to two different stable points; None if there is no saddle."""
        if not len(self.saddles):
            return None
        joins = (self.ends >= 0).all(1) & (self.ends[:, 0] != self.ends[:, 1])
        return float(joins.double().mean())

    def to_networkx(self) -> nx.MultiGraph:
        """The graph; nodes carry ``point``, edges ``point``, ``eigenvalue`` and ``steps``. Ends at -1 are left out."""
        import networkx as nx

        graph = nx.MultiGraph()
        graph.add_nodes_from((i, {"point": int(p)}) for i, p in enumerate(self.stable.tolist()))
        for saddle, (a, b), steps in zip(self.saddles.tolist(), self.ends.tolist(), self.steps.tolist(), strict=True):
            if min(a, b) >= 0:
                top = float(self.points.eigenvalues[saddle, 0].real)
                graph.add_edge(a, b, key=saddle, point=saddle, eigenvalue=top, steps=tuple(steps))
        return graph

    def plot(self) -> go.Figure:
        """The graph in the plane of the first two principal components of the stable points."""
        from circuitkit.figures.fixed_points import attractor_graph_figure

        return attractor_graph_figure(self)


@dataclass(frozen=True, eq=False)
class Moves:
    """Where input pulses take a network from each stable point.

    Args:
        graph: nodes and edges.
        to: for each pulse and node the node that it rests at afterwards, or -1.
    """

    graph: AttractorGraph
    to: Int[Tensor, "pulse node"]

    @property
    def fraction_along_edges(self) -> float | None:
        """Of the moves from one node to another, the share between nodes that an edge joins; None without a move."""
        joined = {frozenset(pair) for pair in self.graph.ends.tolist()}
        moves = [(i, j) for row in self.to.tolist() for i, j in enumerate(row) if j not in (i, -1)]
        return sum(frozenset(move) in joined for move in moves) / len(moves) if moves else None

    def to_networkx(self) -> nx.MultiDiGraph:
        """Nodes are stable points; an edge for each pulse (its key) that takes the network to a node or leaves it."""
        import networkx as nx

        graph = nx.MultiDiGraph()
        graph.add_nodes_from(range(len(self.graph.stable)))
        for pulse, row in enumerate(self.to.tolist()):
            graph.add_edges_from((i, j, pulse) for i, j in enumerate(row) if j >= 0)
        return graph


def attractor_graph(
    step: Step, points: FixedPoints, *, eps: float = 1e-3, steps: int = 5000, near: float = 1e-2
) -> AttractorGraph:
    """Stable points joined by one-dimensional saddles, each edge found by pushing the network off its saddle.

    Args:
        step: the step that the points are of.
        points: what `find_fixed_points` found.
        eps: length of the push, in units of the smallest distance between stable points.
        steps: most steps to rest.
        near: distance from a stable point that counts as there, in the same unit.

    Raises:
        OptionError: if there is no stable point, or an option is not positive.

    >>> from circuitkit.analysis.fixed_points import find_fixed_points
    >>> step = lambda h, x: torch.tanh(2 * h + x)
    >>> graph = attractor_graph(step, find_fixed_points(step, torch.randn(64, 1), torch.zeros(1), n_starts=32))
    >>> sorted(graph.to_networkx().edges()), graph.fraction_joining
    ([(0, 1)], 1.0)
    """
    stable, saddles = points.of("stable"), points.of("saddle-1")
    if not len(stable):
        raise OptionError(f"there is no stable point among {points.counts}; start the search from more states")
    if min(eps, steps, near) <= 0:
        raise OptionError(f"got eps={eps}, steps={steps}, near={near}; all must be positive")
    unit = _unit(points.states[stable])
    # A single real eigenvalue outside the circle: with one outside, its conjugate would be outside too.
    push = [eps * unit * points.unstable_direction(i) for i in saddles.tolist()]
    pushes = torch.stack(push) if push else points.states.new_zeros(0, points.states.shape[-1])
    starts = torch.stack((points.states[saddles] + pushes, points.states[saddles] - pushes), 1)
    ends, taken = _rest(step, starts.flatten(0, 1), points.x, points.states[stable], near * unit, steps)
    return AttractorGraph(points, stable, saddles, ends.reshape(-1, 2), taken.reshape(-1, 2))


def pulse_moves(
    step: Step,
    graph: AttractorGraph,
    pulses: Float[Tensor, "pulse step input"],
    *,
    steps: int = 5000,
    near: float = 1e-2,
) -> Moves:
    """Where each pulse, given to the network at rest, takes it from each stable point.

    Args:
        step: the step that the points are of.
        graph: nodes and edges.
        pulses: the inputs while a pulse lasts; the constant input of the points comes after.
        steps: most steps to rest.
        near: distance from a stable point that counts as there, in smallest distances between stable points.
    """
    nodes, pulses = graph.points.states[graph.stable], pulses.to(graph.points.states)
    states = nodes.expand(len(pulses), -1, -1).flatten(0, 1)
    with torch.no_grad():
        for t in range(pulses.shape[1]):
            states = step(states, pulses[:, t].repeat_interleave(len(nodes), 0))
    ends, _ = _rest(step, states, graph.points.x, nodes, near * _unit(nodes), steps)
    return Moves(graph, ends.reshape(len(pulses), len(nodes)))


def _unit(stable: Tensor) -> float:
    """Smallest distance between two stable points; 1 if there is only one."""
    return float(torch.pdist(stable).min()) if len(stable) > 1 else 1.0


def _rest(step: Step, states: Tensor, x: Tensor, nodes: Tensor, near: float, steps: int) -> tuple[Tensor, Tensor]:
    """The node that each state comes near, and after how many steps; -1 if it does not."""
    ends = torch.full((len(states),), -1, dtype=torch.long, device=states.device)
    taken, active = ends.clone(), torch.arange(len(states), device=states.device)
    step = getattr(step, "frozen", lambda _like: step)(states)
    with torch.no_grad():
        for t in range(steps + 1):
            if not len(active):
                break
            gaps = torch.cdist(states, nodes)
            there = gaps.min(1).values <= near
            ends[active[there]], taken[active[there]] = gaps.argmin(1)[there], t
            states, active = states[~there], active[~there]
            states = step(states, x.expand(len(states), -1)) if len(states) else states
    return ends, taken
