"""DeltaNet, fast weights with the delta rule (Schlag et al. 2021, arXiv:2102.11174; Irie et al. 2021).

    k, q = softmax(W_k x), softmax(W_q x)    v = W_v x    beta = sigmoid(w_beta x + b_beta)
    S(t) = S(t-1) + beta (v - S(t-1) k) k^T           what was stored under k is replaced, not added to
    y(t) = S(t) q

One writer per row of S: value unit i owns row i. With such keys and ``0 < beta < 1`` no step enlarges what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.inputs import input_links, outer, random_weight, rows_times
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


class DeltaNet(nn.Module):
    """One head of DeltaNet, step by step.

    Args:
        input_size: numbers read at each step.
        key_size: numbers in a key and in a query.
        value_size: numbers in a value, and given at each step.

    >>> DeltaNet(3, key_size=4, value_size=2)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 2])
    """

    def __init__(self, input_size: int, key_size: int, value_size: int):
        super().__init__()
        self.input_size, self.key_size, self.value_size = input_size, key_size, value_size
        self.W_k, self.W_q = (random_weight(key_size, input_size) for _ in range(2))
        self.W_v = random_weight(value_size, input_size)
        self.w_beta = random_weight(1, input_size)
        self.b_beta = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step value"]:
        """Outputs at every step, from fast weights of zeros."""
        S = x.new_zeros(len(x), self.value_size, self.key_size)
        outputs = []
        for x_t in x.unbind(1):
            k, q = torch.softmax(x_t @ self.W_k.T, -1), torch.softmax(x_t @ self.W_q.T, -1)
            v, beta = x_t @ self.W_v.T, torch.sigmoid(x_t @ self.w_beta.T + self.b_beta)
            recalled = (S * k[:, None, :]).sum(-1)
            S = S + (beta * (v - recalled))[:, :, None] * k[:, None, :]
            outputs.append((S * q[:, None, :]).sum(-1))
        return torch.stack(outputs, 1)


@cell(DeltaNet, example=lambda: DeltaNet(3, 4, 2))
def delta_net(module: DeltaNet, place: Place) -> Described:
    """The fast weights, and what the query reads from them."""
    rows, d = module.value_size, module.key_size
    S, y = Write(f"{place.stem()}.S", rows, d), Write(f"{place.stem()}.y", rows)

    def program(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        k, beta = see("k", torch.softmax(pre["k"], -1)), see("beta", torch.sigmoid(pre["beta"]))
        recalled = see("recalled", rows_times(pre["carry"], k))
        new = see("new", outer(beta * (pre["v"] - recalled), k))
        return {S.name: see("S", pre["carry"] + new)}

    def read(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        q = see("q", torch.softmax(pre["q"], -1))
        return {y.name: see("y", rows_times(pre["memory"], q))}

    writing = Stage(
        (
            Slot("k", d, feeds_all=(S.name,)),
            Slot("v", rows, feeds=(S.name,)),
            Slot("beta", 1, feeds_all=(S.name,), bias=lambda: module.b_beta),
            Slot("carry", rows, d, feeds=(S.name,)),
        ),
        (S,),
        (
            *input_links(place, ("k",), lambda: module.W_k),
            *input_links(place, ("v",), lambda: module.W_v),
            *input_links(place, ("beta",), lambda: module.w_beta),
            Link(S.name, ("carry",), lag=1),
        ),
        program,
        ("k_pre", "v_pre", "beta_pre", "carry_pre", "k", "beta", "recalled", "new", "S"),
    )
    reading = Stage(
        (Slot("memory", rows, d, feeds=(y.name,)), Slot("q", d, feeds_all=(y.name,))),
        (y,),
        (Link(S.name, ("memory",)), *input_links(place, ("q",), lambda: module.W_q)),
        read,
        ("memory_pre", "q_pre", "q", "y"),
    )
    return Described(tuple(Block(place.layer, (stage,), stem=place.stem()) for stage in (writing, reading)), (y.name,))
