"""How far a state is from the states that a network visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError

# A visited state is itself nearer than the typical spacing to another one in nine cases of ten.
_TYPICAL = 0.9
_CHUNK = 2**22  # distances held at once


@dataclass(frozen=True, eq=False)
class Distance:
    """Nearest-neighbour distances, made by `distance_to_visited`.

    Args:
        nearest: Euclidean distance of each state to the visited state nearest to it.
        neighbour: which visited state that is.
        spacing: the same distance for the visited states among themselves, 9th decile.
    """

    nearest: Float[Tensor, "*row"]
    neighbour: Int[Tensor, "*row"]
    spacing: float

    @property
    def relative(self) -> Float[Tensor, "*row"]:
        """Distance in spacings: above 1, nine visited states in ten have a nearer neighbour than this state has."""
        return self.nearest / self.spacing


def distance_to_visited(states: Float[Tensor, "*row state"], visited: Float[Tensor, "n state"]) -> Distance:
    """How far states are from those that were visited, against how far apart these are.

        nearest(s) = min over v of |s - v|        spacing = 9th decile over v of  min over v' != v of |v - v'|

    A high decile and no median: a network that rests at a few fixed points visits them often, and the median distance
    between its states is then next to nothing. Visited states that are equal to the last bit count once.

    Raises:
        OptionError: if fewer than two different states were visited, the sizes differ, or a number is not finite.

    >>> distance_to_visited(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])).relative
    tensor([3.])
    """
    if states.shape[-1] != visited.shape[-1]:
        raise OptionError(f"got states of {states.shape[-1]} numbers and visited ones of {visited.shape[-1]}")
    if not (states.isfinite().all() and visited.isfinite().all()):
        raise OptionError("got states that are not finite; a distance needs finite numbers")
    different = visited.unique(dim=0)
    if len(different) < 2:
        raise OptionError(f"got {len(visited)} visited states, {len(different)} of them different; give at least two")
    nearest, neighbour = _nearest(states.reshape(-1, states.shape[-1]).to(visited), visited, apart=False)
    among, _ = _nearest(different, different, apart=True)
    spacing = float(torch.quantile(among.double(), _TYPICAL)) if len(among) < 2**24 else float(among.max())
    return Distance(nearest.reshape(states.shape[:-1]), neighbour.reshape(states.shape[:-1]), spacing)


def _nearest(states: Tensor, visited: Tensor, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Smallest distances and their places, without large matrices; apart: a state is no neighbour of itself."""
    rows = max(1, _CHUNK // len(visited))
    nearest, neighbour = [], []
    for first in range(0, len(states), rows):
        # Differences, not the expanded square: neighbours that nearly coincide must not be lost in rounding.
        gaps = torch.cdist(states[first : first + rows], visited, compute_mode="donot_use_mm_for_euclid_dist")
        if apart:
            gaps.diagonal(first).fill_(float("inf"))
        found = gaps.min(1)
        nearest.append(found.values)
        neighbour.append(found.indices)
    empty = visited.new_zeros(0)
    return (torch.cat(nearest), torch.cat(neighbour)) if nearest else (empty, empty.long())
