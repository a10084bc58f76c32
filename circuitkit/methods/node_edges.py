"""Edges from writer to writer: what a node's effect owes to what another node wrote, along the edge between them only.

    score(u -> d) = sum over pos of < a_u(clean) - a_u(corrupt), J_d^T g_d >

    g_d   gradient at what d holds, averaged along the path of its site        J_d   derivative of d in what it reads

The products J_d^T g_d are vector-Jacobian products of one block, many nodes d stacked on the batch axis. So an SAE's
latents, which share the queries, keys and values (or the MLP) of their layer, get edges of their own. Over all nodes of
a layer's site the scores of u add up to those of `eap` into the readers of that layer, where one step is taken.
Reference: Marks et al. 2024, arXiv:2403.19647, where they are taken one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.functional.attribution import edge_scores, quadrature
from circuitkit.functional.norms import at_least_float32
from circuitkit.functional.stats import Moments
from circuitkit.graph import Graph, Node
from circuitkit.methods.base import backward_bytes, clean_and_corrupt, corrupt_writes, matrix_bytes, with_reference
from circuitkit.methods.gradients import path_scores
from circuitkit.methods.node_effects import pulled_to_site, site_slopes
from circuitkit.methods.plan import Plan
from circuitkit.models.edits import own_copy, pulled
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.wiring import Port, WriteSite
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task


def node_edges(
    model: Model,
    task: Task,
    *,
    steps: int = 10,
    corrupt_value: str = "counterfactual",
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Scores:
    """Score of every edge between writers, and from writers to the logits.

    The graph has a destination for each writer; it is for looking at and for ranking, not for `ck.evaluate`, which runs
    circuits of the model's own readers.

    Raises:
        OptionError: for an unknown corrupt value.
        MetricError: if the metric has no gradient, or with one step none at the clean run.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> node_edges(model, ck.task("induction-letters", model, n=8), steps=2).graph.destinations
    ('a0.h0', 'a1.h0', 'logits')
    """
    plan = Plan.of(batch_size, budget, progress, seed)
    with torch.no_grad(), model.quiet():
        corrupt_of = corrupt_writes(model, task, plan, corrupt_value)

        def one_chunk(batch: Batch, plan: Plan) -> Float[Tensor, "batch src dst"]:
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch = with_reference(model, task, batch, run)
            delta = model.wiring.expand_difference(run.writes, corrupt)
            scores = delta.new_zeros(len(batch), len(delta), len(delta))
            at_once = max(1, plan.rows(backward_bytes(model, batch), model.device) // len(batch))
            for group, slope in site_slopes(model, task, batch, run, corrupt, steps, at_once):
                for _, site in group:
                    for nodes, back in _products(model, run, site, pulled_to_site(site, slope), at_once):
                        scores[:, :, nodes] = edge_scores(delta, back)
            return scores

        def size(batch: Batch) -> float:
            return matrix_bytes(model, batch) + backward_bytes(model, batch)

        moments = Moments()
        for chunk in plan.over(task, model.device, "edges between nodes", size, one_chunk):
            moments.add(chunk)
        alphas, weights = ([1.0], [1.0]) if steps == 1 else quadrature("midpoint", steps)
        whole = path_scores(model, task, plan, alphas=alphas, weights=weights, corrupt_value=corrupt_value)
    graph, inner = node_graph(model.graph), ~model.graph.roots
    values = torch.cat([moments.mean.float().cpu()[:, inner], whole.values[:, -1:]], 1)
    options = {"steps": steps, "corrupt_value": corrupt_value}
    return Scores(torch.where(graph.mask, values, 0.0), graph, "node-edges", options, n_examples=moments.n)


def node_graph(graph: Graph) -> Graph:
    """A graph whose destinations are the writers that read anything, and the logits."""
    reach = ((graph.mask.float() @ graph.feeds.float()) > 0)[:, ~graph.roots]
    inner = [node for node, root in zip(graph.source_nodes, graph.roots.tolist(), strict=True) if not root]
    ends: list[Node] = [*inner, graph.destination_nodes[-1]]
    feeds = torch.eye(len(graph.sources), dtype=torch.bool)[~graph.roots]
    feeds = torch.cat([feeds, torch.zeros(1, len(graph.sources), dtype=torch.bool)])
    return Graph(graph.source_nodes, tuple(ends), torch.cat([reach, graph.mask[:, -1:]], 1), feeds)


def _products(
    model: Model, run: Run, site: WriteSite, wanted: Float[Tensor, "batch pos node width"], at_once: int
) -> Iterator[tuple[slice, Float[Tensor, "node batch pos d"]]]:
    """Some rows of the edge matrix with J^T g of their writers, at the stream that their block's readers read."""
    reads = [s for s in model.wiring.read_sites if bool(model.graph.feeds[s.columns, site.rows].any())]
    for first in range(0, site.n if reads else 0, at_once):
        nodes = torch.arange(first, min(first + at_once, site.n), device=wanted.device)
        rows = torch.arange(run.batch, device=wanted.device).repeat(len(nodes))
        seen: dict[Port, Tensor] = {}
        x = run.inputs[site.block][rows].detach().requires_grad_()
        with torch.enable_grad():
            hooks: list[Hook] = [(port, keeper(seen, port)) for port in dict.fromkeys(s.stream for s in reads)]
            hooks += [(s.port, own_copy(seen, s.port)) for s in reads]
            y = model.replay_block(run, site.block, x, rows, hooks, site.port)
            held = site.kept(y.reshape(*y.shape[:2], site.n, -1)).unflatten(0, (len(nodes), run.batch))
            own = held[torch.arange(len(nodes)), :, :, nodes]
            value = (at_least_float32(own) * wanted[:, :, nodes].permute(2, 0, 1, 3)).sum()
            slopes = torch.autograd.grad(value, [seen[s.port] for s in reads], allow_unused=True)
        found = {s: (seen[s.port], seen[s.stream]) for s in reads}
        shape = (1, len(rows), x.shape[1])
        total = torch.zeros_like(at_least_float32(x.detach()))
        for _, back in pulled(found, dict(zip(reads, slopes, strict=True)), shape, False):
            total += back.sum(0)
        start = site.first + first
        yield slice(start, start + len(nodes)), total.unflatten(0, (len(nodes), run.batch))
