"""How well predicted numbers agree with measured ones.

    Spearman    correlation of the ranks, equal numbers sharing their mean rank
    R2          1 - sum (measured - predicted)^2 / sum (measured - mean measured)^2

R2 is that of the prediction itself, no line being fitted: 1 if every number is right, below 0 if the mean measured
number would have been a better guess.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Numbers = Float[Tensor, " item"]


def spearman(predicted: Numbers, measured: Numbers) -> float:
    """Rank correlation; NaN for fewer than two numbers, or where all are equal.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 5.0, 6.0]))
    1.0
    """
    a, b = (_ranks(x.double()) for x in (predicted, measured))
    a, b = a - a.mean(), b - b.mean()
    size = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / size if size > 0 else float("nan")


def _ranks(x: Numbers) -> Numbers:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    return (below + (counts - 1) / 2)[inverse].double()


def r_squared(predicted: Numbers, measured: Numbers) -> float:
    """R2 of a prediction; NaN for fewer than two numbers, or where all measured ones are equal.

    >>> r_squared(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
    1.0
    """
    predicted, measured = predicted.double(), measured.double()
    spread = float((measured - measured.mean()).square().sum()) if len(measured) > 1 else 0.0
    return 1 - float((measured - predicted).square().sum()) / spread if spread > 0 else float("nan")
