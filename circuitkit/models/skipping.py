"""Leaving out projections whose result is replaced anyway.

Where hooks replace all queries, keys and values of a block, and the stream behind its heads is not read, a third of the
block's work would be thrown away. Inside `without_products`, linear maps with the given weights return zeros at once.
A module that computes them in another way is not noticed, and only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Key = tuple[int, int]


class without_products(TorchFunctionMode):
    """While entered, products with these weights give zeros.

    Args:
        weights: of whole projections, in any view. Several that lie in one tensor are also found as that tensor, if it
            holds nothing else.

    >>> linear = torch.nn.Linear(2, 3)
    >>> with without_products([linear.weight.T]):
    ...     linear(torch.ones(1, 2))
    tensor([[0., 0., 0.]])
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        together: dict[int, list[Tensor]] = {}
        for weight in weights:
            together.setdefault(weight.untyped_storage().data_ptr(), []).append(weight)
        self.keys = {_key(weight) for group in together.values() for weight in group}
        for start, group in together.items():
            numel = sum(weight.numel() for weight in group)
            if group[0].untyped_storage().nbytes() == numel * group[0].element_size():
                self.keys.add((start, numel))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and _key(args[1]) in self.keys:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        if func is torch.addmm and len(args) > 2 and _key(args[2]) in self.keys:
            return args[1].new_zeros(args[1].shape[0], args[2].shape[1])
        return func(*args, **(kwargs or {}))


def _key(weight: Tensor) -> Key:
    return weight.data_ptr(), weight.numel()
