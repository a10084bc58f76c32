"""The cheapest way to pair rows with columns."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError


def cheapest_pairs(cost: Float[Tensor, "n n"]) -> Int[Tensor, " n"]:
    """The column of each row, every column once, so that the sum of costs is least (Kuhn 1955, Munkres 1957).

    Shortest augmenting paths with potentials, O(n^3): rows are brought in one at a time, and each takes the path of
    least reduced cost to a free column.

    Raises:
        OptionError: if a cost is not finite.

    >>> cheapest_pairs(torch.tensor([[4.0, 1.0], [2.0, 3.0]]))
    tensor([1, 0])
    """
    if not cost.isfinite().all():
        raise OptionError("got costs that are not finite; pairing needs finite numbers")
    n = len(cost)
    # Row and column 0 stand for "none", as usual in this algorithm.
    costs = np.zeros((n + 1, n + 1))
    costs[1:, 1:] = cost.detach().double().cpu().numpy()
    of_row, of_column = np.zeros(n + 1), np.zeros(n + 1)
    row_at = np.zeros(n + 1, dtype=int)
    for row in range(1, n + 1):
        row_at[0], here = row, 0
        least, came_from = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int)
        done = np.zeros(n + 1, dtype=bool)
        while row_at[here]:
            done[here] = True
            reduced = costs[row_at[here]] - of_row[row_at[here]] - of_column
            closer = ~done & (reduced < least)
            closer[0] = False
            least[closer], came_from[closer] = reduced[closer], here
            open_columns = np.flatnonzero(~done[1:]) + 1
            following = int(open_columns[least[open_columns].argmin()])
            gap = least[following]
            of_row[row_at[done]] += gap
            of_column[done] -= gap
            least[~done] -= gap
            here = following
        while here:
            row_at[here], here = row_at[came_from[here]], came_from[here]
    out = np.empty(n, dtype=int)
    out[row_at[1:] - 1] = np.arange(n)
    return torch.from_numpy(out).to(cost.device)
