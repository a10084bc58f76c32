"""Cytoscape JSON, for Cytoscape desktop and Cytoscape.js."""

from __future__ import annotations

import json

from circuitkit.circuit import Circuit
from circuitkit.exporters.base import exporter
from circuitkit.exporters.table import table_of
from circuitkit.schema import jsonable


@exporter("cyjs")
def cyjs(circuit: Circuit) -> str:
    """Cytoscape JSON for Cytoscape desktop and Cytoscape.js; scores that are not finite are null."""
    table = table_of(circuit)
    nodes = [
        # Screens count downwards; networkx's reader wants a value.
        {
            "data": {**row, "name": row["label"], "value": row["id"]},
            "position": {"x": row["x"], "y": -float(row["y"])},
        }
        for row in table.nodes
    ]
    edges = [{"data": {**row, "name": row["id"], "interaction": row["kind"]}} for row in table.edges]
    document = {
        "format_version": "1.0",
        "generated_by": "circuitkit",
        "data": {"name": "circuit", **table.facts},
        "elements": {"nodes": nodes, "edges": edges},
    }
    return json.dumps(jsonable(document), allow_nan=False, indent=1) + "\n"
