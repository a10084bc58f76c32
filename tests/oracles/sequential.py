"""ACDC and group testing with one whole run per test: no batching, no replay, no guesses."""

import torch

from tests.oracles.literal import literal_circuit


def literal_acdc(model, task, tau, *, order="reverse", magnitude=False, measure=literal_circuit):
    """Kept edges, and the effect of every edge when it was tested.

    Edges into readers that no longer lead to the logits are tested like all others.
    """
    graph = model.graph
    keep, effects = graph.mask.clone(), torch.zeros(graph.mask.shape, dtype=torch.float64)
    now = measure(model, task, keep).double().mean()
    for v in reversed(range(len(graph.destinations))):
        senders = graph.mask[:, v].nonzero().flatten().tolist()
        for u in reversed(senders) if order == "reverse" else senders:
            keep[u, v] = False
            less = measure(model, task, keep).double().mean()
            effects[u, v] = now - less
            if (abs(now - less) if magnitude else now - less) < tau:
                now = less
            else:
                keep[u, v] = True
    return keep, effects


def literal_group_testing(model, task, tau):
    """Kept edges, and how many different circuits had to be run, each group tested by a run of its own."""
    graph = model.graph
    keep, known, tests = graph.mask.clone(), {}, set()

    def metric(mask):
        key = tuple(mask.flatten().tolist())
        if key not in known:
            known[key] = float(literal_circuit(model, task, mask).double().mean())
        return known[key]

    def test(group):
        less = keep.clone()
        for u, v in group:
            less[u, v] = False
        tests.add(tuple(less.flatten().tolist()))
        if metric(keep) - metric(less) < tau:
            keep.copy_(less)
        elif len(group) > 1:
            middle = (len(group) + 1) // 2
            test(group[:middle])
            test(group[middle:])

    numbers = sorted({node.stage for node in graph.destination_nodes}, reverse=True)
    for number in numbers:
        columns = [v for v, node in enumerate(graph.destination_nodes) if node.stage == number]
        alive = [v for v in columns if leads(graph, keep, v)]
        for v in set(columns) - set(alive):
            keep[:, v] = False
        group = [(u, v) for v in reversed(alive) for u in reversed(keep[:, v].nonzero().flatten().tolist())]
        if group:
            test(group)
    return keep, len(tests)


def leads(graph, keep, reader):
    """Whether a path of kept edges leads from what a reader feeds to the logits."""
    if not graph.feeds[reader].any():
        return True
    fed = graph.feeds[reader].nonzero().flatten().tolist()
    return any(leads(graph, keep, v) for u in fed for v in keep[u].nonzero().flatten().tolist())
