"""The nodes and edges of `Circuit.to_networkx` as rows that every format can hold.

What breaks other tools' readers is settled here once: a column has one type, ids are unique texts over nodes and
edges, characters that XML forbids are shown in a visible form, ``weight`` is never negative, and places come from
the shared drawing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx

from circuitkit.circuit import Circuit
from circuitkit.drawing import Drawing, draw, visible
from circuitkit.graph import Graph

Cell = str | int | float | bool
Row = dict[str, Cell]

SCALE = 100.0  # layout units of other tools per node distance
_SLOT_OFFSET, _SLOTS_WIDTH = 0.3, 0.9


@dataclass(frozen=True)
class Table:
    """Rows of nodes and edges, and facts about the whole graph; every column has one type."""

    nodes: list[Row]
    edges: list[Row]
    facts: Row

    @cached_property
    def digraph(self) -> nx.DiGraph:
        """The rows as a networkx graph keyed by the unique ids."""
        graph = nx.DiGraph()
        graph.graph.update(self.facts)
        for row in self.nodes:
            graph.add_node(row["id"], **{key: value for key, value in row.items() if key != "id"})
        for row in self.edges:
            graph.add_edge(
                row["source"],
                row["target"],
                **{k: v for k, v in row.items() if k not in ("source", "target")},
            )
        return graph


def table_of(circuit: Circuit) -> Table:
    """Rows for a circuit, in a fixed order.

    >>> from circuitkit.graph import chain_graph
    >>> table = table_of(Circuit.from_edges(chain_graph(1), ["input->m0", "m0->logits"]))
    >>> [(row["id"], row["weight"]) for row in table.edges]
    [('input->m0', 1.0), ('m0->logits', 1.0)]
    """
    network = circuit.to_networkx()
    place = _places(draw(circuit), circuit.graph)
    taken: set[str] = set()
    ids = {name: _unique(visible(name), taken) for name in network}
    nodes = [
        {"id": ids[name], **data, "x": SCALE * place[name][0], "y": SCALE * place[name][1]}
        for name, data in network.nodes(data=True)
    ]
    edges = []
    for source, target, data in network.edges(data=True):
        finite = math.isfinite(data["score"])
        edges.append(
            {
                **data,
                "id": _unique(visible(data["id"]), taken),
                "source": ids[source],
                "target": ids[target],
                "weight": data["weight"] if finite else 0.0,
                "nonfinite": not finite,
            }
        )
    facts = {key: value for key, value in circuit.meta.items() if isinstance(value, str | int | float)}
    facts |= {"n_edges": len(circuit), "n_possible_edges": circuit.graph.n_edges}
    if circuit.result is not None and circuit.result.faithfulness is not None:
        facts["faithfulness"] = circuit.result.faithfulness
    return Table(_one_type(nodes), _one_type(edges, drop=_useless(edges)), _one_type([facts])[0])


def _useless(edges: list[Row]) -> set[str]:
    """Columns that say nothing here: no error is known, or every score is finite."""
    real = [row for row in edges if row["kind"] != "internal"]
    no_error = all(math.isnan(float(row["stderr"])) for row in real)
    return ({"stderr"} if no_error else set()) | (set() if any(row["nonfinite"] for row in edges) else {"nonfinite"})


def _one_type(rows: list[Any], drop: Iterable[str] = ()) -> list[Row]:
    """Give every column one of the types text, integer, number or flag."""
    columns = {key: None for row in rows for key in row if key not in drop}
    done: list[Row] = [{} for _ in rows]
    for column in columns:
        values = [row[column] for row in rows if column in row]
        if all(isinstance(value, bool) for value in values):
            kind: type = bool
        elif all(isinstance(value, int) and abs(value) < 2**63 for value in values):
            kind = int
        else:
            kind = float if all(isinstance(value, int | float) for value in values) else str
        for row, out in zip(rows, done, strict=True):
            if column in row:
                out[visible(str(column))] = visible(str(row[column])) if kind is str else kind(row[column])
    return done


def _unique(text: str, taken: set[str]) -> str:
    """The text, with a number behind it if two names look the same once made visible."""
    candidate, number = text, 2
    while candidate in taken:
        candidate, number = f"{text}~{number}", number + 1
    taken.add(candidate)
    return candidate


def _places(drawing: Drawing, graph: Graph) -> dict[str, tuple[float, float]]:
    """Where each writer and reader stands; the readers of a head (q, k, v) or a unit sit side by side below it."""
    place = {box.name: (box.x, box.y) for box in drawing.boxes}
    slots = {node.slot for node in graph.destination_nodes if node.slot}
    order = {slot: i for i, slot in enumerate(sorted(slots, key=lambda slot: ("qkv".find(slot), slot)))}
    for curve in drawing.curves:
        if curve.reader not in place:
            box = drawing.boxes[curve.target]
            slot = graph.destination_nodes[graph.destinations.index(curve.reader)].slot
            across = 0.0 if slot is None else order[slot] - (len(order) - 1) / 2
            apart = min(_SLOT_OFFSET, _SLOTS_WIDTH / len(order)) if order else 0.0
            place[curve.reader] = (box.x + apart * across, box.y - _SLOT_OFFSET)
    return place
