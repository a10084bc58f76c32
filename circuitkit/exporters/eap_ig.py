"""The JSON of EAP-IG and MIB: every possible edge of a transformer with its score and whether it is in the circuit.

Their nodes are query heads. Under grouped-query attention our edge to ``a3.kv1<k>`` becomes one edge to each of the n
heads of the group, with 1/n of the score: the n edges together stand for the same change of the metric.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from circuitkit.circuit import Circuit
from circuitkit.errors import FormatError
from circuitkit.exporters.base import exporter
from circuitkit.graph import Graph
from circuitkit.schema import parse_json
from circuitkit.scores import Scores


@exporter("eap-ig", "eap-ig.json")
def eap_ig(circuit: Circuit) -> str:
    """The JSON of EAP-IG and MIB; edges outside the circuit keep their score if the ranking is known, else 0.

    Raises:
        FormatError: if the graph is not that of a transformer with heads.
    """
    graph = circuit.graph
    cfg = _config(circuit)
    values = torch.zeros(graph.mask.shape, dtype=torch.float64)
    if circuit.scores is not None:
        values = circuit.scores.values.detach().cpu().double().clone()
    values[circuit.src, circuit.dst] = circuit.score.detach().cpu().double()
    if not values[graph.mask].isfinite().all():
        raise FormatError("a score is not finite, and EAP-IG's JSON cannot hold that; score again without NaN")
    chosen, score = circuit.mask.tolist(), values.tolist()
    edges: dict[str, dict[str, Any]] = {}
    used: set[str] = set()
    for row, column, name, share in ungrouped_edges(graph):
        inside = chosen[row][column]
        edges[name] = {"score": score[row][column] * share, "in_graph": inside}
        if inside:
            used |= {graph.sources[row], name.partition("->")[2].partition("<")[0]}
    names = [*graph.sources, *(graph.destinations[d] for d in graph.sinks.nonzero().flatten().tolist())]
    nodes = {name: {"in_graph": name in used} for name in names}
    return json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges}, allow_nan=False, indent=1) + "\n"


def read_eap_ig(path: str | Path, graph: Graph) -> Circuit:
    """The circuit in a JSON file of EAP-IG or MIB, on the graph of the model that it was found in.

    An edge into a key/value head has the sum of its query heads' scores, and is in the circuit if any of them is.

    Raises:
        FormatError: if the file is missing, is not such a file, or names edges that the graph does not have.
    """
    try:
        data = parse_json(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"could not read {path}: {error}; give an EAP-IG JSON file") from error
    found = data.get("edges") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not all(isinstance(edge, dict) for edge in found.values()):
        raise FormatError(f"{path} is not an EAP-IG file: expected an object 'edges' of objects")
    values, chosen = torch.zeros(graph.mask.shape), torch.zeros_like(graph.mask)
    known = {name: (row, column) for row, column, name, _ in ungrouped_edges(graph)}
    for name, edge in found.items():
        if name not in known:
            raise FormatError(
                f"{path} has the edge {name[:80]!r}, which this graph does not; give the graph of its model"
            )
        score, inside = edge.get("score", float(bool(edge.get("in_graph")))), edge.get("in_graph")
        if not isinstance(inside, bool) or isinstance(score, bool) or not isinstance(score, int | float):
            raise FormatError(f"{path}: edge {name!r} needs in_graph (true or false) and a numeric score, got {edge}")
        values[known[name]] += score
        chosen[known[name]] |= inside
    scores = Scores(values, graph, "eap-ig file")
    src, dst = chosen.nonzero(as_tuple=True)
    order = torch.sort(values[src, dst].abs(), descending=True, stable=True).indices
    return Circuit(graph, src[order], dst[order], values[src, dst][order], scores=scores)


def ungrouped_edges(graph: Graph) -> Iterator[tuple[int, int, str, float]]:
    """Row and column of every possible edge, its name among query heads, and its share of the score.

    >>> from circuitkit.graph import chain_graph
    >>> next(ungrouped_edges(chain_graph(1)))
    (0, 0, 'input->m0', 1.0)
    """
    fed = [row.nonzero().flatten().tolist() for row in graph.feeds]
    for row, column in graph.mask.nonzero().tolist():
        node = graph.destination_nodes[column]
        slot = f"<{node.slot}>" if node.slot else ""
        readers = [graph.sources[writer] + slot for writer in fed[column]] or [node.name]
        for reader in readers:
            yield row, column, f"{graph.sources[row]}->{reader}", 1 / len(readers)


def _config(circuit: Circuit) -> dict[str, Any]:
    graph = circuit.graph
    nodes = (*graph.source_nodes, *graph.destination_nodes)
    if any(node.span is not None for node in nodes):
        raise FormatError("EAP-IG's JSON has no positions, and this graph does; export to graphml or json")
    strangers = sorted({node.kind for node in nodes} - {"input", "head", "kv", "mlp", "logits"})
    layers = [node.layer for node in graph.source_nodes if node.kind == "head"]
    if strangers or not layers:
        what = f"nodes of kind {', '.join(strangers)}" if strangers else "no attention heads"
        raise FormatError(
            f"EAP-IG's JSON holds transformers only, and this graph has {what}; export to graphml or json"
        )
    counts = {layers.count(layer) for layer in set(layers)}
    if len(counts) > 1:
        raise FormatError("EAP-IG's JSON needs the same number of heads in every layer; export to graphml or json")
    attention_to_mlp = any(
        graph.mask[s, d]
        for s, source in enumerate(graph.source_nodes)
        for d, reader in enumerate(graph.destination_nodes)
        if source.kind == "head" and reader.kind == "mlp" and source.layer == reader.layer
    )
    has_mlp = any(node.kind == "mlp" for node in graph.source_nodes)
    return {
        "n_layers": max(node.layer for node in graph.destination_nodes if node.kind == "logits"),
        "n_heads": counts.pop(),
        "parallel_attn_mlp": has_mlp and not attention_to_mlp,
        "d_model": circuit.meta.get("d_model"),
    }
