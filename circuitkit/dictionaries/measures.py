"""How good a dictionary is: how much it explains, with how many latents, and how many of them are used at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import OptionError

Replacement = Callable[[Float[Tensor, "*batch d_in"]], Float[Tensor, "*batch d_out"]]


@dataclass(frozen=True)
class Quality:
    """What a coder was measured to do.

    Args:
        l0: active latents per input, mean.
        fvu: fraction of variance unexplained, |y - y_hat|^2 / |y - mean y|^2 over all inputs and sites.
        dead: share of latents that were active on no input.
        n: number of inputs.
    """

    l0: float
    fvu: float
    dead: float
    n: int


@torch.no_grad()
def measure(coder: SparseCoder, pairs: Iterable[Tensor | tuple[Tensor, Tensor]]) -> Quality:
    """L0, FVU and dead share of a coder over batches of (input, target), or of inputs that are their own target.

    Args:
        coder: what is measured.
        pairs: inputs ``[batch, d_in]`` and targets ``[batch, d_out]`` or ``[batch, out, d_out]``.

    Raises:
        OptionError: if there is no batch.

    >>> coder = SparseCoder(4, 16, 4)
    >>> quality = measure(coder, [torch.eye(4)])
    >>> quality.l0, round(quality.fvu, 3), quality.dead
    (0.0, 1.333, 1.0)
    """
    n, active, error = 0, 0.0, 0.0
    total = square = torch.zeros((), dtype=torch.float64)
    fired = torch.zeros(coder.n_latents, dtype=torch.bool, device=coder.W_enc.device)
    for pair in pairs:
        x, y = pair if isinstance(pair, tuple) else (pair, pair)
        x = x.flatten(0, -2)
        y = y.reshape(len(x), coder.n_out, coder.d_out).to(coder.W_enc)
        latents = coder.encode(x.to(coder.W_enc))
        written = coder.decode(latents)
        if coder.W_skip is not None:
            written = written + (x.to(coder.W_enc) @ coder.W_skip)[:, None]
        n += len(x)
        active += float((latents > 0).sum())
        error += float((y - written).double().square().sum())
        fired |= (latents > 0).any(0)
        total, square = total + y.double().sum(0), square + y.double().square().sum()
    if n == 0:
        raise OptionError("got no batch to measure on; give at least one")
    variance = float(square - total.square().sum() / n)
    return Quality(active / n, error / variance if variance > 0 else float("nan"), float((~fired).float().mean()), n)


def recovered(score: Callable[[Replacement | None], float], coder: SparseCoder) -> float:
    """How much of a model's score comes back when the coder's output stands in for the real one.

        recovered = (score(coder) - score(zero)) / (score(unchanged) - score(zero))

    1 if nothing is lost, 0 if it is no better than writing nothing. For cross-entropy the sign cancels.

    Args:
        score: the model's score (logit difference, cross-entropy) with the site's output replaced by a function of what
            is read; None for the unchanged model.
        coder: one that writes one site.

    Raises:
        OptionError: if writing nothing changes nothing, so that there is nothing to recover.
    """

    def spliced(x: Tensor) -> Tensor:
        return coder(x.to(coder.W_enc))[..., 0, :].to(x)

    def nothing(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], coder.d_out)

    with torch.no_grad():
        clean, zero = score(None), score(nothing)
        if clean == zero:
            raise OptionError(
                "the score does not depend on this site, so nothing can be recovered; choose another score"
            )
        return (score(spliced) - zero) / (clean - zero)
