"""Attribution graphs as GraphML, for Gephi, Cytoscape, yEd and igraph."""

from __future__ import annotations

from pathlib import Path

import networkx as nx

from circuitkit.atomic import write_atomic
from circuitkit.features.graph import FeatureGraph
from circuitkit.functional.text import visible


def write_feature_graphml(graph: FeatureGraph, path: str | Path) -> Path:
    """Write an attribution graph as GraphML: ``weight`` is |effect|, ``effect`` has its sign, ``label`` is the name.

    Raises:
        FormatError: if the file cannot be written.
    """
    network = graph.to_networkx()
    ids = {name: f"n{i}" for i, name in enumerate(network)}
    drawn = nx.DiGraph(model=visible(graph.model), tokens=" ".join(map(str, graph.tokens.tolist())))
    for name, fields in network.nodes(data=True):
        shown = {key: visible(value) if isinstance(value, str) else value for key, value in fields.items()}
        drawn.add_node(ids[name], label=visible(name), **shown)
    for source, target, effect in network.edges(data="weight"):
        drawn.add_edge(ids[source], ids[target], weight=abs(effect), effect=effect)
    return write_atomic(path, '<?xml version="1.0" encoding="utf-8"?>\n' + "\n".join(nx.generate_graphml(drawn)) + "\n")
