"""What training minimises, for each activation.

    loss = FVU + sparsity / d * mean over the batch of penalty(f) + auxiliary terms       d: numbers written
    FVU  = |y - y_hat|^2 / |y - mean y|^2                                      fraction of variance unexplained

    relu        penalty = sum f_i                        L1; shrinks an activation by sparsity / 2
    gated       penalty = sum relu(gate_i), and the FVU of the gate's own reconstruction through a frozen decoder
    jumprelu    penalty = sum H(pre_i - threshold_i), or sum tanh(4 f_i); worth it for a latent if f^2 > sparsity
    topk, batchtopk   no penalty; dead latents are trained to explain what the others leave (1/32 of its FVU)

Inputs and outputs are in units in which each number has variance 1, and decoder rows have norm 1. The steps of
``jumprelu`` have no slope; their thresholds learn by a kernel estimate of it (rectangle of width ``BANDWIDTH``).

Papers: Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders" and "Jumping Ahead";
Gao et al. 2024, "Scaling and evaluating sparse autoencoders"; Bussmann et al. 2024, "BatchTopK Sparse Autoencoders".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.dictionaries.sparse_coder import ACTIVATIONS, SparseCoder

BANDWIDTH = 0.5
AUXILIARY = 1 / 32
PENALTIES = ("step", "tanh")

Latents = Float[Tensor, "batch latent"]


class _Jump(torch.autograd.Function):
    """pre where pre > threshold, else 0; the threshold's slope by a kernel estimate."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        return gradients[0] * (pre > threshold), -(threshold * near * gradients[0]).sum(0)


class _Step(torch.autograd.Function):
    """1 where pre > threshold, else 0; the threshold's slope by a kernel estimate."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        return None, -(near * gradients[0]).sum(0)


def training_latents(coder: SparseCoder, pre: Latents) -> Latents:
    """Latents as they are in training: with slopes for thresholds, and the top k taken over the batch."""
    if coder.activation == "jumprelu":
        return _Jump.apply(pre, coder.threshold)
    if coder.activation == "batchtopk":
        assert coder.k is not None
        flat = pre.relu().flatten()
        values, index = flat.topk(min(coder.k * len(pre), flat.numel()))
        return torch.zeros_like(flat).scatter(0, index, values).view_as(pre)
    return ACTIVATIONS[coder.activation](coder, pre)


def _l1(coder: SparseCoder, pre: Latents, latents: Latents, kind: str) -> Tensor:
    return latents.sum(-1).mean()


def _gate(coder: SparseCoder, pre: Latents, latents: Latents, kind: str) -> Tensor:
    return pre.relu().sum(-1).mean()


def _l0(coder: SparseCoder, pre: Latents, latents: Latents, kind: str) -> Tensor:
    active = _Step.apply(pre, coder.threshold) if kind == "step" else (4 * latents).tanh()
    return active.sum(-1).mean()


def _nothing(coder: SparseCoder, pre: Latents, latents: Latents, kind: str) -> Tensor:
    return pre.new_zeros(())


_PENALTY: dict[str, Callable[[SparseCoder, Latents, Latents, str], Tensor]] = {
    "relu": _l1,
    "gated": _gate,
    "jumprelu": _l0,
    "topk": _nothing,
    "batchtopk": _nothing,
}


def penalty(coder: SparseCoder, pre: Latents, latents: Latents, kind: str) -> Tensor:
    """How much is active, as the activation counts it; ``kind`` is ``step`` or ``tanh`` (of jumprelu)."""
    return _PENALTY[coder.activation](coder, pre, latents, kind)


def gate_reconstruction(coder: SparseCoder, pre: Latents) -> Float[Tensor, "batch out d_out"]:
    """What the gate alone would write, through a decoder that does not learn from it."""
    return torch.einsum("bn,lnd->bld", pre.relu(), coder.W_dec.detach()) + coder.b_dec.detach()


def dead_reconstruction_loss(
    coder: SparseCoder, pre: Latents, dead: Bool[Tensor, " latent"], left: Float[Tensor, "batch out d_out"]
) -> Tensor:
    """FVU of what the strongest dead latents make of what the living ones leave, scaled by 1/32."""
    n = min(int(dead.sum()), max(1, coder.d_out // 2))
    values, index = pre.masked_fill(~dead, -torch.inf).topk(n, -1)
    latents = torch.zeros_like(pre).scatter(-1, index, values.relu())
    written = torch.einsum("bn,lnd->bld", latents, coder.W_dec)
    return AUXILIARY * (left.detach() - written).square().sum() / left.detach().square().sum().clamp(min=1e-12)
