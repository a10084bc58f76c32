"""Path patching: let some receivers hear the corrupt value of some senders, and leave every other edge alone.

    score(S -> R) = M(clean) - M(clean, with every edge from senders S into receivers R carrying its corrupt value)

What the receivers then write flows on to the logits as in any run. One sender at a time gives the heat map of layers
and heads; one sender and one receiver give exact edge patching.
Cost: one replay from the first receiver's block on for each set of senders; senders are rows of a batch.
When it is wrong: a sender that acts through others scores 0 here, however important; follow it by patching from it into
those others. Effects of senders do not add up, and what backup heads would do is not seen.
References: Wang et al. 2023, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969. Wang et al. recompute the
MLPs between sender and receiver; here these are frozen like all else, so a path goes through no other component.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.ablation import check_corrupt_value
from circuitkit.functional.stats import Moments
from circuitkit.graph import Graph
from circuitkit.methods.base import clean_and_corrupt, corrupt_writes, matrix_bytes, method, with_reference
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task


@method("path-patching", level="node")
def path_patching(
    model: Model,
    task: Task,
    *,
    plan: Plan,
    receivers: str = "logits",
    senders: str | None = None,
    corrupt_value: str = "counterfactual",
) -> NodeScores:
    """Patch the edges from senders into receivers.

    Args:
        receivers: names of readers, with commas; a head's name, as ``a3.h5``, means its q, k and v.
        senders: names of writers, with commas, that are patched together; None for every writer in turn.
        corrupt_value: what the patched edges carry.

    Raises:
        OptionError: for a name that the model does not have, or if no receiver reads any sender.
    """
    check_corrupt_value(corrupt_value)
    graph = model.graph
    into = find_receivers(graph, receivers)
    alone = torch.eye(len(graph.sources), dtype=torch.bool)
    sets = alone if senders is None else find_senders(graph, senders)[None]
    cut = graph.mask & into & sets[:, :, None]
    reach = cut.flatten(1).any(1)
    if not reach.any():
        raise OptionError(
            f"no edge leads from {senders or 'any writer'} into {receivers}: receivers read earlier writers only"
        )
    everything = graph.mask[None]
    values, ends = _effects(model, task, plan, corrupt_value, torch.cat([cut[reach], everything]))
    clean, corrupt = ends
    mean, stderr = (torch.full((len(sets),), math.nan).index_put((reach,), v.float()) for v in values)
    if senders is None:
        return NodeScores(*_by_layer(graph, mean, stderr), clean, corrupt, n_examples=len(task))
    shape = mean[:, None], stderr[:, None]
    return NodeScores(*shape, (senders,), (receivers,), clean, corrupt, n_examples=len(task))


def _effects(
    model: Model, task: Task, plan: Plan, corrupt_value: str, cut: Bool[Tensor, "circuit src dst"]
) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """Mean and error of M(clean) - M(without these edges) for all but the last cut; M(clean), and M at the last cut."""
    corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
    moments, ends = Moments(), Moments()
    sites = model.wiring.read_sites
    some = cut[:-1].flatten(0, 1).any(0)
    start = min(site.block for site in sites if some[site.columns].any())
    with plan.bar(len(task) * len(cut), "paths") as bar:

        def one_chunk(batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
            run, corrupt = clean_and_corrupt(model, batch, corrupt_of)
            batch = with_reference(model, task, batch, run)
            at_once = max(1, plan.rows(2 * matrix_bytes(model, batch), model.device) // len(batch))
            values = [task.metric(model.logits(run.inputs[-1], batch.positions), batch)[None]]
            groups = [(group, start) for group in (~cut[:-1]).split(at_once)] + [(~cut[-1:], 0)]
            for group, first in groups:
                logits = model.run_circuits(run, corrupt, group, batch.positions, start=first)
                many = batch.rows(torch.arange(len(batch), device=logits.device).repeat(len(group)))
                values.append(task.metric(logits.flatten(0, 1), many).unflatten(0, (len(group), -1)))
                bar.update(len(group) * len(batch))
            measured = torch.cat(values).T.cpu().double()
            return measured[:, :1] - measured[:, 1:-1], measured[:, [0, -1]]

        silent = replace(plan, progress=False)
        for effects, both in silent.over(task, model.device, "", lambda b: 2 * matrix_bytes(model, b), one_chunk):
            moments.add(effects)
            ends.add(both)
    clean, corrupt = ends.mean.tolist()
    return (moments.mean, moments.stderr), (clean, corrupt)


def find_receivers(graph: Graph, names: str) -> Bool[Tensor, " dst"]:
    """The named readers, and the readers of named heads. Raises OptionError for any other name."""
    chosen = torch.zeros(len(graph.destinations), dtype=torch.bool)
    heads = [name for name in graph.sources if name not in graph.destinations and name != graph.sources[0]]
    for name in _split(names, "receivers", (*graph.destinations, *heads)):
        if name in graph.destinations:
            chosen[graph.destinations.index(name)] = True
        else:
            chosen |= graph.feeds[:, graph.sources.index(name)]
    return chosen


def find_senders(graph: Graph, names: str) -> Bool[Tensor, " src"]:
    """The named writers. Raises OptionError for any other name."""
    found = _split(names, "senders", graph.sources)
    return torch.tensor([name in found for name in graph.sources])


def _split(text: str, option: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in str(text).split(",")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or [known[0], known[-1]]
            raise OptionError(f"got {option} = {text!r}: there is no {name!r}; did you mean {' or '.join(near)}?")
    return names


def _by_layer(graph: Graph, mean: Tensor, stderr: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    """One row per layer, one column per head, the last one for the MLP and, in its own row, the input."""
    layers = sorted({node.layer for node in graph.source_nodes})
    heads = 1 + max((n.index for n in graph.source_nodes if n.kind == "head" and n.index is not None), default=-1)
    rows = [layers.index(node.layer) for node in graph.source_nodes]
    columns = [node.index if node.kind == "head" else heads for node in graph.source_nodes]
    blank = torch.full((len(layers), heads + 1), math.nan)
    where = torch.tensor(rows), torch.tensor(columns)
    labels = tuple("input" if layer < 0 else f"L{layer}" for layer in layers)
    names = (*(f"H{i}" for i in range(heads)), "MLP or input")
    return blank.index_put(where, mean), blank.index_put(where, stderr), labels, names
