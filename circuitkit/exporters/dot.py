"""DOT, for Graphviz. The places are ours: ``neato -n`` draws them as they are, ``dot`` makes its own."""

from __future__ import annotations

from circuitkit.circuit import Circuit
from circuitkit.drawing import PALETTE
from circuitkit.exporters.base import exporter
from circuitkit.exporters.table import Cell, table_of


@exporter("dot", "dot", "gv")
def dot(circuit: Circuit) -> str:
    """Graphviz DOT; ``neato -n -Tsvg`` keeps our places, ``dot -Tsvg`` lays out anew (slow above 2,000 edges)."""
    table = table_of(circuit)
    largest = max((float(row["weight"]) for row in table.edges), default=0.0) or 1.0
    lines = [
        "digraph circuit {",
        "  rankdir=BT;",
        '  node [shape=box, style="rounded,filled", fontname="sans-serif"];',
    ]
    for row in table.nodes:
        looks = {"label": row["label"], "fillcolor": PALETTE.get(str(row["kind"]), PALETTE["error"])}
        looks |= {"pos": f"{row['x']:.1f},{row['y']:.1f}", "kind": row["kind"], "layer": row["layer"]}
        lines.append(f"  {_quote(row['id'])} [{_attributes(looks)}];")
    for row in table.edges:
        if row["kind"] == "internal":
            looks = {"style": "dotted", "color": PALETTE["neutral"], "arrowhead": "none"}
        else:
            colour = PALETTE["negative" if float(row["score"]) < 0 else "positive"]
            looks = {"color": colour, "penwidth": f"{0.5 + 4 * float(row['weight']) / largest:.3f}"}
        looks |= {"id": row["id"], "kind": row["kind"], "slot": row["slot"], "score": row["score"]}
        lines.append(f"  {_quote(row['source'])} -> {_quote(row['target'])} [{_attributes(looks)}];")
    return "\n".join([*lines, "}", ""])


def _attributes(values: dict[str, Cell]) -> str:
    return ", ".join(f"{key}={_quote(value)}" for key, value in values.items())


def _quote(value: Cell) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
