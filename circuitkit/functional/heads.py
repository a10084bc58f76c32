"""What a head attends to, in one number or curve: statistics of patterns ``[batch, head, query, key]``.

Every statistic is of `shares`: each row's magnitudes divided by their sum. An attention pattern is its own share; a
signed or complex map (of a recurrence, or of linear attention) loses its signs, and a row of zeros stays zero.
Rows behind the end of a sequence do not count, if its ``lengths`` are given. Previous-token and prefix-matching
scores: Olsson et al. 2022, "In-context learning and induction heads".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Inexact, Int
from torch import Tensor

Pattern = Inexact[Tensor, "batch head query key"]
Lengths = Int[Tensor, " batch"] | None
PerHead = Float[Tensor, " head"]


def shares(pattern: Pattern) -> Float[Tensor, "batch head query key"]:
    """Each entry's magnitude as a share of its row.

    >>> shares(torch.tensor([[[[2.0, 0.0], [-3.0, 1.0]]]]))
    tensor([[[[1.0000, 0.0000],
              [0.7500, 0.2500]]]])
    """
    size = pattern.abs()
    total = size.sum(-1, keepdim=True)
    return size / torch.where(total > 0, total, 1)


def previous_token_score(pattern: Pattern, lengths: Lengths = None) -> PerHead:
    """Mean share of the position just before, over all queries but the first.

    >>> previous_token_score(torch.eye(3).roll(-1, -1)[None, None])
    tensor([1.])
    """
    where = _lag(pattern) == 1
    return _mean(pattern, where, where.any(-1), lengths)


def self_score(pattern: Pattern, lengths: Lengths = None) -> PerHead:
    """Mean share of the query's own position.

    >>> self_score(torch.eye(3)[None, None])
    tensor([1.])
    """
    where = _lag(pattern) == 0
    return _mean(pattern, where, where.any(-1), lengths)


def first_score(pattern: Pattern, lengths: Lengths = None) -> PerHead:
    """Mean share of position 0, over all queries but the first.

    >>> first_score(torch.eye(3)[None, None])
    tensor([0.])
    """
    lag = _lag(pattern)
    where = (torch.arange(lag.shape[1], device=lag.device) == 0) & (lag > 0)
    return _mean(pattern, where, where.any(-1), lengths)


def prefix_matching_score(pattern: Pattern, tokens: Int[Tensor, "batch query"], lengths: Lengths = None) -> PerHead:
    """Mean share of the positions just after earlier occurrences of the query's token, where there are any.

    The query's own position is none of them: a token that follows itself is no evidence of induction. NaN if no
    token is repeated.

    >>> pattern = torch.zeros(1, 1, 4, 4)
    >>> pattern[0, 0, 2, 1] = pattern[0, 0, 3, 2] = 1.0
    >>> prefix_matching_score(pattern, torch.tensor([[7, 8, 7, 8]]))  # 7 8 7 looks at 8, 7 8 7 8 at 7
    tensor([1.])
    """
    same = tokens[:, :, None] == tokens[:, None, :]
    after = torch.nn.functional.pad(same, (1, 0))[..., :-1] & (_lag(pattern) > 0)
    return _mean(pattern, after, after.any(-1), lengths)


def lag_curve(pattern: Pattern, lengths: Lengths = None) -> Float[Tensor, "head lag"]:
    """Mean share by how many positions back the key is; lag 0 is the query itself.

    >>> lag_curve(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
    tensor([[0.7500, 0.5000]])
    """
    lag, share = _lag(pattern), shares(pattern)
    rows = _real(pattern, lengths)[:, None, :, None]
    curve = []
    for back in range(pattern.shape[-1]):
        where = rows & (lag == back)
        curve.append((share * where).sum((0, 2, 3)) / where.sum())
    return torch.stack(curve, -1)


def mean_lag(pattern: Pattern, lengths: Lengths = None) -> PerHead:
    """How many positions back a head looks, on average over queries: ``sum over keys of share * (query - key)``.

    >>> mean_lag(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))  # 0 for the first query, half a position for the second
    tensor([0.2500])
    """
    back = (shares(pattern) * _lag(pattern)).sum(-1)
    real = _real(pattern, lengths)[:, None].to(back)
    return (back * real).sum((0, 2)) / real.sum()


def _lag(pattern: Tensor) -> Int[Tensor, "query key"]:
    query, key = (torch.arange(n, device=pattern.device) for n in pattern.shape[-2:])
    return query[:, None] - key


def _real(pattern: Tensor, lengths: Lengths) -> Bool[Tensor, "batch query"]:
    batch, _, queries, _ = pattern.shape
    at = torch.arange(queries, device=pattern.device).expand(batch, -1)
    return torch.ones_like(at, dtype=torch.bool) if lengths is None else at < lengths.to(at)[:, None]


def _mean(
    pattern: Tensor, keys: Bool[Tensor, "*batch query key"], queries: Bool[Tensor, "*batch query"], lengths: Lengths
) -> PerHead:
    """Mean over queries that count of the share that goes to the keys that count."""
    share = (shares(pattern) * keys.expand(len(pattern), -1, -1)[:, None]).sum(-1)
    where = (_real(pattern, lengths) & queries)[:, None]
    return (share * where).sum((0, 2)) / where.sum()
