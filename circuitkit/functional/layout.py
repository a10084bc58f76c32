"""Where the nodes of a layered graph stand: arrays in, coordinates out; the same input gives the same picture.

Each node has a row. Within a row, nodes stand one unit apart, centred on 0, in an order that makes few edges cross.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

Rows = Int[np.ndarray, "node"]
Positions = Float[np.ndarray, "node"]
Ends = Int[np.ndarray, "edge two"]

# Counting crossings compares all pairs of edges; the strongest few hundred decide how a picture looks.
COUNTED_EDGES = 600


def layered_x(row: Rows, edges: Ends, weight: Float[np.ndarray, edge], *, sweeps: int = 8) -> Positions:
    """Horizontal places from weighted barycentres, swept up and down; never more crossings than the given order.

    A sweep moves each node to the mean place of its neighbours in the rows already passed, weighted by ``weight``
    (Sugiyama, Tagawa and Toda 1981). Of all the orders seen, the one with the fewest crossings is returned.

    >>> layered_x(np.array([0, 0, 1, 1]), np.array([[0, 3], [1, 2]]), np.ones(2)).tolist()
    [-0.5, 0.5, 0.5, -0.5]
    """
    strongest = np.argsort(-weight, kind="stable")[:COUNTED_EDGES]
    counted = edges[strongest]
    x = _spread(np.arange(len(row), dtype=float), row)
    best, fewest = x, crossings(x, row, counted)
    levels = np.unique(row)
    for sweep in range(sweeps):
        if fewest == 0:
            break
        upward = sweep % 2 == 0
        for level in levels[1:] if upward else levels[-2::-1]:
            x = _settle(x, row, edges, weight, level, upward)
        count = crossings(x, row, counted)
        if count < fewest:
            best, fewest = x, count
    return best


def crossings(x: Positions, y: np.ndarray, edges: Ends) -> int:
    """How many pairs of straight edges cross; edges that share an end do not.

    >>> crossings(np.array([0.0, 1.0, 0.0, 1.0]), np.array([0, 0, 1, 1]), np.array([[0, 3], [1, 2]]))
    1
    """
    if len(edges) < 2:
        return 0
    points = np.stack([x, y.astype(float)], axis=1)
    start, end = points[edges[:, 0]], points[edges[:, 1]]
    along = end - start

    def side(of: np.ndarray) -> np.ndarray:
        offset = of[None, :, :] - start[:, None, :]
        return np.sign(along[:, None, 0] * offset[..., 1] - along[:, None, 1] * offset[..., 0])

    parted = side(start) * side(end) < 0
    return int(np.triu(parted & parted.T, 1).sum())


def wrap_rows(x: Positions, row: Rows, widest: int) -> tuple[Positions, Int[np.ndarray, node]]:
    """Break rows of more than ``widest`` nodes into lines of nearly equal length: new places, and each node's line.

    >>> x, line = wrap_rows(np.array([-1.5, -0.5, 0.5, 1.5]), np.zeros(4, dtype=int), 2)
    >>> x.tolist(), line.tolist()
    ([-0.5, 0.5, -0.5, 0.5], [0, 0, 1, 1])
    """
    x, line = x.copy(), np.zeros(len(row), dtype=int)
    for level in np.unique(row):
        members = np.flatnonzero(row == level)
        if len(members) > widest:
            members = members[np.argsort(x[members], kind="stable")]
            parts = np.array_split(members, -(-len(members) // widest))
            for number, part in enumerate(parts):
                line[part] = number
                x[part] = np.arange(len(part)) - (len(part) - 1) / 2
    return x, line


def in_columns(
    x: Positions, row: Rows, column: Rows, widest: int = 3, same: Rows | None = None
) -> tuple[Positions, Int[np.ndarray, node]]:
    """Nodes in columns side by side: new places, and each node's line within its row.

    Within a column a row keeps the order of ``x``, and is broken into lines of at most ``widest`` nodes.

    Args:
        x: where nodes would stand without columns.
        row: row of each node.
        column: column of each node.
        widest: most nodes of a line in a column.
        same: which nodes are copies of one another; copies stand on one line in every column, in the same order.

    >>> x, line = in_columns(np.array([0.0, 1.0, 0.0]), np.array([0, 0, 0]), np.array([0, 0, 1]))
    >>> x.tolist(), line.tolist()
    ([-1.25, -0.25, 1.25], [0, 0, 0])
    """
    place, left, gap = np.zeros(len(row)), 0.0, 0.5
    if same is None:
        line = _lines(x, row, column, widest)
    else:
        x = (np.bincount(same, x) / np.maximum(np.bincount(same), 1))[same]
        line = _lines(x, row, same * 0, widest, same)
    for number in np.unique(column):
        mine, width = np.flatnonzero(column == number), 1
        for level, part in sorted(set(zip(row[mine].tolist(), line[mine].tolist(), strict=True))):
            members = mine[(row[mine] == level) & (line[mine] == part)]
            members = members[np.argsort(x[members], kind="stable")]
            width = max(width, len(members))
            place[members] = np.arange(len(members)) - (len(members) - 1) / 2
        place[mine] += left + (width - 1) / 2
        left += width + gap
    return place - (left - gap - 1) / 2, line


def _lines(x: Positions, row: Rows, column: Rows, widest: int, same: Rows | None = None) -> Int[np.ndarray, node]:
    """Line of each node: lines of nearly equal length, in the order of ``x``; copies together, by their mean place."""
    line = np.zeros(len(row), dtype=int)
    same = np.arange(len(row)) if same is None else same
    for level, number in sorted(set(zip(row.tolist(), column.tolist(), strict=True))):
        members = np.flatnonzero((row == level) & (column == number))
        kinds = np.unique(same[members])
        middle = np.array([x[members[same[members] == kind]].mean() for kind in kinds])
        kinds = kinds[np.argsort(middle, kind="stable")]
        for i, part in enumerate(np.array_split(kinds, -(-len(kinds) // widest))):
            line[members[np.isin(same[members], part)]] = i
    return line


def _settle(x: Positions, row: Rows, edges: Ends, weight: np.ndarray, level: int, upward: bool) -> Positions:
    """Reorder one row by the weighted mean place of its neighbours below (upward) or above it."""
    total, mass = np.zeros(len(x)), np.zeros(len(x))
    for here, there in ((0, 1), (1, 0)):
        near, far = edges[:, here], edges[:, there]
        passed = (row[far] < level) if upward else (row[far] > level)
        used = (row[near] == level) & passed
        np.add.at(total, near[used], weight[used] * x[far[used]])
        np.add.at(mass, near[used], weight[used])
    wish = np.where(mass > 0, total / np.where(mass > 0, mass, 1), x)
    return _spread(np.where(row == level, wish, x), row)


def _spread(wish: Positions, row: Rows) -> Positions:
    """Unit distances around 0 in every row, in the order of the wishes; ties keep the order of the nodes."""
    x = np.zeros(len(row))
    for level in np.unique(row):
        members = np.flatnonzero(row == level)
        order = members[np.argsort(wish[members], kind="stable")]
        x[order] = np.arange(len(order)) - (len(order) - 1) / 2
    return x
