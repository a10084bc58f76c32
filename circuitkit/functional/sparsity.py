"""How masks between 0 and 1 are drawn so that they can be learned by gradients, and how their size is held down.

    hard concrete      z = clamp(l + (h - l) sigmoid((a + logit(u)) / t), 0, 1)     u uniform in (0, 1)
    its size           P(z > 0) = sigmoid(a - t log(-l / h))
    uniform window     m = 0, 1, or with probability w p (1 - p) uniform in (0, 1), so that E[m] = p = sigmoid(a)
    soft top-k         m = sigmoid((a - c) / t), with c such that these add up to k
    nested             (1 - h) m + h [a is among the k highest]                     with the gradient of m

a: one logit for each item (edge or node). l, h = -0.1, 1.1 and t = 2/3 are the usual stretch and temperature.
References: Louizos, Welling and Kingma 2018, arXiv:1712.01312 (hard concrete); Li and Janson 2024, arXiv:2409.09951
(uniform window); Arora et al. 2026, arXiv:2609.25518 (soft top-k).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3

Items = Float[Tensor, "*sample item"]


def uniform_noise(shape: tuple[int, ...], generator: torch.Generator) -> Items:
    """Numbers between 0 and 1, both left out; drawn on the CPU in float32, so that every device sees the same."""
    return torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)


def logistic(noise: Items) -> Items:
    """logit(u): logistic noise from uniform noise.

    >>> logistic(torch.tensor([0.5]))
    tensor([0.])
    """
    return noise.log() - (-noise).log1p()


def hard_concrete(logits: Items, noise: Items) -> Items:
    """A mask with exact zeros and ones, differentiable in the logits where it is neither.

    >>> hard_concrete(torch.tensor([-9.0, 0.0, 9.0]), torch.full((3,), 0.5))
    tensor([0.0000, 0.5000, 1.0000])
    """
    stretched = LOW + (HIGH - LOW) * ((logits + logistic(noise)) / TEMPERATURE).sigmoid()
    return stretched.clamp(0, 1)


def chance_open(logits: Items) -> Items:
    """P(z > 0): the expected L0 norm of a hard-concrete mask is the sum of this over its items.

    >>> chance_open(torch.tensor([0.0])) > 0.5
    tensor([True])
    """
    return (logits - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


def lagrangian(size: Float[Tensor, ""], goal: float, multipliers: Float[Tensor, " two"]) -> Float[Tensor, ""]:
    """lambda_1 g + lambda_2 g^2 with g = log(size / goal): zero where the size is met, whatever its scale.

    The masks descend this and the multipliers climb it, so these grow for as long as the size is missed.

    >>> lagrangian(torch.tensor(40.0), 40, torch.tensor([3.0, 1.0]))
    tensor(0.)
    """
    gap = torch.log(size / goal)
    return multipliers[0] * gap + multipliers[1] * gap.square()


def uniform_window(logits: Items, noise: Items, width: float = 1.0) -> Items:
    """A mask that is 0 or 1 save for a window of probability ``width`` p (1 - p), where it is uniform in (0, 1).

    Were the loss linear in every single item, its mean over 0 and 1 would have the slope L(1) - L(0) in p, and that is
    the mean of dL/dm over the window. So dL/dm of the items inside, divided by the window's probability and times
    dp/da = p (1 - p), is an unbiased gradient in the logit: inside the window dL/da = dL/dm / width, outside 0.
    Items inside the window count for many others outside it: average over several masks.
    """
    p = logits.detach().sigmoid()
    window = width * p * (1 - p)
    inside = noise < window
    drawn = torch.where(inside, noise / window, (noise < p + window / 2).to(p.dtype))
    return drawn + torch.where(inside, (logits - logits.detach()) / width, 0.0)


def soft_top_k(logits: Items, k: Float[Tensor, "*sample"], temperature: float) -> Items:
    """sigmoid((a - c) / temperature) with c such that the items of each sample add up to k; exact gradient through c.

    >>> soft_top_k(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([2.0]), 1.0)
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    with torch.no_grad():
        low = logits.amin(-1, keepdim=True) - 30 * temperature
        high = logits.amax(-1, keepdim=True) + 30 * temperature
        for _ in range(60):
            middle = (low + high) / 2
            many = ((logits - middle) / temperature).sigmoid().sum(-1, keepdim=True) > k[..., None]
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)
        cut = (low + high) / 2
        soft = ((logits - cut) / temperature).sigmoid()
        slope = soft * (1 - soft)
        share = slope / slope.sum(-1, keepdim=True).clamp(min=1e-30)
    # The value of this term is zero; its gradient is that of c: every logit moves c by its share of the slopes.
    moving = (share * (logits - logits.detach())).sum(-1, keepdim=True)
    return ((logits - cut - moving) / temperature).sigmoid()


def nested(logits: Items, k: Float[Tensor, "*sample"], hardness: Float[Tensor, "*sample"], temperature: float) -> Items:
    """A mask between a soft top-k (hardness 0) and 1 for the k highest items, else 0 (hardness 1).

    For the hard end k is rounded and ties go to the first item. The gradient is always that of the soft end.

    >>> logits, k = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([2.0])
    >>> nested(logits, k, torch.tensor([1.0]), 1.0)
    tensor([[1., 0., 1.]])
    >>> round(nested(logits, k, torch.tensor([0.0]), 1.0).sum().item(), 3)
    2.0
    """
    soft = soft_top_k(logits, k, temperature)
    place = logits.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    hard = (place < k.round()[..., None]).to(soft.dtype)
    return soft + (hardness[..., None] * (hard - soft)).detach()


def logits_from_ranking(strength: Float[Tensor, " item"], spread: float) -> Float[Tensor, " item"]:
    """Logits from ``spread`` (strongest) to ``-spread`` (weakest), evenly spaced by rank; equals share their mean rank.

    >>> logits_from_ranking(torch.tensor([0.1, 5.0, 0.3]), 1.0)
    tensor([-1.,  1.,  0.])
    >>> logits_from_ranking(torch.tensor([7.0, 7.0]), 1.0)
    tensor([0., 0.])
    """
    _, inverse, counts = torch.unique(strength, return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    rank = below + (counts - 1) / 2
    return spread * (2 * rank[inverse] / max(len(strength) - 1, 1) - 1)
