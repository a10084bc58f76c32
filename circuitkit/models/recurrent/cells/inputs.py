"""What circuitkit's own cells share: links from what they read, linear blocks, products with fast weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Place
from circuitkit.models.recurrent.parts import Block, Getter, Link, See, Slot, Stage, Write


def input_links(place: Place, slots: tuple[str, ...], weight: Getter) -> tuple[Link, ...]:
    """Links from everything that a cell reads, one for each source, by the columns of one matrix."""
    links, first = [], 0
    for write in place.sources:
        links.append(Link(write.name, slots, _columns(weight, slice(first, first + write.size))))
        first += write.size
    return tuple(links)


def _columns(weight: Getter, columns: slice) -> Getter:
    return lambda: weight()[:, columns]


def constant(value: Tensor, like: Tensor) -> Tensor:
    """A weight as a step uses it: without its gradient, in the dtype and on the device of what was read."""
    return value.detach().to(like)


def linear_block(place: Place, name: str, links: tuple[Link, ...], size: int) -> Block:
    """A block without nonlinearity or memory, ``y = sum of W a``: of slot ``<name>_in`` and write ``l0.<name>``."""
    write = Write(f"{place.stem()}.{name}", size)

    def step(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        return {write.name: see(name, pre[f"{name}_in"])}

    slot = Slot(f"{name}_in", size, feeds=(write.name,))
    stage = Stage((slot,), (write,), links, step, (f"{name}_in_pre", name))
    return Block(place.layer, (stage,), stem=place.stem())


def rows_times(matrix: Float[Tensor, "*#lead size"], vector: Float[Tensor, "*#lead d"]) -> Float[Tensor, "*#lead row"]:
    """``S q`` for matrices that are stored row after row.

    >>> rows_times(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0]))
    tensor([3., 7.])
    """
    return (matrix.unflatten(-1, (-1, vector.shape[-1])) * vector[..., None, :]).sum(-1)


def outer(left: Float[Tensor, "*#lead row"], right: Float[Tensor, "*#lead d"]) -> Float[Tensor, "*#lead size"]:
    """``v k^T``, stored row after row.

    >>> outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    tensor([3., 4., 6., 8.])
    """
    return (left[..., :, None] * right[..., None, :]).flatten(-2)


def random_weight(rows: int, columns: int) -> nn.Parameter:
    """Normal with variance ``1 / columns``, so that each row's sum has the size of what it reads."""
    return nn.Parameter(torch.randn(rows, columns) / columns**0.5)


def stability(module: nn.Module) -> float | None:
    """Spectral radius of a recurrence ``h(t) = J h(t-1) + ...`` whose J is the same for every input.

    Above 1 the state grows without bound; at 1 it keeps everything. None where J depends on the input or the state.

    >>> from circuitkit.models.recurrent.cells.gated_linear import GatedLinear
    >>> cell = GatedLinear(2, hidden_size=3, gate_size=2, output_size=2)
    >>> with torch.no_grad():
    ...     _ = cell.lam.copy_(torch.tensor([0.5, -1.25, 1.0]))
    >>> stability(cell)
    1.25
    """
    radius = getattr(module, "spectral_radius", None)
    return None if radius is None else float(radius())
