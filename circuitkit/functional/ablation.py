"""What a removed edge or component carries: its value on the paired corrupt input, a mean over the task, zero, or
a learned constant (`circuitkit.methods.optimal_constants`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.norms import at_least_float32

CORRUPT_VALUES = ("counterfactual", "mean", "position-mean", "zero", "optimal")


def check_corrupt_value(name: str) -> None:
    """Raise OptionError unless ``name`` is one of `CORRUPT_VALUES`."""
    if name not in CORRUPT_VALUES:
        raise OptionError(f"got corrupt_value = {name!r}, expected one of {', '.join(CORRUPT_VALUES)}")


def task_mean(
    values: Iterable[tuple[Float[Tensor, "batch pos *rest"], Int[Tensor, " batch"]]], *, per_position: bool
) -> Float[Tensor, pos * rest]:
    """Mean of an activation over examples and real positions, or over examples at each position.

    Args:
        values: activations and the number of real positions of each row; padding is left out.
        per_position: keep the position axis (the longest batch's); else one vector, with a position axis of 1.

    >>> x = torch.tensor([[[1.0], [3.0]], [[5.0], [99.0]]])              # the second row has one real position
    >>> task_mean([(x, torch.tensor([2, 1]))], per_position=False).flatten().tolist()
    [3.0]
    >>> task_mean([(x, torch.tensor([2, 1]))], per_position=True).flatten().tolist()
    [3.0, 3.0]
    """
    total, count = torch.zeros(0), torch.zeros(0)
    for x, lengths in values:
        real = torch.arange(x.shape[1], device=x.device)[None] < lengths.to(x.device)[:, None]
        real = real.reshape(*real.shape, *[1] * (x.dim() - 2))
        part, n = (at_least_float32(x) * real).sum(0).cpu().double(), real.sum(0).cpu().double()
        longest = max(len(total), len(part))
        total, count = (
            _longer(total, longest, part) + _longer(part, longest, part),
            _longer(count, longest, n) + _longer(n, longest, n),
        )
    if not per_position:
        total, count = total.sum(0, keepdim=True), count.sum(0, keepdim=True)
    return total / count.clamp(min=1)


def _longer(x: Tensor, length: int, like: Tensor) -> Tensor:
    out = like.new_zeros(length, *like.shape[1:])
    out[: len(x)] = x if len(x) else 0
    return out
