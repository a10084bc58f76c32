"""Layer and root-mean-square norms: forward, and the two linear maps that attribution needs.

With y = weight * x_hat + bias, x_hat = (x - mean) / sigma (layer) or x / sigma (rms), and P removing the mean:

    J^T g = (1 / sigma) * (P (weight * g) - x_hat * <x_hat, weight * g> / d)         pull a gradient back to x
    part(a / sigma) = weight * P a / sigma                                          what an addend a of x adds to y
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the last axis, as data.

    Args:
        center: True for a layer norm, False for a root-mean-square norm.
        eps: added to the variance.
        weight: gain, or None.
        bias: offset, or None.
        unit_gain: True if the gain is 1 + weight (Gemma).

    >>> norm = Norm(center=True, eps=0.0, weight=None, bias=None)
    >>> norm(torch.tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    """

    center: bool
    eps: float
    weight: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " d"] | None = None
    unit_gain: bool = False

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise; statistics in float32 or better, as the models do."""
        if self.center and not self.unit_gain:  # one pass over memory where the formulas below take eight
            wide = at_least_float32(x)
            weight, bias = (None if p is None else p.to(wide.dtype) for p in (self.weight, self.bias))
            return torch.nn.functional.layer_norm(wide, wide.shape[-1:], weight, bias, self.eps).to(x.dtype)
        x_hat, _ = self.statistics(x)
        y = self._scaled(x_hat)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def statistics(self, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch 1"]]:
        """The normalised input x_hat and 1 / sigma."""
        x = at_least_float32(x)
        x = x - x.mean(-1, keepdim=True) if self.center else x
        inverse_sigma = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * inverse_sigma, inverse_sigma

    def pull_back(
        self, gradient: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"], *, frozen: bool = False
    ) -> Float[Tensor, "*batch d"]:
        """J^T g: the gradient with respect to x, given that with respect to the output; ``frozen`` fixes the scale.

        >>> x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        >>> norm = Norm(center=False, eps=1e-5, weight=torch.rand(8, dtype=torch.float64))
        >>> expected = torch.autograd.grad(norm(x).square().sum(), x)[0]
        >>> torch.allclose(norm.pull_back(2 * norm(x), x), expected)
        True
        """
        x_hat, inverse_sigma = self.statistics(x)
        g = self.fold(at_least_float32(gradient))
        if frozen:
            return inverse_sigma * g
        return inverse_sigma * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))

    def fold(self, gradient: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """P (weight * g): the part of the pull-back that does not depend on the run."""
        g = self._scaled(gradient)
        return g - g.mean(-1, keepdim=True) if self.center else g

    def part(self, addend: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """weight * P a: what an addend of x, given times 1 / sigma, adds to the output; parts add up to the output."""
        return self._scaled(addend - addend.mean(-1, keepdim=True) if self.center else addend)

    def _scaled(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if self.weight is None:
            return x
        return x * (self.weight.to(x.dtype) + float(self.unit_gain))


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()
