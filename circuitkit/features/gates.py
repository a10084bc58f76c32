"""An MLP as a linear map: each neuron's ratio of output to pre-activation held at its value in one run.

    hidden_n = c_n pre_n        c_n = act(pre_n) / pre_n, or act(gate_n) where there is a gate

He et al. read contributions to MLP outputs in this way. It is exact for the run itself, and only there.
Reference: He et al. 2024, "Dictionary learning improves patch-free circuit discovery", arXiv:2402.12201.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.features.frozen import FrozenLinear, FrozenNorm
from circuitkit.models.wiring import MlpParts


def frozen_gates(
    parts: MlpParts, x: Float[Tensor, "pos d"]
) -> tuple[FrozenLinear, Float[Tensor, "pos d"], Float[Tensor, "pos d"]]:
    """An MLP with each neuron's ratio of output to pre-activation held fixed: its map, its constant, its output."""

    def of(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        y = x @ weight.to(x)
        return y if bias is None else y + bias.to(x)

    pre = of(parts.w_in, parts.b_in)
    if parts.gate is None:
        factor = torch.where(pre == 0, torch.zeros_like(pre), parts.activation(pre) / pre)
    else:
        factor = parts.activation(of(parts.w_gate, parts.b_gate))
    w_out = parts.w_out.to(x)
    b_out = torch.zeros_like(x) if parts.b_out is None else parts.b_out.to(x).expand_as(x)
    made = (factor * pre) @ w_out + b_out
    post = FrozenNorm.at(parts.post_norm, made)
    offset = b_out if parts.b_in is None else b_out + (factor * parts.b_in.to(x)) @ w_out
    gates = FrozenLinear((parts.w_in.to(x), w_out), (factor,), post)
    return gates, post.push(offset[None])[0] + post.bias(x), post.push(made[None])[0] + post.bias(x)
