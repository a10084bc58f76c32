"""Numbers of positions, brought together by spans."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError

AGGREGATES = ("sum", "mean", "abs")


def check_aggregate(name: str) -> None:
    """Raise OptionError unless ``name`` is one of `AGGREGATES`."""
    if name not in AGGREGATES:
        raise OptionError(f"got aggregate = {name!r}, expected one of {', '.join(AGGREGATES)}")


def by_span(
    values: Float[Tensor, "batch pos *rest"], spans: Int[Tensor, "batch pos"], n: int, aggregate: str = "sum"
) -> Float[Tensor, "batch span *rest"]:
    """One number for each of ``n`` spans: ``sum`` and ``mean`` over its positions, or the sum of magnitudes (``abs``).

    An empty span has 0; positions of span -1 (padding) count nowhere.

    >>> by_span(torch.tensor([[1.0, -3.0, 5.0, 9.0]]), torch.tensor([[0, 0, 2, -1]]), 3, "mean")
    tensor([[-1.,  0.,  5.]])
    """
    member = (spans[:, None] == torch.arange(n, device=spans.device)[:, None]).to(values.dtype)
    values = values.abs() if aggregate == "abs" else values
    total = (
        (member @ values.flatten(2)).unflatten(2, values.shape[2:])
        if values.dim() > 2
        else (member @ values[..., None])[..., 0]
    )
    if aggregate != "mean":
        return total
    lengths = member.sum(2).clamp(min=1)
    return total / lengths.reshape(*lengths.shape, *[1] * (total.dim() - 2))


def position_scores(
    delta: Float[Tensor, "src batch pos d"], gradient: Float[Tensor, "dst batch pos d"]
) -> Float[Tensor, "batch pos src dst"]:
    """First-order score of every edge at every position of every example, in one batched product.

    >>> position_scores(torch.ones(1, 1, 2, 1), torch.tensor([[[[3.0], [4.0]]]])).flatten().tolist()
    [3.0, 4.0]
    """
    product = delta.flatten(1, 2).transpose(0, 1) @ gradient.flatten(1, 2).permute(1, 2, 0)
    return product.unflatten(0, delta.shape[1:3])
