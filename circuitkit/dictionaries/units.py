"""The units that training works in, where each number has variance 1, and how weights are brought back from them.

With x' = a x and y'_l = c_l y_l, a coder of x' and y' becomes one of x and y, exactly, by

    W_enc <- a s W_enc,  b_enc <- s b_enc (thresholds and magnitudes too),  W_dec[l] <- W_dec[l] / (c_l s)
    b_dec[l] <- b_dec[l] / c_l,   W_skip <- W_skip a / c                       s = 1 / (geometric mean of c)

s is one number for all latents, so the order that top k goes by is kept; with one site decoder rows keep norm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import OptionError


@dataclass(frozen=True, eq=False)
class Units:
    """What inputs and targets are multiplied by.

    Args:
        read: of each site that is read.
        write: of each site that is written.
    """

    read: Float[Tensor, " read"]
    write: Float[Tensor, " out"]


def measure_units(x: Float[Tensor, "batch read d_in"], y: Float[Tensor, "batch out d_out"], *, same: bool) -> Units:
    """Units from one batch; inputs that are their own target share theirs.

    Raises:
        OptionError: if a site does not vary.
    """
    read, write = _scale(x, "inputs"), _scale(y, "targets")
    return Units(write if same else read, write)


def _scale(x: Float[Tensor, "batch site d"], what: str) -> Float[Tensor, " site"]:
    variance = x.var(0, correction=0).mean(-1)
    if not bool((variance > 0).all()):
        raise OptionError(f"the {what} do not vary from one position to the next, so there is nothing to learn")
    return variance.rsqrt()


@torch.no_grad()
def from_units(coder: SparseCoder, read: float, write: Float[Tensor, " out"]) -> None:
    """Change a coder of scaled inputs and targets, in place, into one of the inputs and targets as they are."""
    uniform = float(write.log().mean().neg().exp())
    coder.W_enc.mul_(read * uniform)
    coder.b_enc.mul_(uniform)
    coder.W_dec.div_((write * uniform)[:, None, None].to(coder.W_dec))
    coder.b_dec.div_(write[:, None].to(coder.b_dec))
    for name in ("threshold", "b_mag"):
        if getattr(coder, name) is not None:
            getattr(coder, name).mul_(uniform)
    if coder.W_skip is not None:
        coder.W_skip.mul_(read / float(write[0]))
