"""Linear attention, a fast-weight programmer (Katharopoulos et al. 2020, arXiv:2006.16236; Schlag et al. 2021).

    k, v, q = W_k x, W_v x, W_q x
    S(t) = S(t-1) + v(t) k(t)^T                       one writer per row of S: value unit i owns row i
    y(t) = S(t) q(t)

Without softmax, normalisation and feature map. A row of S gets its value from one unit and its keys from all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.inputs import input_links, outer, random_weight, rows_times
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


class LinearAttention(nn.Module):
    """One head of causal linear attention, step by step.

    Args:
        input_size: numbers read at each step.
        key_size: numbers in a key and in a query.
        value_size: numbers in a value, and given at each step.

    >>> LinearAttention(3, key_size=4, value_size=2)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 2])
    """

    def __init__(self, input_size: int, key_size: int, value_size: int):
        super().__init__()
        self.input_size, self.key_size, self.value_size = input_size, key_size, value_size
        self.W_k, self.W_q = (random_weight(key_size, input_size) for _ in range(2))
        self.W_v = random_weight(value_size, input_size)

    def forward(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step value"]:
        """Outputs at every step, from fast weights of zeros."""
        S = x.new_zeros(len(x), self.value_size, self.key_size)
        outputs = []
        for x_t in x.unbind(1):
            k, v, q = x_t @ self.W_k.T, x_t @ self.W_v.T, x_t @ self.W_q.T
            S = S + v[:, :, None] * k[:, None, :]
            outputs.append((S * q[:, None, :]).sum(-1))
        return torch.stack(outputs, 1)

    def spectral_radius(self) -> float:
        """1: nothing is forgotten."""
        return 1.0


@cell(LinearAttention, example=lambda: LinearAttention(3, 4, 2))
def linear_attention(module: LinearAttention, place: Place) -> Described:
    """The fast weights, and what the query reads from them."""
    rows, d = module.value_size, module.key_size
    S, y = Write(f"{place.stem()}.S", rows, d), Write(f"{place.stem()}.y", rows)

    def program(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        return {S.name: see("S", pre["carry"] + see("new", outer(pre["v"], pre["k"])))}

    def read(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        return {y.name: see("y", rows_times(pre["memory"], pre["q"]))}

    writing = Stage(
        (
            Slot("k", d, feeds_all=(S.name,)),
            Slot("v", rows, feeds=(S.name,)),
            Slot("carry", rows, d, feeds=(S.name,)),
        ),
        (S,),
        (
            *input_links(place, ("k",), lambda: module.W_k),
            *input_links(place, ("v",), lambda: module.W_v),
            Link(S.name, ("carry",), lag=1),
        ),
        program,
        ("k_pre", "v_pre", "carry_pre", "new", "S"),
    )
    reading = Stage(
        (Slot("memory", rows, d, feeds=(y.name,)), Slot("q", d, feeds_all=(y.name,))),
        (y,),
        (Link(S.name, ("memory",)), *input_links(place, ("q",), lambda: module.W_q)),
        read,
        ("memory_pre", "q_pre", "y"),
    )
    return Described(tuple(Block(place.layer, (stage,), stem=place.stem()) for stage in (writing, reading)), (y.name,))
