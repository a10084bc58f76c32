"""A circuit as boxes, curves and places: what figures, exporters and the viewer all draw.

A head's q, k and v readers are drawn at the head's own box. A reader that feeds several heads (a key/value head
under grouped-query attention) has a box of its own, tied to its heads by inner links. The input is at the bottom.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np

from circuitkit.circuit import Circuit
from circuitkit.functional.layout import in_columns, layered_x, wrap_rows
from circuitkit.graph import Graph, Node

# Blue and orange stay apart under every common kind of colour blindness; fills are pale so that labels can be read.
PALETTE = {
    "positive": "#0b6cb8",
    "negative": "#d95f02",
    "neutral": "#8a8f98",
    "random": "#6b7280",
    "text": "#1f2430",
    "muted": "#667085",
    "rule": "#e4e7ec",
    "blank": "#eceef1",
    "input": "#dfe3ea",
    "logits": "#dfe3ea",
    "head": "#e6ddf4",
    "kv": "#f4effb",
    "mlp": "#d5ecd9",
    "neuron": "#e9f5e1",
    "unit": "#fdf0c4",
    "gate": "#fbe0d3",
    "latent": "#fbdbe8",
    "error": "#f1f1f1",
}
KIND_NAMES = {
    "input": "input",
    "head": "attention head",
    "kv": "key/value head",
    "mlp": "MLP",
    "neuron": "MLP neurons",
    "unit": "unit",
    "gate": "gate",
    "latent": "latent",
    "error": "error",
    "logits": "output",
}
WIDEST_ROW = 24
_SAME_LAYER, _NEXT_LAYER, _WRAPPED, _ARCS = 0.9, 1.3, 0.7, 0.6


@dataclass(frozen=True)
class Box:
    """A node as drawn: its name, kind and layer, its line (0 at the bottom) and its place, in node distances.

    A node of a graph with positions stands in the column of its span, whose name its label leaves out.
    """

    name: str
    kind: str
    layer: int
    line: int
    x: float
    y: float
    span: str | None = None

    @property
    def label(self) -> str:
        """What is written in the box."""
        return self.name.removesuffix(f"@{self.span}")


@dataclass(frozen=True)
class Curve:
    """An edge as drawn, between two boxes by their numbers; ``bend`` is the control point of a quadratic curve."""

    name: str
    source: int
    target: int
    reader: str
    score: float
    stderr: float
    bend: tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """Boxes, curves (strongest first), inner links; label and height of each layer, label and middle of each span."""

    boxes: tuple[Box, ...]
    curves: tuple[Curve, ...]
    inner: tuple[tuple[int, int], ...]
    layers: tuple[tuple[str, float], ...]
    spans: tuple[tuple[str, float], ...] = ()

    @property
    def width(self) -> float:
        """Node distances from the leftmost to the rightmost box."""
        return max((box.x for box in self.boxes), default=0.0) - min((box.x for box in self.boxes), default=0.0)

    @property
    def height(self) -> float:
        """Node distances from the lowest to the highest box."""
        return max((box.y for box in self.boxes), default=0.0)


def draw(circuit: Circuit, *, most: int | None = None) -> Drawing:
    """Place the boxes of a circuit and route its edges; with ``most``, only that many of the strongest edges.

    >>> from circuitkit.graph import chain_graph
    >>> drawing = draw(Circuit.from_edges(chain_graph(1), ["input->m0", "m0->logits"]))
    >>> [(box.name, box.y) for box in drawing.boxes]
    [('input', 0.0), ('m0', 1.3), ('logits', 2.6)]
    """
    order = np.argsort(-strength(circuit), kind="stable")[:most]
    src, dst = circuit.src.numpy()[order], circuit.dst.numpy()[order]
    owner, shared = _owners(circuit.graph)
    found: dict[str, Node] = {}
    for s, d in zip(src.tolist(), dst.tolist(), strict=True):
        found.setdefault(circuit.graph.sources[s], circuit.graph.source_nodes[s])
        found.setdefault(*owner[d])
    names = sorted(found, key=lambda name: (found[name].stage, name not in shared, found[name].index or 0))
    number = {name: i for i, name in enumerate(names)}
    ends = np.array(
        [[number[circuit.graph.sources[s]], number[owner[d][0]]] for s, d in zip(src, dst, strict=True)],
        dtype=int,
    ).reshape(-1, 2)
    spans = [span for span in dict.fromkeys(node.span for node in circuit.graph.source_nodes) if span is not None]
    column = np.array([spans.index(str(found[name].span)) for name in names]) if spans and names else None
    boxes = _place([found[name] for name in names], names, shared, ends, strength(circuit)[order], column)
    places = {span: [box.x for box in boxes if box.span == span] for span in spans}
    middles = tuple((span, (min(x) + max(x)) / 2) for span, x in places.items() if x)
    curves = _curves(circuit, order, ends, boxes)
    return Drawing(boxes, curves, _inner(circuit.graph, number), _layer_labels(boxes), middles)


def strength(circuit: Circuit) -> np.ndarray:
    """Magnitude of each edge's score; 0 where the score is not finite."""
    return np.nan_to_num(np.abs(circuit.score.detach().double().cpu().numpy()), nan=0.0, posinf=0.0, neginf=0.0)


def effect_names(circuit: Circuit) -> tuple[str, str]:
    """What the colours of positive and negative scores mean; a method without signs has one meaning."""
    signed = circuit.scores.signed if circuit.scores is not None else circuit.meta.get("signed", True)
    return ("supports the behaviour", "opposes the behaviour") if signed else ("magnitude, no sign", "below zero")


def headline(circuit: Circuit) -> tuple[str, str]:
    """Two lines that say what a circuit is: task, method and model; then its size and faithfulness."""
    scores = circuit.scores
    known = {} if scores is None else {**scores.provenance, "method": scores.method}
    known.update(circuit.meta)
    said = [str(known[key]) for key in ("task", "method", "model") if known.get(key)]
    size = f"{len(circuit):,} of {circuit.graph.n_edges:,} edges"
    result = circuit.result
    if result is None or result.faithfulness is None:
        return visible(" · ".join(said)) or "circuit", size
    tail = f" · faithfulness {result.faithfulness:z.2f}"
    if result.faithfulness_interval is not None:
        tail += " [{:z.2f}, {:z.2f}]".format(*result.faithfulness_interval)
    if result.random_faithfulness is not None:
        tail += f" · random circuits {result.random_faithfulness:z.2f}"
    return visible(" · ".join(said)) or visible(result.task), size + tail


def visible(text: str) -> str:
    """Text without characters that files cannot hold or eyes cannot see: controls, lone surrogates, bidi marks.

    >>> visible("a\\x00b\\nc")
    'a␀b⏎c'
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "⏎"
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    unseen = unicodedata.category(character) in ("Cc", "Cs") or code in (0x2028, 0x2029) or code & 0xFFFE == 0xFFFE
    if unseen or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character


def _owners(graph: Graph) -> tuple[list[tuple[str, Node]], set[str]]:
    """The box that each reader is drawn at, and the names of the boxes that feed several writers."""
    owners: list[tuple[str, Node]] = []
    shared: set[str] = set()
    for node, row in zip(graph.destination_nodes, graph.feeds, strict=True):
        fed = row.nonzero().flatten().tolist()
        if len(fed) == 1:
            owners.append((graph.sources[fed[0]], graph.source_nodes[fed[0]]))
        else:
            name = node.name.removesuffix(f"<{node.slot}>") if node.slot else node.name
            owners.append((name, node))
            if fed and name not in graph.sources:
                shared.add(name)
    return owners, shared


def _place(
    nodes: list[Node],
    names: list[str],
    shared: set[str],
    ends: np.ndarray,
    weight: np.ndarray,
    column: np.ndarray | None,
) -> tuple[Box, ...]:
    levels = sorted({(node.stage, name not in shared) for node, name in zip(nodes, names, strict=True)})
    row = np.array(
        [levels.index((node.stage, name not in shared)) for node, name in zip(nodes, names, strict=True)],
        dtype=int,
    )
    has_heads = column is None and any(node.kind == "head" for node in nodes)
    aside = np.array([has_heads and node.kind == "mlp" for node in nodes], dtype=bool)
    x = np.zeros(len(nodes))
    inside = np.flatnonzero(~aside)
    kept = ~(aside[ends].any(1)) if len(ends) else np.zeros(0, dtype=bool)
    renumbered = np.cumsum(~aside) - 1
    x[inside] = layered_x(row[inside], renumbered[ends[kept]], weight[kept])
    x, line = wrap_rows(x, row, WIDEST_ROW) if column is None else in_columns(x, row, column)
    # A column of their own keeps the MLPs out of the way of the edges between heads.
    x[aside] = (np.abs(x[inside]).max() if len(inside) else 0.0) + 1.3
    height, y, previous = 0.0, np.zeros(len(nodes)), None
    places = sorted(set(zip(row.tolist(), line.tolist(), strict=True)))
    arched = set(row[ends[row[ends[:, 0]] == row[ends[:, 1]]]].ravel().tolist())
    for place in places:
        here = (row == place[0]) & (line == place[1])
        layer = nodes[int(np.flatnonzero(here)[0])].layer
        if previous is not None:
            same_row, same_layer = previous[0] == place[0], previous[1] == layer
            height += _WRAPPED if same_row else _SAME_LAYER if same_layer else _NEXT_LAYER
            height += _ARCS if place[0] in arched or previous[0] in arched else 0.0
        y[here], previous = height, (place[0], layer)
    kinds = ["kv" if name in shared else node.kind for node, name in zip(nodes, names, strict=True)]
    return tuple(
        Box(name, kind, node.layer, places.index((at, part)), left, round(up, 6), node.span)
        for name, kind, node, at, part, left, up in zip(
            names, kinds, nodes, row.tolist(), line.tolist(), x.tolist(), y.tolist(), strict=True
        )
    )


def _curves(circuit: Circuit, order: np.ndarray, ends: np.ndarray, boxes: tuple[Box, ...]) -> tuple[Curve, ...]:
    names, readers = circuit.edge_names(), circuit.graph.destinations
    score = circuit.score.tolist()
    stderr = [math.nan] * len(circuit) if circuit.stderr is None else circuit.stderr.tolist()
    dst = circuit.dst.tolist()
    pairs = [(s, t) for s, t in ends.tolist()]
    several, seen = Counter(pairs), Counter[tuple[int, int]]()
    curves = []
    for i, (s, t) in zip(order.tolist(), pairs, strict=True):
        # q, k and v edges between the same two boxes fan out, or they would hide each other.
        fan = 0.3 * (seen[s, t] - (several[s, t] - 1) / 2)
        seen[s, t] += 1
        curves.append(Curve(names[i], s, t, readers[dst[i]], score[i], stderr[i], _bend(boxes[s], boxes[t], fan)))
    return tuple(curves)


def _bend(source: Box, target: Box, fan: float) -> tuple[float, float]:
    """Control point: straight between neighbouring lines, bowed outwards past the lines in between."""
    middle = ((source.x + target.x) / 2, (source.y + target.y) / 2)
    dx, dy = target.x - source.x, target.y - source.y
    if source.line == target.line:
        return middle[0], middle[1] + math.copysign(0.35 + 0.22 * abs(dx) + fan, dx)
    bow = fan
    if abs(source.line - target.line) > 1:
        bow += math.copysign(min(0.16 * abs(dy) + 0.1, 1.4), middle[0] + 1e-9)
    length = math.hypot(dx, dy)
    return middle[0] + bow * abs(dy) / length, middle[1] - bow * dx / length * math.copysign(1, dy)


def _inner(graph: Graph, number: dict[str, int]) -> tuple[tuple[int, int], ...]:
    links: set[tuple[int, int]] = set()
    for reader, writer in graph.feeds.nonzero().tolist():
        node = graph.destination_nodes[reader]
        name = node.name.removesuffix(f"<{node.slot}>") if node.slot else node.name
        if name in number and graph.sources[writer] in number and name != graph.sources[writer]:
            links.add((number[name], number[graph.sources[writer]]))
    return tuple(sorted(links))


def _layer_labels(boxes: tuple[Box, ...]) -> tuple[tuple[str, float], ...]:
    labels = []
    for layer in sorted({box.layer for box in boxes}):
        members = [box for box in boxes if box.layer == layer]
        kinds = {box.kind for box in members}
        text = "input" if kinds == {"input"} else "output" if kinds == {"logits"} else f"layer {layer}"
        labels.append((text, sum({box.line: box.y for box in members}.values()) / len({box.line for box in members})))
    return tuple(labels)
