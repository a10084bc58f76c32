"""How a block was called in a recorded run, and the same call for other rows."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The stream a block was called with, and its other arguments."""
    if args:
        return args[0], (args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def repeat_call(call: Call, rows: Int[Tensor, " row"], batch: int, memo: dict[int, Any] | None = None) -> Call:
    """A block's arguments for other rows: tensors that carry the batch first are indexed, the rest kept.

    A tensor of one axis is never per example (positions count along the sequence), nor is one of first size 1.
    """
    memo = {} if memo is None else memo

    def repeat(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(repeat(v) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != batch or batch == 1:
            return value
        if id(value) not in memo:
            memo[id(value)] = value.index_select(0, rows.to(value.device))
        return memo[id(value)]

    args, kwargs = call
    return tuple(repeat(a) for a in args), {k: repeat(v) for k, v in kwargs.items()}
