"""Products over every stretch of a sequence, which is what a recurrence makes of its decay.

    D[t, s] = prod of a_r over s < r <= t            1 where s = t, 0 where s > t

Row t is row t - 1 times a_t. Magnitudes are added as logarithms, from s on, so that nothing cancels and nothing
overflows on the way: a quotient of two running products would divide by zero after the first a_r = 0, and lose digits
after many small ones. Signs, and phases of complex numbers, are multiplied. Time and memory are O(steps^2).
"""

from __future__ import annotations

import torch
from jaxtyping import Inexact
from torch import Tensor


def prefix_products(a: Inexact[Tensor, "*row step"]) -> Inexact[Tensor, "*row step step"]:
    """Product of ``a`` over every stretch, ``[.., t, s]``; zeros, signs and complex numbers are exact.

    >>> prefix_products(torch.tensor([5.0, -2.0, 0.0]))
    tensor([[ 1.,  0.,  0.],
            [-2.,  1.,  0.],
            [ 0.,  0.,  1.]])
    """
    size = a.abs().log()[..., None]
    logs = size.new_zeros(*a.shape, a.shape[-1])
    for t in range(1, a.shape[-1]):
        torch.add(logs[..., t - 1, :t], size[..., t, :], out=logs[..., t, :t])
    magnitudes = logs.exp_().tril_()
    if not a.is_complex() and bool((a > 0).all()):
        return magnitudes
    sign = a.sgn()[..., None]
    signs = torch.ones_like(logs, dtype=a.dtype if a.is_complex() else torch.int8)
    for t in range(1, a.shape[-1]):
        torch.mul(signs[..., t - 1, :t], sign[..., t, :].to(signs.dtype), out=signs[..., t, :t])
    return signs.mul_(magnitudes) if a.is_complex() else magnitudes.mul_(signs)
