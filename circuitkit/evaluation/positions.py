"""What circuits with positions do: every edge is cut in the spans in which the circuit does not have it.

Edges within a span cost what they cost without positions. Edges inside attention cost one attention per block for each
span of queries in which any of them is cut (see `circuitkit.models.position_circuits`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError
from circuitkit.functional.stats import auroc, f1
from circuitkit.graph import Graph, Node
from circuitkit.methods.base import clean_and_corrupt, corrupt_writes, matrix_bytes, with_reference
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.models.neurons import group_size
from circuitkit.models.position_circuits import run_position_circuits
from circuitkit.models.views import check_view, group_in
from circuitkit.positions import Layout, is_positional
from circuitkit.tasks.base import Batch, Task
from circuitkit.tasks.spans import spans_of


def layout_for(model: Model, graph: Graph) -> Layout | None:
    """Where a graph's positions are, if it has any.

    The windows of a recurrent graph are the model's own: such a graph must be that of the model as it is viewed.

    Raises:
        GraphError: if the graph is not the model's; for another view of a recurrent model, it says which to make.
    """
    if model.family == "recurrent" or graph.is_recurrent:
        check_view(model, graph)
        return None
    layout = Layout.of(graph) if is_positional(graph) else None
    base = graph if layout is None else layout.base
    if not base.same_as(model.graph):
        raise GraphError(
            f"this circuit is not of {model.name}: its graph has other nodes; load the model it was found in"
        )
    return layout


def position_metrics(
    model: Model, task: Task, masks: Bool[Tensor, "circuit src dst"], layout: Layout, *, plan: Plan, corrupt_value: str
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "circuit batch"]]:
    """The metric of every example for the whole model and for each circuit with positions.

    Args:
        task: with the spans of the layout.
    """
    with torch.no_grad(), model.quiet(), plan.bar(len(task) * len(masks), "circuits") as bar:
        corrupt_of = corrupt_writes(model, task, plan, corrupt_value)

        def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch = with_reference(model, task, batch, run)
            clean = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
            values = []
            for group in masks.split(max(1, plan.rows(size(batch), model.device) // len(batch))):
                logits = run_position_circuits(model, run, corrupt, group, batch.positions, spans_of(batch), layout)
                many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(group)))
                values.append(task.metric(logits.flatten(0, 1), many).unflatten(0, (len(group), -1)))
                bar.update(len(group) * len(batch))
            return clean.cpu().double(), torch.cat(values).cpu().double()

        def size(batch: Batch) -> float:
            nodes = max(site.n for site in model.wiring.read_sites)
            return 2 * matrix_bytes(model, batch) + 15.0 * batch.clean.shape[1] * nodes * len(model.graph.sources)

        silent = replace(plan, progress=False)
        parts = list(silent.over(task, model.device, "", size, one_chunk))
    return torch.cat([clean for clean, _ in parts]), torch.cat([values for _, values in parts], 1)


def against_known(
    circuit: Circuit, known: tuple[str, ...] | None, layout: Layout | None
) -> dict[str, float | None] | None:
    """Precision, recall and F1 of a circuit, AUROC of its ranking; an edge with positions counts if it is in any span.

    None where nobody has said which nodes belong to the circuit: single neurons of MLPs, groups of recurrent units.
    """
    if known is None or group_size(circuit.graph):
        return None
    if circuit.graph.is_recurrent:
        if group_in(circuit.graph) != "unit" or any(node.kind == "subspace" for node in circuit.graph.source_nodes):
            return None
        circuit = without_windows(circuit)
    graph = circuit.graph if layout is None else layout.base
    truth, mask = graph.edge_mask(known), circuit.mask if layout is None else layout.collapse(circuit.mask)
    hits = int((mask & truth).sum())
    out: dict[str, float | None] = {
        "precision": hits / max(int(mask.sum()), 1),
        "recall": hits / max(int(truth.sum()), 1),
        "f1": f1(mask[graph.mask], truth[graph.mask]),
    }
    if circuit.scores is not None:
        values = circuit.scores.values.abs() if layout is None else layout.largest(circuit.scores.values)
        out["auroc"] = auroc(values[graph.mask], truth[graph.mask])
    return out


def without_windows(circuit: Circuit) -> Circuit:
    """A circuit of a recurrent graph with its time collapsed: an edge's score is the largest of all windows."""
    graph = circuit.graph
    if not is_positional(graph):
        return circuit
    (rows, sources), (columns, destinations) = (_bare(side) for side in (graph.source_nodes, graph.destination_nodes))
    shape = (len(sources), len(destinations))
    at, fed = rows[:, None] * shape[1] + columns, columns[:, None] * shape[0] + rows

    def largest(values: Tensor, where: Tensor, shape: tuple[int, int]) -> Tensor:
        out = values.new_zeros(shape[0] * shape[1])
        return out.scatter_reduce(0, where.flatten(), values.flatten(), "amax").reshape(shape)

    mask, feeds = (
        largest(graph.mask.int(), at, shape).bool(),
        largest(graph.feeds.int(), fed, (shape[1], shape[0])).bool(),
    )
    base = Graph(sources, destinations, mask, feeds)
    scores = circuit.scores
    if scores is not None:
        values = largest(scores.values.abs(), at, shape)
        scores = replace(scores, values=values, graph=base, stderr=None, selected=None, signed=False)
    chosen = largest(circuit.mask.int(), at, shape).bool()
    src, dst = chosen.nonzero(as_tuple=True)
    return Circuit(base, src, dst, largest(circuit._matrix(circuit.score.abs()), at, shape)[src, dst], scores=scores)


def _bare(nodes: tuple[Node, ...]) -> tuple[Tensor, tuple[Node, ...]]:
    """For each node the number of its name without a window, and the nodes of these names."""
    found: dict[str, Node] = {}
    for node in nodes:
        name = node.name.removesuffix(f"@{node.span}")
        found.setdefault(name, replace(node, name=name, span=None))
    number = {name: i for i, name in enumerate(found)}
    return torch.tensor([number[node.name.removesuffix(f"@{node.span}")] for node in nodes]), tuple(found.values())
