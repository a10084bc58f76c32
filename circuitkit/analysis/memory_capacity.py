"""How many past inputs a network's state holds, as a linear read-out can tell.

    MC = sum over lags k = 1 ... K of  r^2(x(t-k), y_k(t)),     y_k = ridge regression of x(t-k) on the state

Jaeger (2001), Short term memory in echo state networks, GMD report 152. For independent inputs a linear network of n
units has MC <= n, and a delay line of n units has MC = n. r^2 is measured on steps that the read-outs did not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import OptionError

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class MemoryCapacity:
    """Squared correlations of delayed inputs with their read-outs.

    Args:
        squares: r^2 for lags 1, 2, ..., on held-out steps; 0 where read-out and input correlate negatively.
        n_held_out: how many steps they were measured on.
        n_units: numbers in the state.
    """

    squares: Float[Tensor, " lag"]
    n_held_out: int
    n_units: int

    @property
    def total(self) -> float:
        """MC. With no memory at all, chance gives about ``lags / (2 * held-out steps)``."""
        return float(self.squares.sum())

    def plot(self) -> go.Figure:
        """r^2 against the lag."""
        from circuitkit.figures.memory_capacity import memory_capacity_figure

        return memory_capacity_figure(self)


def memory_capacity(
    states: Float[Tensor, "step state"],
    x: Float[Tensor, " step"],
    *,
    lags: int,
    ridge: float = 1e-8,
    washout: int = 100,
    held_out: float = 0.5,
) -> MemoryCapacity:
    """Memory capacity of a run on independent random inputs, in float64.

    Args:
        states: the state after each step.
        x: the input at each step: independent and identically distributed, or the bound on MC does not hold.
        lags: the longest lag; beyond the network's memory r^2 is chance.
        ridge: penalty, in units of the mean variance of a number of the state.
        washout: steps left out at the beginning, at least ``lags``.
        held_out: share of the steps, at the end, on which r^2 is measured.

    Raises:
        OptionError: if states and inputs differ in length, the run is too short, or an option is out of range.

    >>> x = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    >>> delays = torch.stack([x.roll(k) for k in (1, 2, 3)], 1)
    >>> round(memory_capacity(delays, x, lags=5).total, 2)
    3.0
    """
    n = len(x)
    if len(states) != n or not states.isfinite().all() or not x.isfinite().all():
        raise OptionError(f"got {len(states)} states for {n} inputs; give one finite state for each finite input")
    if lags < 1 or ridge < 0 or not 0 < held_out < 1:
        raise OptionError(f"got lags={lags}, ridge={ridge}, held_out={held_out}; expected >= 1, >= 0, between 0 and 1")
    first = max(washout, lags)
    cut = n - round((n - first) * held_out)
    if cut - first <= states.shape[1] or n - cut < 10:
        raise OptionError(
            f"{n} steps leave {cut - first} to fit {states.shape[1]} numbers and {n - cut} to measure; run longer"
        )
    states, x = states.detach().double(), x.detach().double()
    delayed = torch.stack([x[first - k : n - k] for k in range(1, lags + 1)], 1)
    states, cut = states[first:], cut - first
    middle, goal = states[:cut].mean(0), delayed[:cut].mean(0)
    centred = states[:cut] - middle
    cov = centred.T @ centred / cut
    penalty = ridge * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    # The pseudo-inverse: dead units, or two that are equal, leave a read-out undetermined but not worse.
    maps = torch.linalg.pinv(cov + penalty, hermitian=True) @ (centred.T @ (delayed[:cut] - goal) / cut)
    made, wanted = (states[cut:] - middle) @ maps, delayed[cut:]
    made, wanted = made - made.mean(0), wanted - wanted.mean(0)
    norms = made.norm(dim=0) * wanted.norm(dim=0)
    r = torch.where(norms > 0, (made * wanted).sum(0) / norms.clamp_min(1e-300), 0.0)
    return MemoryCapacity(r.clamp_min(0).square(), n - first - cut, states.shape[1])
