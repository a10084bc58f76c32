"""Running moments over examples, and bootstrap intervals."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Moments:
    """Mean and standard error of tensors that arrive in chunks of examples, in float64 (Chan et al. 1983).

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[1.0], [2.0]])); moments.add(torch.tensor([[6.0]]))
    >>> moments.mean.item(), round(moments.stderr.item(), 4), moments.n
    (3.0, 1.5275, 3)
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Float[Tensor, batch * rest]) -> None:
        """Take in a chunk; the first axis counts examples."""
        values = values.cpu().double()  # some accelerators have no float64
        n, mean = len(values), values.mean(0)
        gap, total = mean - self.mean, self.n + n
        self._squares = self._squares + (values - mean).square_().sum(0) + gap.square() * (self.n * n / total)
        self.mean, self.n = self.mean + gap * (n / total), total

    @property
    def stderr(self) -> Float[Tensor, "*rest"]:
        """Standard error of the mean; zero for a single example."""
        return (self._squares / max(self.n - 1, 1) / max(self.n, 1)).sqrt()


def bootstrap_ratio(
    top: Float[Tensor, " batch"], bottom: Float[Tensor, " batch"], *, seed: int
) -> tuple[float, float] | None:
    """95 % percentile interval of mean(top) / mean(bottom) under resampling of the examples.

    None if the ratio is undefined in more than one resample of twenty: then there is no interval to speak of.

    >>> bootstrap_ratio(torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]), seed=0) is None
    True
    """
    index = _resamples(len(top), seed)
    ratios = top.cpu().double()[index].mean(1) / bottom.cpu().double()[index].mean(1)
    defined = ratios[ratios.isfinite()]
    return _interval(defined) if len(defined) >= 0.95 * len(ratios) else None


def bootstrap_mean(values: Float[Tensor, " batch"], *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of the examples."""
    return _interval(values.cpu().double()[_resamples(len(values), seed)].mean(1))


def _resamples(n: int, seed: int, times: int = 1000) -> Tensor:
    return torch.randint(n, (times, n), generator=torch.Generator().manual_seed(seed))


def _interval(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def auroc(values: Float[Tensor, " item"], positive: Bool[Tensor, " item"]) -> float | None:
    """Chance that a random positive item is above a random negative one, ties counting half; None if one side is empty.

    >>> auroc(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([True, True, False]))
    0.75
    """
    ups, downs = values[positive].double(), values[~positive].double().sort().values
    if len(ups) == 0 or len(downs) == 0:
        return None
    below = torch.searchsorted(downs, ups, right=False)
    through = torch.searchsorted(downs, ups, right=True)
    return float((below + through).double().mean() / 2 / len(downs))


def f1(chosen: Bool[Tensor, " item"], positive: Bool[Tensor, " item"]) -> float | None:
    """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN); None if nothing is chosen and nothing positive.

    It is not the harmonic mean of the true positive rate and 1 - false positive rate: with few positive among many
    items that stays near 1 however many wrong ones are chosen beside the right ones.

    >>> f1(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    0.6666666666666666
    """
    both, either = int((chosen & positive).sum()), int(chosen.sum()) + int(positive.sum())
    return 2 * both / either if either else None


def roc_curve(
    values: Float[Tensor, " item"], positive: Bool[Tensor, " item"]
) -> tuple[list[float], list[float], list[float]] | None:
    """False and true positive rates and thresholds, items taken from the highest value down, from (0, 0) to (1, 1).

    Items of equal value are taken together, so a tie is a straight line and the area by trapezoids is `auroc` exactly.
    None if one side is empty. The first threshold is infinite: nothing is taken.

    >>> false, true, _ = roc_curve(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([True, True, False]))
    >>> false, true, trapezoid(true, false)
    ([0.0, 0.0, 1.0], [0.0, 0.5, 1.0], 0.75)
    """
    n_up, n_down = int(positive.sum()), int((~positive).sum())
    if n_up == 0 or n_down == 0:
        return None
    levels, group = torch.unique(-values.double(), return_inverse=True)  # ascending, so the highest value comes first
    ups = torch.zeros(len(levels), dtype=torch.float64).index_add(0, group, positive.double())
    downs = torch.zeros(len(levels), dtype=torch.float64).index_add(0, group, (~positive).double())
    false, true = ([0.0, *(counts.cumsum(0) / n).tolist()] for counts, n in ((downs, n_down), (ups, n_up)))
    return false, true, [float("inf"), *(-levels).tolist()]


def trapezoid(y: list[float], x: list[float]) -> float:
    """Area under straight lines through the points.

    >>> trapezoid([0.0, 1.0], [0.0, 2.0])
    1.0
    """
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:], strict=False))
