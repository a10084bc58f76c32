"""A circuit as boxes, curves and places: what figures, exporters and the viewer all draw.

The input is at the bottom; spans of positions and windows of steps are columns. Which box each reader is drawn at, and
where boxes stand, is said in `circuitkit.arrangement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from circuitkit.arrangement import arrange
from circuitkit.circuit import Circuit
from circuitkit.functional import routes
from circuitkit.functional.text import visible as visible

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
    "cell": "#cdeaf0",
    "gate": "#fbe0d3",
    "layer": "#dfe6c9",
    "subspace": "#dcd6f7",
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
    "cell": "memory cell",
    "gate": "gate",
    "layer": "layer",
    "subspace": "subspace",
    "latent": "latent",
    "error": "error",
    "logits": "output",
}


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
    plan = arrange(circuit.graph, circuit.src.numpy()[order], circuit.dst.numpy()[order], strength(circuit)[order])
    boxes = tuple(
        # A reader that several heads share is no head.
        Box(name, "kv" if node.kind == "head" and lone else node.kind, node.layer, line, x, y, node.span)
        for name, node, lone, line, x, y in zip(
            plan.names, plan.nodes, plan.lone, plan.line.tolist(), plan.x.tolist(), plan.y.tolist(), strict=True
        )
    )
    places = {span: [box.x for box in boxes if box.span == span] for span in plan.spans}
    steps = circuit.graph.is_recurrent
    middles = tuple((_steps(span) if steps else span, (min(x) + max(x)) / 2) for span, x in places.items() if x)
    curves = _curves(circuit, order, plan.ends, boxes)
    return Drawing(boxes, curves, plan.inner, _layer_labels(boxes), middles)


def strength(circuit: Circuit) -> np.ndarray:
    """Magnitude of each edge's score; 0 where the score is not finite."""
    return np.nan_to_num(np.abs(circuit.score.detach().double().cpu().numpy()), nan=0.0, posinf=0.0, neginf=0.0)


def effect_names(circuit: Circuit) -> tuple[str, str]:
    """What the colours of positive and negative scores mean; a method without signs has one meaning."""
    signed = circuit.scores.signed if circuit.scores is not None else circuit.meta.get("signed", True)
    return ("supports the behaviour", "opposes the behaviour") if signed else ("magnitude, no sign", "below zero")


def inner_name(drawing: Drawing) -> str:
    """What inner links mean."""
    return "key/value head of" if any(drawing.boxes[s].kind == "kv" for s, _ in drawing.inner) else "is an input of"


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


def _steps(window: str) -> str:
    """A window's name as a heading."""
    first, _, last = window.partition("-")
    return f"steps {first}–{last}" if last else f"step {first}"


def _curves(circuit: Circuit, order: np.ndarray, ends: np.ndarray, boxes: tuple[Box, ...]) -> tuple[Curve, ...]:
    names, readers = circuit.edge_names(), circuit.graph.destinations
    score = circuit.score.tolist()
    stderr = [math.nan] * len(circuit) if circuit.stderr is None else circuit.stderr.tolist()
    dst = circuit.dst.tolist()
    pairs = [(s, t) for s, t in ends.tolist()]
    curves = []
    for i, (s, t), fan in zip(order.tolist(), pairs, routes.fans(pairs), strict=True):
        a, b = boxes[s], boxes[t]
        bend = routes.bend((a.x, a.y), (b.x, b.y), (a.line, b.line), fan)
        curves.append(Curve(names[i], s, t, readers[dst[i]], score[i], stderr[i], bend))
    return tuple(curves)


def _layer_labels(boxes: tuple[Box, ...]) -> tuple[tuple[str, float], ...]:
    labels = []
    for layer in sorted({box.layer for box in boxes}):
        members = [box for box in boxes if box.layer == layer]
        kinds = {box.kind for box in members}
        text = "input" if kinds == {"input"} else "output" if kinds == {"logits"} else f"layer {layer}"
        labels.append((text, sum({box.line: box.y for box in members}.values()) / len({box.line for box in members})))
    return tuple(labels)
