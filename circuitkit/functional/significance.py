"""Exact tails of counts and a permutation test of dependence: the arithmetic behind evaluation's tests.

    hypergeometric   P(|A and B| >= x) for random sets A, B of fixed sizes among n items
    binomial         P(K <= k) and P(|K / n - 1/2| >= t) for K ~ Binomial(n, p)
    HSIC             mean over i, j of centred k(x_i, x_j) * centred l(y_i, y_j): zero if x and y are independent

All of it in float64, and exact but for rounding; no table and no normal approximation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def hypergeometric(n: int, a: int, b: int) -> Float[Tensor, " shared"]:
    """Chance that random sets of ``a`` and ``b`` of ``n`` items share 0, 1, ... min(a, b) of them.

    >>> hypergeometric(4, 2, 2).tolist()[1]
    0.6666666666666666
    """
    x = torch.arange(min(a, b) + 1, dtype=torch.float64)
    # Out of range where b - x exceeds the n - a others: chance 0.
    logs = _log_choose(a, x) + _log_choose(n - a, b - x)
    logs = torch.where(b - x > n - a, -torch.inf, logs)
    return torch.softmax(logs, 0)


def overlap_p(n: int, a: int, b: int, shared: int) -> float:
    """Chance that random sets of ``a`` and ``b`` of ``n`` items share at least ``shared``.

    >>> overlap_p(10, 3, 3, 0), round(overlap_p(10, 3, 3, 3), 6)  # the second: 1 in 120
    (1.0, 0.008333)
    """
    return min(1.0, float(hypergeometric(n, a, b)[shared:].sum()))


def expected_jaccard(n: int, a: int, b: int) -> float:
    """Mean Jaccard index of random sets of ``a`` and ``b`` of ``n`` items; 1 for two empty sets.

    >>> expected_jaccard(2, 1, 1)
    0.5
    """
    if a + b == 0:
        return 1.0
    shared = torch.arange(min(a, b) + 1, dtype=torch.float64)
    return float((hypergeometric(n, a, b) * shared / (a + b - shared)).sum())


def binomial(n: int, p: float) -> Float[Tensor, " count"]:
    """Chance of 0, 1, ... n successes in n trials."""
    k = torch.arange(n + 1, dtype=torch.float64)
    chance = torch.tensor(p, dtype=torch.float64)
    return torch.exp(_log_choose(n, k) + torch.xlogy(k, chance) + torch.xlogy(n - k, 1 - chance))


def rank_p(larger: int, n: int, quantile: float) -> float:
    """Chance of at most ``larger`` successes in n trials of chance ``quantile``.

    Small if an effect exceeds a random one clearly less often than ``quantile`` of the time.
    """
    return min(1.0, float(binomial(n, quantile)[: larger + 1].sum()))


def equivalence_p(wins: float, n: int, margin: float) -> float:
    """Largest chance, over win rates within ``margin`` of 1/2, of a win rate as far from 1/2 as the one seen.

    Ties count as half a win. The chance grows with the distance of the true rate from 1/2, so it is taken at the edge.

    >>> round(equivalence_p(32, 64, 0.1), 9)
    1.0
    """
    k = torch.arange(n + 1, dtype=torch.float64)
    as_far = (k / n - 0.5).abs() >= abs(wins / n - 0.5) - 1e-12
    return min(1.0, float(binomial(n, 0.5 + margin)[as_far].sum()))


def dependence_p(
    x: Float[Tensor, " n"], y: Float[Tensor, " n"], *, permutations: int, generator: torch.Generator
) -> tuple[float, float]:
    """HSIC of two samples with Gaussian kernels as wide as their median distances, and its permutation p-value.

    The p-value counts the sample itself as one of the permutations, so it is never 0 and the test keeps its level.

    >>> x = torch.linspace(0, 1, 30)
    >>> dependence_p(x, x**2, permutations=99, generator=torch.Generator().manual_seed(0))[1]
    0.01
    """
    n = len(x)
    k, other = _centred(_gaussian(x)), _centred(_gaussian(y))
    seen = float((k * other).sum()) / n**2
    reached, at_once = 0, max(1, 2**22 // n**2)
    for start in range(0, permutations, at_once):
        size = min(at_once, permutations - start)
        order = torch.rand(size, n, generator=generator, dtype=torch.float64).argsort(1)
        shuffled = other[order[:, :, None], order[:, None, :]]
        reached += int(((shuffled * k).sum((1, 2)) / n**2 >= seen - 1e-12).sum())
    return seen, (1 + reached) / (1 + permutations)


def _gaussian(x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
    x = x.cpu().double()
    distance = (x[:, None] - x[None, :]).abs()
    between = distance[~torch.eye(len(x), dtype=torch.bool)]
    width = float(between.median()) if len(between) else 0.0
    width = width or float(distance.max()) or 1.0
    return torch.exp(-distance.square() / (2 * width**2))


def _centred(kernel: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    rows = kernel - kernel.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def _log_choose(n: int, k: Tensor) -> Tensor:
    """Logarithm of the number of ways to choose k of n; minus infinity where there is none."""
    inside = (k >= 0) & (k <= n)
    safe = torch.where(inside, k, torch.zeros((), dtype=k.dtype))
    total = torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64))
    logs = total - torch.lgamma(safe + 1) - torch.lgamma(n - safe + 1)
    return torch.where(inside, logs, -torch.inf)
