"""How much of some targets goes back to each node of an attribution graph, and which nodes and edges carry most of it.

    N[t, s] = |A[t, s]| / sum over s of |A[t, s]|          row by row, in float64
    I       = p (N + N^2 + N^3 + ...)                      p: weight of each final target

The graph has no cycles, so one pass from the last stage to the first gives I exactly: when a stage is reached, its
nodes' influence is complete. After Ameisen et al. 2025, "Circuit tracing" (transformer-circuits.pub); one pass instead
of powers of N is ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rows = Float[Tensor, "target node"]
PerNode = Float[Tensor, " node"]


def normalised_rows(effects: Rows) -> Float[Tensor, "target node"]:
    """N: magnitudes as shares of their row, in float64; a row of zeros stays so.

    >>> normalised_rows(torch.tensor([[1.0, -3.0], [0.0, 0.0]])).tolist()
    [[0.25, 0.75], [0.0, 0.0]]
    """
    magnitude = effects.abs().double()
    total = magnitude.sum(1, keepdim=True)
    return magnitude / total.where(total > 0, torch.ones_like(total))


def influence(
    effects: Rows, targets: Int[Tensor, " target"], stages: Int[Tensor, " node"], weights: PerNode
) -> Float[Tensor, " node"]:
    """I of every node, in float64.

    Args:
        effects: A, one row for each target that has been explored.
        targets: which node each row belongs to.
        stages: order of computation; an effect leads from a lower stage to a higher one.
        weights: p, zero but for final targets.

    >>> a = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])              # node 1 from node 0, node 2 from both
    >>> influence(a, torch.tensor([1, 2]), torch.tensor([0, 1, 2]), torch.tensor([0.0, 0.0, 1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    found = torch.zeros_like(weights, dtype=torch.float64)
    weights = weights.double()
    row_stages = stages[targets]
    for stage in row_stages.unique(sorted=True).flip(0):
        rows = (row_stages == stage).nonzero().flatten()
        for some in rows.split(256):  # float64 copies of a few rows at a time
            found += (found + weights)[targets[some]] @ normalised_rows(effects[some])
    return found


def carrying(scores: Float[Tensor, "*any"], share: float) -> Bool[Tensor, "*any"]:
    """The smallest set of entries, largest first, that adds up to a share of the total; none where all are zero.

    Only entries near the boundary are sorted: the rest is told apart by the leading bits of its floating-point form, so
    that a hundred million edges need no sort.

    >>> carrying(torch.tensor([5.0, 1.0, 4.0]), 0.85).tolist()
    [True, False, True]
    """
    flat = scores.detach().flatten().float()
    total = float(flat.sum(dtype=torch.float64))
    if total <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if share >= 1:
        return scores > 0
    bins = flat.view(torch.int32) >> 16  # of numbers that are not negative, in their order
    sums = torch.bincount(bins.long(), weights=flat.double(), minlength=1 << 15)
    above = sums.flip(0).cumsum(0).flip(0)
    wanted = share * total
    boundary = int((above >= wanted).nonzero().max())
    keep = bins > boundary
    near = (bins == boundary).nonzero().flatten()
    order = near[flat[near].argsort(descending=True, stable=True)]
    missing = wanted - float(above[boundary + 1]) if boundary + 1 < len(above) else wanted
    running = flat[order].double().cumsum(0)
    count = min(int((running < missing).sum()) + 1, len(order))
    keep[order[:count]] = True
    return keep.reshape(scores.shape)


def edge_shares(
    effects: Rows, targets: Int[Tensor, " target"], found: PerNode, weights: PerNode
) -> Float[Tensor, "target node"]:
    """How much influence passes each edge: N[t, s] (I_t + p_t)."""
    worth = (found + weights.double())[targets]
    return torch.cat([(normalised_rows(a) * w[:, None]).to(effects.dtype)
                      for a, w in zip(effects.split(256), worth.split(256), strict=True)])  # fmt: skip


def replacement_score(found: PerNode, tokens: Bool[Tensor, " node"], errors: Bool[Tensor, " node"]) -> float:
    """Influence of tokens / (influence of tokens and of errors): end to end, how much is explained.

    >>> replacement_score(torch.tensor([3.0, 1.0]), torch.tensor([True, False]), torch.tensor([False, True]))
    0.75
    """
    of_tokens, of_errors = float(found[tokens].sum()), float(found[errors].sum())
    return of_tokens / (of_tokens + of_errors) if of_tokens + of_errors > 0 else float("nan")


def completeness_score(
    effects: Rows,
    targets: Int[Tensor, " target"],
    found: PerNode,
    weights: PerNode,
    errors: Bool[Tensor, " node"],
) -> float:
    """sum_t (1 - share of errors in row t) (I_t + p_t) / sum_t (I_t + p_t): step by step, how much is explained."""
    worth = (found + weights.double())[targets]
    share = torch.cat([normalised_rows(a)[:, errors].sum(1) for a in effects.split(256)])
    total = float(worth.sum())
    return float(((1 - share) * worth).sum()) / total if total > 0 else float("nan")
