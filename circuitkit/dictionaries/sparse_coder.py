"""Sparse coders: SAE, transcoder and cross-layer transcoder are one formula with different inputs and targets.

    pre = (x - b_in) W_enc + b_enc            b_in: b_dec if ``subtract_b_dec`` (an SAE's habit), else 0
    f   = activation(pre)                     ReLU, top k, a threshold, or a gate
    y_l = f W_dec[l] + b_dec[l] + x W_skip    one decoder, or one for each layer that is written

Activations:

    relu        max(pre, 0)
    topk        the k largest of each input, if positive
    batchtopk   in training the k * batch largest of the batch; afterwards a threshold, as jumprelu
    jumprelu    pre where pre > threshold, else 0
    gated       (gate > 0) * max(magnitude, 0); gate = (x - b_in) W_enc + b_gate, magnitude = ... * exp(r_mag) + b_mag
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.errors import OptionError

Values = Float[Tensor, "*batch d_in"]
Latents = Float[Tensor, "*batch latent"]


class SparseCoder(nn.Module):
    """Encoder, nonlinearity and decoders.

    Args:
        d_in: numbers read.
        n_latents: how many latents.
        d_out: numbers written at each site.
        n_out: how many sites are written.
        activation: one of `ACTIVATIONS`.
        k: for ``topk`` and ``batchtopk``: how many latents are active, on average.
        skip: whether a linear map leads past the latents (one site only).
        subtract_b_dec: whether ``b_dec`` is taken from the input first (only where input and output are one site).

    Raises:
        OptionError: for an unknown activation, or options that do not go together.

    >>> coder = SparseCoder(4, 16, 4, activation="topk", k=3)
    >>> coder.encode(torch.ones(2, 5, 4)).shape, coder(torch.ones(2, 5, 4)).shape
    (torch.Size([2, 5, 16]), torch.Size([2, 5, 1, 4]))
    """

    W_skip: nn.Parameter | None
    threshold: nn.Parameter | None
    r_mag: nn.Parameter | None
    b_mag: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        d_out: int,
        *,
        n_out: int = 1,
        activation: str = "relu",
        k: int | None = None,
        skip: bool = False,
        subtract_b_dec: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise OptionError(f"got activation = {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if (k is None) == (activation in ("topk", "batchtopk")) or (k is not None and not 1 <= k <= n_latents):
            raise OptionError(
                f"got activation = {activation!r} and k = {k}; topk and batchtopk need 1 <= k <= {n_latents}"
            )
        if skip and n_out > 1:
            raise OptionError("a skip connection leads to one site; leave it out of a cross-layer transcoder")
        if subtract_b_dec and (d_in != d_out or n_out > 1):
            raise OptionError("b_dec can be taken from the input only where input and output are one site")
        self.d_in, self.n_latents, self.d_out, self.n_out = d_in, n_latents, d_out, n_out
        self.activation, self.k, self.subtract_b_dec = activation, k, subtract_b_dec
        self.W_enc, self.b_enc = nn.Parameter(torch.zeros(d_in, n_latents)), nn.Parameter(torch.zeros(n_latents))
        self.W_dec, self.b_dec = (
            nn.Parameter(torch.zeros(n_out, n_latents, d_out)),
            nn.Parameter(torch.zeros(n_out, d_out)),
        )
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(d_in, d_out)) if skip else None)
        gated, thresholded = activation == "gated", activation in ("jumprelu", "batchtopk")
        self.register_parameter("threshold", nn.Parameter(torch.zeros(n_latents)) if thresholded else None)
        for name in ("r_mag", "b_mag"):
            self.register_parameter(name, nn.Parameter(torch.zeros(n_latents)) if gated else None)

    def pre_activation(self, x: Values) -> Latents:
        """What the nonlinearity is applied to (of a gated coder: the gate)."""
        x = x - self.b_dec[0] if self.subtract_b_dec else x
        return x @ self.W_enc + self.b_enc

    def encode(self, x: Values) -> Latents:
        """Latents of an input, none below 0."""
        return ACTIVATIONS[self.activation](self, self.pre_activation(x))

    def decode(self, latents: Latents) -> Float[Tensor, "*batch out d_out"]:
        """What latents write at each site, biases included."""
        return torch.einsum("...n,lnd->...ld", latents, self.W_dec) + self.b_dec

    def forward(self, x: Values) -> Float[Tensor, "*batch out d_out"]:
        """What is written at each site."""
        y = self.decode(self.encode(x))
        return y if self.W_skip is None else y + (x @ self.W_skip)[..., None, :]

    def frozen_gate(self, latents: Latents, pre: Latents) -> Latents:
        """Slope of each latent in its pre-activation where the set of active latents stays as it is.

        1 where active, else 0; of a gated coder ``exp(r_mag)``, since the magnitude is that multiple of what was read.
        """
        active = (latents > 0).to(pre)
        return active if self.r_mag is None else active * self.r_mag.exp()


def _relu(coder: SparseCoder, pre: Tensor) -> Tensor:
    return pre.relu()


def _topk(coder: SparseCoder, pre: Tensor) -> Tensor:
    assert coder.k is not None
    values, index = pre.relu().topk(coder.k, -1)
    return torch.zeros_like(pre).scatter(-1, index, values)


def _jumprelu(coder: SparseCoder, pre: Tensor) -> Tensor:
    assert coder.threshold is not None
    return pre * ((pre > coder.threshold) & (pre > 0))


def _gated(coder: SparseCoder, pre: Tensor) -> Tensor:
    assert coder.r_mag is not None and coder.b_mag is not None
    magnitude = (pre - coder.b_enc) * coder.r_mag.exp() + coder.b_mag
    return (pre > 0) * magnitude.relu()


# ``b_enc`` of a gated coder is the bias of its gate.
ACTIVATIONS: dict[str, Callable[[SparseCoder, Tensor], Tensor]] = {
    "relu": _relu,
    "topk": _topk,
    "batchtopk": _jumprelu,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
