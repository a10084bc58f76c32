"""GEXF 1.2, for Gephi and Gephi Lite."""

from __future__ import annotations

import io

import networkx as nx

from circuitkit.circuit import Circuit
from circuitkit.drawing import PALETTE
from circuitkit.exporters.base import exporter
from circuitkit.exporters.table import table_of


@exporter("gexf")
def gexf(circuit: Circuit) -> bytes:
    """GEXF 1.2 for Gephi and Gephi Lite, with places and colours; ``weight`` is |score|, the sign is in ``score``."""
    graph = table_of(circuit).digraph.copy()
    graph.graph = {}  # GEXF has no attributes of the whole graph
    for _, data in graph.nodes(data=True):
        place = {"x": data["x"], "y": data["y"], "z": 0.0}
        data["viz"] = {
            "position": place,
            "color": _rgb(PALETTE.get(str(data["kind"]), PALETTE["error"])),
            "size": 10.0,
        }
    for _, _, data in graph.edges(data=True):
        sign = "neutral" if data["kind"] == "internal" else "negative" if data["score"] < 0 else "positive"
        data["viz"] = {"color": _rgb(PALETTE[sign])}
    out = io.BytesIO()
    nx.write_gexf(graph, out, version="1.2draft")
    return out.getvalue()


def _rgb(colour: str) -> dict[str, float]:
    return {"r": int(colour[1:3], 16), "g": int(colour[3:5], 16), "b": int(colour[5:7], 16), "a": 1.0}
