"""Certificates that a leaky network forgets where it began: all its trajectories under one input come together.

    tau dh/dt = -h + phi(W h + u)    or    -h + W phi(h) + u            (1, in units of tau)
    h(t+1) = (1 - a) h(t) + a phi(W h(t) + u)    or with W phi(h)       (2, a in (0, 1]; a = 1: a simple network)

Jacobians of (1) are -1 + D W or -1 + W D with D diagonal; slopes of phi in [0, 1] (tanh, ReLU, the sigmoid) put D's
numbers there. If a norm |.|_P shrinks at rate b under every such Jacobian, then |h - h'|_P <= exp(-b t) |h - h'|_P(0)
whatever u(t) does; for (2) a factor below 1 per step takes the place of exp(-b). So a network with two stable states
can have no certificate. Every condition is sufficient, none is necessary: without one nothing has been shown.

spectral-norm    |W|_2 < 1. |D W|_2 <= |W|_2, so b = 1 - |W|_2 in the Euclidean norm.
absolute-value   |W| - 1 (entrywise) has all eigenvalues left of 0: rho(|W|) < 1. Then p = (1 - |W|)^-1 1 > 0 has
                 |W| p < p, and max_i sum_j |W_ij| p_j / p_i bounds D W and W D in the norm max_i |h_i| / p_i;
                 b = 1 - that bound.
diagonal-metric  |S W S^-1|_2 < 1 for some positive diagonal S. D and S commute, so b = 1 - |S W S^-1|_2 in the norm
                 |S h|_2. Contains both above: S = 1, and for rho(|W|) < 1 with Perron vectors l, r of |W|,
                 S = (l / r)^(1/2) gives | S |W| S^-1 |_2 = rho(|W|). S is searched for by gradient
                 steps from the better of the two.
symmetric        W = W^T with largest eigenvalue m < 1. With M = 2 - W > 0, J = -1 + D W and 0 <= D <= 1:
                 M J + J^T M = -2 M + 2 D - 2 (1 - W) D (1 - W) <= -2 M + 2 = -2 (1 - W) < 0, so
                 b = (1 - m) / (2 - m) in the norm (h^T M h)^(1/2); for -1 + W D in that of M^-1, by multiplying
                 the same matrix with M^-1 from both sides. Needs slopes that are not negative.

The first three need only slopes between -1 and 1. For (2) their factor is 1 - a b. For `symmetric` it is
(1 - 2 a b + a^2 c^2)^(1/2) with c = 1 + |W|_2 cond(M)^(1/2) >= |J|_M, below 1 only for small a.

The question is that of Kozachkov, Ennis, Slotine (2022), RNNs of RNNs, arXiv:2106.08928, who have conditions of these
four kinds. What is claimed here is what is derived above; it is tested against sampled Jacobians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import OptionError

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SEARCH_STEPS = 200


@dataclass(frozen=True, eq=False)
class Certificate:
    """One condition and whether it holds.

    Args:
        name: ``spectral-norm``, ``absolute-value``, ``diagonal-metric`` or ``symmetric``.
        margin: by how much the condition holds (1 minus the number that must stay below 1); negative where it fails,
            not a number where the condition does not apply.
        rate: b per tau for (1), or None where the condition fails.
        factor: the factor per step for (2), or None where nothing is certified.
        norm: ``max`` for ``max_i |scale_ij h_j|``, ``euclidean`` for ``|scale h|_2``.
        scale: the matrix of that norm, for ``phi(W h + u)``.
    """

    name: str
    margin: float
    rate: float | None
    factor: float | None
    norm: str
    scale: Float[Tensor, "unit unit"] | None

    @property
    def holds(self) -> bool:
        """Whether the network is certified: in continuous time without a leak, step by step with one."""
        return self.rate is not None and self.factor is not None


@dataclass(frozen=True, eq=False)
class Contraction:
    """All certificates for one recurrent weight.

    Args:
        leak: a of (2), or None for continuous time.
        certificates: in the order of the page's list.
    """

    leak: float | None
    certificates: tuple[Certificate, ...]

    @property
    def certified(self) -> bool:
        """Whether any certificate holds. If none does, nothing has been shown."""
        return any(certificate.holds for certificate in self.certificates)

    def __getitem__(self, name: str) -> Certificate:
        return next(certificate for certificate in self.certificates if certificate.name == name)

    def plot(self) -> go.Figure:
        """The margin of every condition."""
        from circuitkit.figures.contraction import contraction_figure

        return contraction_figure(self)


def contraction(weight: Float[Tensor, "unit unit"], *, leak: float | None = None) -> Contraction:
    """Which of four sufficient conditions certify that a leaky network contracts, whatever its input.

    Args:
        weight: W, ``[to, from]``. The nonlinearity must have slopes between 0 and 1: divide by the largest slope, and
            multiply W by it, where it is steeper.
        leak: a of (2), 1 for ``nn.RNN``; None for continuous time.

    Raises:
        OptionError: if the weight is not square or not finite, or the leak not in (0, 1].

    >>> contraction(0.9 * torch.eye(3)).certified, contraction(1.1 * torch.eye(3)).certified
    (True, False)
    """
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1] or not weight.isfinite().all():
        raise OptionError(f"got a weight of shape {tuple(weight.shape)}; give a square one of finite numbers")
    if leak is not None and not 0 < leak <= 1:
        raise OptionError(f"got leak={leak}; expected a number above 0 and at most 1, or None for continuous time")
    w = weight.detach().double()
    found = (_spectral_norm(w, leak), _absolute_value(w, leak), _diagonal_metric(w, leak), _symmetric(w, leak))
    return Contraction(leak, found)


def _plain(name: str, bound: float, leak: float | None, norm: str, scale: Tensor | None) -> Certificate:
    """A condition that bounds ``D W`` by a number in one norm."""
    rate = 1 - bound
    if not rate > 0:
        return Certificate(name, rate, None, None, norm, None)
    return Certificate(name, rate, rate, math.exp(-rate) if leak is None else 1 - leak * rate, norm, scale)


def _spectral_norm(w: Tensor, leak: float | None) -> Certificate:
    bound = float(torch.linalg.matrix_norm(w, 2))
    return _plain("spectral-norm", bound, leak, "euclidean", torch.eye(len(w)).to(w))


def _absolute_value(w: Tensor, leak: float | None) -> Certificate:
    radius = float(torch.linalg.eigvals(w.abs()).abs().max())
    if radius >= 1:
        return _plain("absolute-value", radius, leak, "max", None)
    p = torch.linalg.solve(torch.eye(len(w)).to(w) - w.abs(), torch.ones(len(w)).to(w))
    # Bounded by what p gives in fact, not by the radius: the certificate then stands on its own.
    bound = float((w.abs() @ p / p).max()) if bool((p > 0).all()) else math.inf
    return _plain("absolute-value", bound, leak, "max", torch.diag(1 / p))


def _diagonal_metric(w: Tensor, leak: float | None) -> Certificate:
    start = min((torch.zeros(len(w)).to(w), _perron_scale(w.abs())), key=lambda scale: _norm(w, scale))
    scale = _search(w, start)
    return _plain("diagonal-metric", _norm(w, scale), leak, "euclidean", torch.diag(scale.exp()))


def _norm(w: Tensor, log_scale: Tensor) -> float:
    return float(torch.linalg.matrix_norm(w * (log_scale[:, None] - log_scale[None, :]).exp(), 2))


def _perron_scale(absolute: Tensor) -> Tensor:
    """log S = log(l / r) / 2 with the Perron vectors of |W|, a little noise added so that both are positive."""
    positive = absolute + 1e-6 * absolute.mean().clamp_min(1e-30)
    left = right = torch.ones(len(absolute)).to(absolute)
    for _ in range(200):
        left, right = positive.T @ left, positive @ right
        left, right = left / left.norm(), right / right.norm()
    return (left.log() - right.log()) / 2


def _search(w: Tensor, start: Tensor) -> Tensor:
    """Gradient steps on log |S W S^-1|_2 over log S, in which it is convex; the best that was met."""
    log_scale, best, least = start.clone().requires_grad_(), start, _norm(w, start)
    optimiser = torch.optim.Adam([log_scale], lr=0.03)
    for _ in range(_SEARCH_STEPS):
        with torch.enable_grad():
            size = torch.linalg.matrix_norm(w * (log_scale[:, None] - log_scale[None, :]).exp(), 2)
            optimiser.zero_grad()
            size.backward()
        if float(size.detach()) < least:
            best, least = log_scale.detach().clone(), float(size.detach())
        optimiser.step()
    return best


def _symmetric(w: Tensor, leak: float | None) -> Certificate:
    if not torch.allclose(w, w.T, rtol=0, atol=1e-12 * float(w.abs().max())):
        return Certificate("symmetric", math.nan, None, None, "euclidean", None)
    values = torch.linalg.eigvalsh(w)
    top = float(values.max())
    if top >= 1:
        return Certificate("symmetric", 1 - top, None, None, "euclidean", None)
    rate = (1 - top) / (2 - top)
    reach = 1 + float(values.abs().max()) * math.sqrt((2 - float(values.min())) / (2 - top))
    square = math.exp(-2 * rate) if leak is None else 1 - 2 * leak * rate + (leak * reach) ** 2
    factor = math.sqrt(square) if square < 1 else None
    root = torch.linalg.cholesky(2 * torch.eye(len(w)).to(w) - w, upper=True)
    return Certificate("symmetric", 1 - top, rate, factor, "euclidean", root)
