"""First-order edge scores from what writers wrote and what readers' inputs are worth.

    score(u -> v) = sum over pos, d of  (a_u(clean) - a_u(corrupt)) * dM / dx_v

where x_v is the private copy of the stream that reader v reads. With all writers of an example as rows and all readers
of a block as columns this is one matrix product. The gradient at a private copy needs no private forward: for a
reader y_v = W_v^T norm(x) + b_v it is J_norm^T W_v dM/dy_v, from statistics that the fused run already has.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.functional.norms import Norm, at_least_float32


def edge_scores(
    delta: Float[Tensor, "src batch pos d"], gradient: Float[Tensor, "dst batch pos d"]
) -> Float[Tensor, "batch src dst"]:
    """Score of every edge on every example.

    >>> edge_scores(torch.ones(1, 1, 1, 2), torch.tensor([[[[3.0, 4.0]]]]))
    tensor([[[7.]]])
    """
    return delta.flatten(2).transpose(0, 1) @ gradient.flatten(2).permute(1, 2, 0)


def pull_back(
    gradient: Float[Tensor, "step batch pos node width"],
    output: Float[Tensor, "step batch pos node width"],
    stream: Float[Tensor, "step batch pos d"],
    weight: Float[Tensor, "node d width"] | None,
    bias: Float[Tensor, "node width"] | None,
    norm: Norm | None,
    out: Float[Tensor, "node batch pos d"],
    *,
    frozen: bool = False,
) -> None:
    """Write the gradients at the readers' private copies of the stream, summed over steps, into ``out``.

    Args:
        gradient: dM/dy at each step (weights of the steps already in it).
        output: y itself, before it was used; saves recomputing <x_hat, W g>.
        stream: what the readers read.
        weight: each reader's projection, or None if it reads the normed stream whole.
        bias: each reader's offset, or None.
        norm: the norm between stream and projection, or None.
        out: where the result goes: a slice of what all readers of the stream share, so that nothing is joined later.
        frozen: treat 1 / sigma as a constant: the rank-one term of the norm is left out.

    Only the rank-one norm term is formed per step; the projection is applied once, to the sum.
    """
    gradient, output = at_least_float32(gradient), at_least_float32(output)
    if weight is None:
        g = gradient.squeeze(-2)
        torch.sum(g if norm is None else norm.pull_back(g, stream, frozen=frozen), 0, keepdim=True, out=out)
        return
    weight = weight.to(gradient.dtype)
    if norm is None:
        _project(gradient.sum(0), weight, out)
        return
    x_hat, inverse_sigma = norm.statistics(stream)
    scaled = gradient * inverse_sigma[..., None]
    folded = norm.fold(weight.transpose(1, 2)).transpose(1, 2)
    _project(scaled.sum(0), folded, out)
    if frozen:
        return
    offset = _offset(weight, bias, norm)
    along = (scaled * (output - offset)).sum(-1) / stream.shape[-1]
    for step in range(len(along)):
        out.addcmul_(along[step].movedim(-1, 0)[..., None], x_hat[step], value=-1)


def _project(
    gradient: Float[Tensor, "batch pos node width"],
    weight: Float[Tensor, "node d width"],
    out: Float[Tensor, "node batch pos d"],
) -> None:
    torch.bmm(gradient.flatten(0, 1).transpose(0, 1), weight.transpose(1, 2), out=out.flatten(1, 2))


def _offset(weight: Tensor, bias: Tensor | None, norm: Norm) -> Float[Tensor, "node width"]:
    """The part of the output that does not depend on x: W^T (the norm's bias) + b."""
    offset = weight.new_zeros(weight.shape[0], weight.shape[2])
    if norm.bias is not None:
        offset = offset + norm.bias.to(weight.dtype) @ weight
    return offset if bias is None else offset + bias.to(weight.dtype)


def quadrature(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Nodes in [0, 1] (0 corrupt, 1 clean) and weights that add up to 1.

    ``left`` is k/steps for k = 0..steps-1, the rule of EAP-IG's code; ``midpoint`` and ``gauss-legendre`` converge
    faster on smooth integrands.

    >>> quadrature("left", 2), quadrature("midpoint", 2)
    (([0.0, 0.5], [0.5, 0.5]), ([0.25, 0.75], [0.5, 0.5]))
    """
    if rule == "left":
        return [k / steps for k in range(steps)], [1 / steps] * steps
    if rule == "midpoint":
        return [(k + 0.5) / steps for k in range(steps)], [1 / steps] * steps
    from numpy.polynomial.legendre import leggauss

    nodes, weights = leggauss(steps)
    return [(float(x) + 1) / 2 for x in nodes], [float(w) / 2 for w in weights]


QUADRATURES = ("left", "midpoint", "gauss-legendre")
