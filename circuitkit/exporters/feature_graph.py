"""Feature graphs as files: JSON for viewers and for us, GraphML, the offline page, edges as CSV.

json      Neuronpedia, circuit-tracer and `read_graph_json`
graphml   Gephi, Cytoscape, yEd, igraph
html      the page of `circuitkit.viewer.feature_page`
csv       source, target, effect, share of what the target gets; one line for each edge
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

from circuitkit.atomic import write_atomic
from circuitkit.errors import FormatError
from circuitkit.exporters.feature_graphml import write_feature_graphml
from circuitkit.exporters.graph_json import draft_of, write_graph_json
from circuitkit.exporters.graph_json_read import read_graph_json
from circuitkit.features.graph import FeatureGraph
from circuitkit.functional.influence import normalised_rows
from circuitkit.functional.text import visible
from circuitkit.schema import to_json


def export_feature_graph(graph: FeatureGraph, path: str | Path, *, format: str | None = None) -> Path:
    """Write a feature graph; the format follows from the end of the file's name. Returns the path.

    Raises:
        FormatError: if the ending belongs to no format, the graph does not fit it, or the file cannot be written.

    >>> import tempfile, torch
    >>> from circuitkit.features.graph import FeatureNode
    >>> nodes = (FeatureNode("input@0", "token", -1, "resid-pre.0", 0, 5, 1.0, 0),
    ...          FeatureNode("logits.7@0", "logit", 1, "resid-pre.1", 0, 7, 0.9, 1))
    >>> graph = FeatureGraph(nodes, torch.tensor([1]), torch.tensor([[2.0, 0.0]]), torch.tensor([2.0]),
    ...                      torch.tensor([0.0, 1.0]), torch.tensor([5]), "toy")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_feature_graph(graph, Path(folder) / "toy.csv").read_text().splitlines()[1]
    'input@0,logits.7@0,2.0,1.0'
    """
    name = format or Path(path).suffix.lower().removeprefix(".")
    if name not in FORMATS:
        raise FormatError(
            f"no format for a feature graph in {Path(path).name!r}; name the file with one of "
            f"{', '.join(f'.{known}' for known in FORMATS)}, or give format= one of {', '.join(FORMATS)}"
        )
    return FORMATS[name](graph, path)


def export_graph_file(source: str | Path, path: str | Path, *, format: str | None = None) -> Path:
    """Write a graph file in another format, with the pins, groups and names that were saved in it where that has them.

    Raises:
        FormatError: as `export_feature_graph`, or if the file is no graph file.
    """
    from circuitkit.viewer.feature_page import page_of_file

    file, name = read_graph_json(source), format or Path(path).suffix.lower().removeprefix(".")
    if name == "html":
        return write_atomic(path, page_of_file(file))
    if name == "json":
        return write_graph_json(file.graph, path, slug=slug_of(path), scan=file.scan, view=file.view)
    return export_feature_graph(file.graph, path, format=format)


def slug_of(path: str | Path) -> str:
    """A graph's name from that of its file."""
    return re.sub(r"[^\w.-]+", "-", Path(path).name.removesuffix(".json"), flags=re.ASCII).strip("-.") or "graph"


def save_feature_graph(graph: FeatureGraph, path: str | Path) -> Path:
    """Write the JSON of `circuitkit.exporters.graph_json`, named by its file; texts that the graph lacks are numbers.

    Raises:
        FormatError: if a number is not finite, two nodes have one name, or the file cannot be written.
    """
    draft, content = draft_of(graph, slug=slug_of(path), scan=graph.model or "unknown")
    return write_atomic(path, to_json({**content, "links": list(draft.links())}))


def _html(graph: FeatureGraph, path: str | Path) -> Path:
    return graph.to_html(path)


def _csv(graph: FeatureGraph, path: str | Path) -> Path:
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(("source", "target", "effect", "share"))
    names = [visible(node.name) for node in graph.nodes]
    rows, columns = graph.effects.nonzero(as_tuple=True)
    shares = normalised_rows(graph.effects)[rows, columns]
    ends = zip(columns.tolist(), graph.targets[rows].tolist(), strict=True)
    for (source, target), effect, share in zip(
        ends, graph.effects[rows, columns].tolist(), shares.tolist(), strict=True
    ):
        table.writerow((names[source], names[target], effect, share))
    return write_atomic(path, lines.getvalue())


FORMATS: dict[str, Callable[[FeatureGraph, str | Path], Path]] = {
    "json": save_feature_graph,
    "graphml": write_feature_graphml,
    "html": _html,
    "csv": _csv,
}
