"""How the edges of a layered picture run, and the room they need: places in, control points and heights out.

Edges to the next line are straight, longer ones bow outwards. Edges within a line are arcs: rightward above it,
leftward below. Edges that run down bow further than those that run up. An edge from a node to itself is a loop above.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

from circuitkit.functional.layout import Ends, Positions, Rows

Point = tuple[float, float]

SAME_LAYER, NEXT_LAYER, WRAPPED = 0.9, 1.3, 0.7  # from a line to the next
LOOP, NEXT_LOOP, LOOP_WIDTH = 0.68, 0.2, 0.9
_HIGHEST_ARC = 2.6
_FREE = 0.25  # of the gap between two lines, arcs may have this much for nothing


def bend(source: Point, target: Point, lines: tuple[int, int], fan: float) -> Point:
    """Control point of the quadratic curve between two nodes; of a loop, its top.

    Args:
        source: where it begins.
        target: where it ends.
        lines: the line that each stands on, counted from the bottom.
        fan: how far aside this one of several edges between the same two nodes is drawn.

    >>> bend((0.0, 0.0), (0.0, 1.0), (0, 1), 0.0), bend((0.0, 0.0), (0.0, 0.0), (0, 0), 0.0)
    ((0.0, 0.5), (0.0, 0.68))
    """
    (x, y), (dx, dy) = _middle(source, target), (target[0] - source[0], target[1] - source[1])
    if source == target:
        return x, y + LOOP + fan
    if lines[0] == lines[1]:
        return x, y + math.copysign(_arc(dx) + fan, dx)
    bow, outwards, length = fan, x + 1e-9, math.hypot(dx, dy)
    if lines[0] > lines[1]:
        # Flat ones bow less: they would run behind the nodes beside them.
        bow += math.copysign(min(0.35 + 0.25 * abs(dy), 1.8) * abs(dy) / length, outwards)
    elif lines[1] - lines[0] > 1:
        bow += math.copysign(min(0.16 * abs(dy) + 0.1, 1.4), outwards)
    return x + bow * abs(dy) / length, y - bow * dx / length * math.copysign(1, dy)


def along(source: Point, control: Point, target: Point, t: float) -> Point:
    """The point of a curve at 0 <= t <= 1: quadratic with one control point, or a loop as high as its control point.

    >>> along((0.0, 0.0), (0.0, 2.0), (1.0, 0.0), 0.5), along((0.0, 0.0), (0.0, 3.0), (0.0, 0.0), 0.5)
    ((0.25, 1.0), (0.0, 3.0))
    """
    if source == target:
        # A cubic curve back to its own beginning reaches 3/4 of the height of its two control points.
        side, up = 3 * (1 - t) * t * (2 * t - 1) * LOOP_WIDTH, 4 * (1 - t) * t
        return source[0] + side, source[1] + up * (control[1] - source[1])
    a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
    return a * source[0] + b * control[0] + c * target[0], a * source[1] + b * control[1] + c * target[1]


def fans(pairs: list[tuple[int, int]]) -> list[float]:
    """How far aside each edge is drawn, so that edges between the same two nodes do not hide each other.

    >>> fans([(0, 1), (0, 1), (2, 2), (2, 2)])
    [-0.15, 0.15, 0.0, 0.2]
    """
    several: dict[tuple[int, int], int] = {}
    for pair in pairs:
        several[pair] = several.get(pair, 0) + 1
    seen: dict[tuple[int, int], int] = {}
    out = []
    for pair in pairs:
        k = seen[pair] = seen.get(pair, -1) + 1
        out.append(NEXT_LOOP * k if pair[0] == pair[1] else 0.3 * (k - (several[pair] - 1) / 2))
    return out


def heights(
    row: Rows, line: Rows, layer: Rows, x: Positions, ends: Ends
) -> tuple[Int[np.ndarray, node], Float[np.ndarray, node]]:
    """The line that each node stands on, counted from the bottom, and its height: room for arcs and loops included.

    Args:
        row: row of each node.
        line: its line within the row.
        layer: lines of one layer stand closer.
        x: how long arcs are.
        ends: source and target of each edge.

    >>> one, x = np.array([0, 1, 1]), np.array([0.0, -0.5, 0.5])
    >>> heights(one, one * 0, one, x, np.array([[0, 1], [0, 2]]))[1].tolist()
    [0.0, 1.3, 1.3]
    """
    places = sorted(set(zip(row.tolist(), line.tolist(), strict=True)))
    at = np.array([places.index(place) for place in zip(row.tolist(), line.tolist(), strict=True)], dtype=int)
    above, below = _room(at, x, ends)
    here, y = 0.0, np.zeros(len(row))
    for number, place in enumerate(places):
        members = at == number
        if number:
            before = int(np.flatnonzero(at == number - 1)[0])
            same_layer = layer[before] == layer[int(np.flatnonzero(members)[0])]
            same_row = places[number - 1][0] == place[0]
            here += WRAPPED if same_row else SAME_LAYER if same_layer else NEXT_LAYER
            here += max(0.0, above[number - 1] + below[number] - _FREE)
        y[members] = here
    return at, np.round(y, 6)


def _room(at: Rows, x: Positions, ends: Ends) -> tuple[np.ndarray, np.ndarray]:
    """How far arcs and loops rise above each line, and how far they hang below it."""
    above, below = np.zeros(len(at) + 1), np.zeros(len(at) + 1)
    fan = fans([(s, t) for s, t in ends.tolist()])
    for (s, t), aside in zip(ends.tolist(), fan, strict=True):
        if s == t:
            above[at[s]] = max(above[at[s]], LOOP + aside)
        elif at[s] == at[t]:
            side = above if x[t] > x[s] else below
            side[at[s]] = max(side[at[s]], (_arc(x[t] - x[s]) + abs(aside)) / 2)
    return above, below


def _arc(dx: float) -> float:
    """Height of an arc's control point; the arc itself reaches half of it."""
    return min(0.35 + 0.22 * abs(float(dx)), _HIGHEST_ARC)


def _middle(a: Point, b: Point) -> Point:
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2
