"""The plainest recurrent network: an embedding or none, one recurrent module, a linear read-out at every step."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.errors import OptionError


class RecurrentNet(nn.Module):
    """A recurrent module between an optional embedding and a linear read-out.

    Args:
        cell: a recurrent module called with ``[batch, step, size]`` that returns the outputs at every step, or a
            tuple that begins with them; it names its input size ``input_size``.
        n_out: outputs at every step.
        embedding: a table that turns token ids into the cell's inputs; None if the network reads numbers.
        bias: whether the read-out has a bias.

    Raises:
        OptionError: if the cell takes time first, or its input size is not that of the embedding.

    >>> net = RecurrentNet(nn.GRU(3, 4, batch_first=True), n_out=2)
    >>> net(torch.zeros(5, 7, 3)).shape
    torch.Size([5, 7, 2])
    """

    def __init__(self, cell: nn.Module, n_out: int, embedding: nn.Embedding | None = None, *, bias: bool = True):
        super().__init__()
        if getattr(cell, "batch_first", True) is not True:
            raise OptionError(f"got a {type(cell).__name__} that takes time first; build it with batch_first=True")
        size = int(cell.input_size)  # type: ignore[arg-type]
        if embedding is not None and embedding.embedding_dim != size:
            raise OptionError(f"the embedding gives {embedding.embedding_dim} numbers, the cell reads {size}")
        with torch.no_grad():
            width = first_of(cell(next(cell.parameters()).new_zeros(1, 1, size))).shape[-1]
        self.embedding = embedding
        self.cell = cell
        self.readout = nn.Linear(width, n_out, bias=bias)

    def forward(self, inputs: Tensor) -> Float[Tensor, "batch step out"]:
        """Outputs at every step for token ids ``[batch, step]``, or numbers ``[batch, step, size]``."""
        vectors = inputs if self.embedding is None else self.embedding(inputs)
        return self.readout(first_of(self.cell(vectors)))  # type: ignore[no-any-return]


def first_of(made: Any) -> Tensor:
    """The outputs at every step of what a recurrent module returns."""
    return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]
