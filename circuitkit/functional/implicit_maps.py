"""Recurrences that are linear in what they take in, written as attention.

    y_t = sum over s <= t of  alpha[t, s] u_s

alpha may be signed or complex and its rows need not add up to one. Every map holds for any dtype, whatever the
coefficients at each step were computed from: they are read from a run and kept as they are.
Identities: Katharopoulos et al. 2020, arXiv:2006.16236 (linear attention); Ali et al. 2024, arXiv:2403.01590
(selective state spaces); Yang et al. 2024, arXiv:2406.06484 (DeltaNet).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from circuitkit.functional.prefix_products import prefix_products


def diagonal_map(
    a: Inexact[Tensor, "*row step unit"], b: Inexact[Tensor, "*row step unit"], c: Inexact[Tensor, "*row step unit"]
) -> Inexact[Tensor, "*row unit step step"]:
    """alpha[t, s] = c_t (prod of a_r over s < r <= t) b_s, of  h_t = a_t h_{t-1} + b_t u_t,  y_t = c_t h_t.

    >>> half, one = torch.full((3, 1), 0.5), torch.ones(3, 1)
    >>> diagonal_map(half, one, one)[0]
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.2500, 0.5000, 1.0000]])
    """
    a, b, c = (x.transpose(-1, -2) for x in (a, b, c))
    return prefix_products(a.to(torch.result_type(a, b))).mul(c[..., :, None]).mul_(b[..., None, :])


def selective_map(
    a: Inexact[Tensor, "*row step channel state"],
    b: Inexact[Tensor, "*row step channel state"],
    c: Inexact[Tensor, "*row step channel state"],
) -> Inexact[Tensor, "*row channel step step"]:
    """The map of each channel of a state space layer: `diagonal_map` of its states, added up.

    States go one after the other, so that memory does not grow with their number. What all channels share (b and c in
    Mamba) is passed expanded.
    """
    first, *others = range(a.shape[-1])
    total = diagonal_map(a[..., first], b[..., first], c[..., first])
    for n in others:
        total += diagonal_map(a[..., n], b[..., n], c[..., n])
    return total


def linear_attention_map(
    q: Float[Tensor, "*row head step key"], k: Float[Tensor, "*row head step key"]
) -> Float[Tensor, "*row head step step"]:
    """alpha[t, s] = q_t . k_s for s <= t, of  S_t = S_{t-1} + v_t k_t^T,  y_t = S_t q_t,  with u = v.

    >>> linear_attention_map(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    tensor([[[3., 0.],
             [3., 3.]]])
    """
    return (q @ k.transpose(-1, -2)).tril()


def delta_map(
    q: Float[Tensor, "*row head step key"],
    k: Float[Tensor, "*row head step key"],
    beta: Float[Tensor, "*row head step"],
) -> Float[Tensor, "*row head step step"]:
    """alpha[t, s] = beta_s k_s^T (prod of (I - beta_r k_r k_r^T) over s < r <= t) q_t, of the delta rule

    S_t = S_{t-1} + beta_t (v_t - S_{t-1} k_t) k_t^T,  y_t = S_t q_t,  with u = v.

    What is left of each earlier key is updated in place, O(steps^2 key) in all.

    >>> key = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # written twice: the second value replaces the first
    >>> delta_map(key, key, torch.ones(1, 2))
    tensor([[[1., 0.],
             [0., 1.]]])
    """
    steps = k.shape[-2]
    left = k.new_zeros(k.shape)
    alpha = k.new_zeros(*k.shape[:-1], steps)
    for t in range(steps):
        key, strength = k[..., t, :], beta[..., t, None, None]
        known = left[..., :t, :]
        known -= strength * (known @ key[..., None]) * key[..., None, :]
        left[..., t, :] = beta[..., t, None] * key
        alpha[..., t, : t + 1] = (left[..., : t + 1, :] @ q[..., t, :, None]).squeeze(-1)
    return alpha


def fold(
    alpha: Inexact[Tensor, "*row unit step step"],
    *,
    taps: Float[Tensor, "unit lag"] | None = None,
    skip: Float[Tensor, " unit"] | None = None,
    gate: Float[Tensor, "*row step unit"] | None = None,
) -> Inexact[Tensor, "*row unit step step"]:
    """The map from what enters a causal convolution to what leaves the output gate, one unit at a time.

    u_s = sum over lags of taps[lag] x_{s - lag},   y_t = gate_t (sum over s of alpha[t, s] u_s + skip u_t)

    >>> fold(torch.eye(2)[None], taps=torch.tensor([[1.0, 3.0]]), skip=torch.tensor([1.0]))
    tensor([[[2., 0.],
             [6., 2.]]])
    """
    steps = alpha.shape[-1]
    if skip is not None:
        alpha = alpha + torch.diag_embed(skip[:, None].expand(-1, steps))
    if taps is not None:
        lags = range(min(taps.shape[1], steps))
        moved = sum(torch.diag_embed(taps[:, lag, None].expand(-1, steps - lag), -lag) for lag in lags)
        alpha = alpha @ moved.to(alpha.dtype)  # type: ignore[union-attr]
    return alpha if gate is None else gate.transpose(-1, -2)[..., None] * alpha
