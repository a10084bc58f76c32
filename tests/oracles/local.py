"""Edge scores with the reader's own nonlinearity exact, one edge and one example at a time.

One dial turned to 1 gives what the reader's writers hand on under that edge. What that is worth is the derivative, by
autograd, with respect to what a writer hands to all later readers.
"""

import torch

from tests.oracles.literal import literal_metric, literal_run, literal_writes


def literal_local_exact(model, task):
    module, graph = model.module, model.graph
    total, n = torch.zeros(graph.mask.shape, dtype=torch.float64), 0
    for batch in task.batches:
        for i in range(len(batch)):
            length = int(batch.lengths[i])
            corrupt = literal_writes(module, batch.corrupt[i, :length], graph)
            clean = literal_writes(module, batch.clean[i, :length], graph)
            slopes = [slope(model, task, batch, i, clean, row) for row in range(len(clean))]
            dial = torch.zeros(graph.mask.shape, dtype=corrupt.dtype)
            with torch.no_grad():
                value = literal_metric(module, task, batch, i, corrupt, dial)
                for u, v in graph.mask.nonzero().tolist():
                    dial[u, v] = 1
                    fed = graph.feeds[v].nonzero().flatten().tolist()
                    if fed:
                        moved = literal_run(module, batch.clean[i, :length], corrupt, dial)[1]
                        total[u, v] += sum(((clean[row] - moved[row]) * slopes[row]).sum() for row in fed)
                    else:
                        total[u, v] += value - literal_metric(module, task, batch, i, corrupt, dial)
                    dial[u, v] = 0
            n += 1
    return total / n


def slope(model, task, batch, i, clean, row):
    """Derivative of the metric with respect to what one writer writes: its readers are handed a leaf instead."""
    leaf = clean.clone().requires_grad_()
    dial = torch.zeros(model.graph.mask.shape, dtype=clean.dtype)
    dial[row] = 1
    return torch.autograd.grad(literal_metric(model.module, task, batch, i, leaf, dial), leaf)[0][row]
