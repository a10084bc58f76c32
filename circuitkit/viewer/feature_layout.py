"""Where the nodes of a feature graph stand: token positions across, layers upward, the nodes of one cell side by side.

Distances are in node spacings; y counts upward. A cell with many nodes has several lines; how many is settled for the
whole picture, so that it comes out about as wide as a screen.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from circuitkit.features.graph import FeatureGraph, FeatureNode

SHAPE = 1.7  # width of the picture by its height
ONE_LINE = 10  # as many targets as are explained by default stand in one line, for their names
BETWEEN_COLUMNS, BETWEEN_ROWS = 0.8, 1.0
FINALS = ("logit", "direction", "score")
PARTS = {
    "resid-pre": (0, "stream"), "z": (2, "heads"), "attn-out": (3, "attention"), "mlp-in": (4, "MLP"),
    "mlp-out": (5, "MLP output"), "state": (6, "state"), "resid-post": (7, "stream after"),
}  # fmt: skip
_OTHER = (1, "components")

Row = tuple[int, int, int]  # tokens, layers or targets; layer; part of a layer


@dataclass(frozen=True)
class Layout:
    """A picture of nodes.

    Args:
        x: of each node.
        y: of each node.
        column: of each node, as a number.
        row: of each node, as a number; 0 is the lowest.
        columns: position (None: nodes of no position), middle and width of each column, from the left.
        rows: label, middle and height of each row, from the bottom.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    column: tuple[int, ...]
    row: tuple[int, ...]
    columns: tuple[tuple[int | None, float, float], ...]
    rows: tuple[tuple[str, float, float], ...]


def layout(graph: FeatureGraph, order: Sequence[float]) -> Layout:
    """Places of all nodes; within a cell those of larger ``order`` come first, units and tokens in their own order."""
    keys = _rows(graph.nodes)
    rows = {key: i for i, key in enumerate(sorted(set(keys)))}
    positions = sorted({-1 if node.position is None else node.position for node in graph.nodes} | _prompt(graph))
    columns = {position: i for i, position in enumerate(positions)}
    at = [
        (rows[key], columns[-1 if n.position is None else n.position]) for key, n in zip(keys, graph.nodes, strict=True)
    ]
    finals = Counter(cell for cell, key in zip(at, keys, strict=True) if key[0] == 2)
    across, high = _sizes(Counter(at) - finals, len(rows), len(columns))
    # Targets may need more room; other nodes stand in every column as they would without them.
    wide = list(across)
    for (row, column), n in finals.items():
        wide[column] = max(wide[column], min(n, ONE_LINE))
        high[row] = max(high[row], -(-n // wide[column]))
    middles, ends = _stacked(wide, BETWEEN_COLUMNS), _stacked(high, BETWEEN_ROWS)
    cells = defaultdict[tuple[int, int], list[int]](list)
    kinds = [node.kind for node in graph.nodes]
    for i in sorted(range(len(at)), key=lambda i: (0.0 if kinds[i] in ("unit", "token") else -order[i], i)):
        cells[at[i]].append(i)
    x, y = [0.0] * len(at), [0.0] * len(at)
    for (row, column), members in cells.items():
        width = wide[column] if (row, column) in finals else across[column]
        for i, (aside, up) in zip(members, _packed(len(members), width), strict=True):
            x[i], y[i] = middles[column] + aside, ends[row] + up
    return Layout(
        tuple(x), tuple(y), tuple(column for _, column in at), tuple(row for row, _ in at),
        tuple((None if p < 0 else p, middles[i], float(wide[i])) for p, i in columns.items()),
        tuple((label, ends[rows[key]], float(high[rows[key]])) for key, label in _labels(rows).items()),
    )  # fmt: skip


def part_name(node: FeatureNode) -> str:
    """Which part of its layer a node is in, as words."""
    return PARTS.get(node.site.partition(".")[0], _OTHER)[1]


def _rows(nodes: Sequence[FeatureNode]) -> list[Row]:
    """The row of each node; outputs of an MLP are in the row of its latents, biases in one that others are in."""
    # What the unembedding adds is no layer of the model, so it stands beside the logits.
    beyond = {node.layer for node in nodes if node.kind in FINALS and node.name.startswith("logits.")}
    beyond -= {node.layer for node in nodes if node.kind in ("latent", "unit")}
    keys = [(2, 0, 0) if n.kind in ("error", "bias") and n.layer in beyond else _key(n) for n in nodes]
    solid = {key for key, node in zip(keys, nodes, strict=True) if node.kind not in ("error", "bias")}
    found = list[Row]()
    for key, node in zip(keys, nodes, strict=True):
        if node.kind in ("error", "bias") and key not in solid:
            inputs = (1, node.layer, PARTS["mlp-in"][0])
            key = inputs if key[2] == PARTS["mlp-out"][0] else key
        found.append(key)
    solid = {key for key, node in zip(found, nodes, strict=True) if node.kind != "bias"}
    layers = {layer: (group, layer, part) for group, layer, part in sorted(solid, reverse=True) if group == 1}
    return [
        layers.get(node.layer, key) if node.kind == "bias" and key not in solid else key
        for key, node in zip(found, nodes, strict=True)
    ]


def _key(node: FeatureNode) -> Row:
    if node.kind in ("token", "position"):
        return (0, 0, 0)
    if node.kind in FINALS:
        return (2, 0, 0)
    return (1, node.layer, PARTS.get(node.site.partition(".")[0], _OTHER)[0])


def _labels(rows: dict[Row, int]) -> dict[Row, str]:
    several = Counter(layer for group, layer, _ in rows if group == 1)
    names = dict([*PARTS.values(), _OTHER])
    return {
        key: {0: "input", 2: "output"}.get(key[0])
        or (f"layer {key[1]} {names[key[2]]}" if several[key[1]] > 1 else f"layer {key[1]}")
        for key in rows
    }


def _prompt(graph: FeatureGraph) -> set[int]:
    """Positions that get a column even where they have no node."""
    used = any(node.position is not None for node in graph.nodes)
    return set(range(len(graph.tokens))) if used and len(graph.tokens) <= 200 else set()


def _sizes(counts: Counter[tuple[int, int]], n_rows: int, n_columns: int) -> tuple[list[int], list[int]]:
    """Nodes across each column and lines of each row, so that the picture is about as wide as it should be."""
    best: tuple[float, list[int], list[int]] | None = None
    for lines in range(1, math.isqrt(max(counts.values(), default=1)) * 3 + 2):
        wide, high = [1] * n_columns, [1] * n_rows
        for (_, column), n in counts.items():
            wide[column] = max(wide[column], -(-n // lines))
        for (row, column), n in counts.items():
            high[row] = max(high[row], -(-n // wide[column]))
        width, height = sum(wide) + BETWEEN_COLUMNS * n_columns, sum(high) + BETWEEN_ROWS * n_rows
        off = abs(math.log(width / height / SHAPE))
        if best is None or off < best[0]:
            best = off, wide, high
    assert best is not None
    return best[1], best[2]


def _stacked(sizes: Sequence[int], between: float) -> list[float]:
    """The middle of each stretch, one after the other."""
    found, end = list[float](), 0.0
    for size in sizes:
        found.append(end + size / 2)
        end += size + between
    return found


def _packed(n: int, across: int) -> list[tuple[float, float]]:
    """Offsets of n nodes from the middle of their cell, line by line from the top."""
    lines = [min(across, n - first) for first in range(0, n, across)]
    return [(i - (size - 1) / 2, (len(lines) - 1) / 2 - line) for line, size in enumerate(lines) for i in range(size)]
