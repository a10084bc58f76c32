"""GraphML, for Gephi, Cytoscape, yEd and igraph."""

from __future__ import annotations

import networkx as nx

from circuitkit.circuit import Circuit
from circuitkit.exporters.base import exporter
from circuitkit.exporters.table import table_of


@exporter("graphml")
def graphml(circuit: Circuit) -> str:
    """GraphML for Gephi, Cytoscape, yEd and igraph: ``weight`` is |score|, places are in ``x`` and ``y``."""
    lines = nx.generate_graphml(table_of(circuit).digraph, edge_id_from_attribute="id")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + "\n".join(lines) + "\n"
