"""Small graphs and circuits with known content, shared by the tests of files, formats, figures and the page."""

from __future__ import annotations

import torch

from circuitkit.circuit import Circuit
from circuitkit.graph import Graph, Node
from circuitkit.result import CurvePoint, Result
from circuitkit.scores import Scores


def transformer_graph(n_layers: int = 2, n_heads: int = 2, n_kv: int | None = None, mlp: bool = True) -> Graph:
    """The graph of a transformer; with ``n_kv`` fewer than ``n_heads``, keys and values are read by groups."""
    n_kv = n_kv or n_heads
    sources, destinations = [Node("input", "input", -1, 0)], []
    for layer in range(n_layers):
        stage = 2 * layer + 1
        sources += [Node(f"a{layer}.h{h}", "head", layer, stage, h) for h in range(n_heads)]
        for slot, count in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
            letter = "h" if count == n_heads else "kv"
            destinations += [Node(f"a{layer}.{letter}{i}<{slot}>", "head", layer, stage, i, slot) for i in range(count)]
        if mlp:
            sources.append(Node(f"m{layer}", "mlp", layer, stage + 1))
            destinations.append(Node(f"m{layer}", "mlp", layer, stage + 1))
    destinations.append(Node("logits", "logits", n_layers, 2 * n_layers + 1))
    mask = torch.tensor([[s.stage < d.stage for d in destinations] for s in sources])
    feeds = torch.tensor([[_feeds(d, s, n_heads // n_kv) for s in sources] for d in destinations])
    return Graph(tuple(sources), tuple(destinations), mask, feeds)


def recurrent_graph(units: int = 5) -> Graph:
    """Units that read the input and each other's last state: edges within a stage, and to oneself."""
    sources = (Node("input", "input", -1, 0), *(Node(f"l0.u{i}", "unit", 0, 1, i) for i in range(units)))
    destinations = (
        *(Node(f"l0.u{i}<n>", "gate", 0, 1, i, "n") for i in range(units)),
        Node("logits", "logits", 1, 2),
    )
    mask = torch.ones(units + 1, units + 1, dtype=torch.bool)
    mask[0, -1] = False
    feeds = torch.zeros(units + 1, units + 1, dtype=torch.bool)
    feeds[torch.arange(units), torch.arange(1, units + 1)] = True
    return Graph(sources, destinations, mask, feeds)


def scores_on(graph: Graph, *, seed: int = 0, method: str = "eap-ig") -> Scores:
    """Heavy-tailed random scores, as real ones are."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(graph.mask.shape, generator=draw) ** 3 * graph.mask
    stderr = torch.rand(graph.mask.shape, generator=draw) * graph.mask
    options = {"steps": 5, "where": "input"}
    return Scores(values, graph, method, options, stderr, n_examples=64, provenance={"model": "toy", "seconds": 0.5})


def circuit_on(graph: Graph, n: int, *, seed: int = 0) -> Circuit:
    """The strongest connected edges, with a result and meta data."""
    circuit = scores_on(graph, seed=seed).top(n)
    meta = {"model": "toy-gpt", "task": "gender-pronoun", "method": "eap-ig", "d_model": 16}
    return Circuit(**(vars_of(circuit) | {"meta": meta, "result": result_of(graph)}))


def vars_of(circuit: Circuit) -> dict[str, object]:
    """The fields of a circuit, for a changed copy."""
    names = ("graph", "src", "dst", "score", "stderr", "scores", "result", "meta")
    return {name: getattr(circuit, name) for name in names}


def result_of(graph: Graph, **changes: object) -> Result:
    """A plausible result with a full curve."""
    grid = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    points = tuple(
        CurvePoint(share, int(share * graph.n_edges), None if share < 0.002 else share**power, power < 0.3)
        for power in (0.25, 0.35)
        for share in grid
    )
    known = {
        "task": "gender-pronoun", "metric": "logit-diff", "corrupt_value": "counterfactual", "clean": 3.25,
        "corrupt": -2.5, "circuit": 2.75, "faithfulness": 0.91, "faithfulness_interval": (0.84, 0.97),
        "random_faithfulness": 0.07, "random_interval": (-0.02, 0.18), "n_edges": 100, "n_possible": graph.n_edges,
        "n_examples": 64, "curve_points": points, "cpr": 0.81, "cmd": 0.12, "log_area": 0.6, "seconds": 1.5, "seed": 3,
    }  # fmt: skip
    return Result(**(known | changes))


def _feeds(reader: Node, writer: Node, group: int) -> bool:
    if reader.kind != writer.kind or reader.layer != writer.layer or reader.kind == "logits":
        return False
    if reader.kind != "head":
        return True
    own = writer.index // group if ".kv" in reader.name else writer.index
    return own == reader.index
