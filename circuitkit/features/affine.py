"""Active latents as affine functions of what their dictionary reads."""

from __future__ import annotations

import copy

from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.sparse_coder import SparseCoder


def in_dtype_of(coder: SparseCoder, like: Tensor) -> SparseCoder:
    """The coder in the dtype and on the device of a tensor, without a copy where it is so already."""
    if coder.W_enc.dtype == like.dtype and coder.W_enc.device == like.device:
        return coder
    return copy.deepcopy(coder).to(like)


def slopes(coder: SparseCoder, index: Tensor) -> tuple[Float[Tensor, "target d"], Float[Tensor, " target"]]:
    """Active latents as affine functions of what the dictionary reads: activation = x . vector + constant."""
    vectors, constants = coder.W_enc.T[index], coder.b_enc[index]
    if coder.r_mag is not None and coder.b_mag is not None:
        factor = coder.r_mag.exp()[index]
        vectors, constants = vectors * factor[:, None], coder.b_mag[index]
    return vectors, constants - vectors @ coder.b_dec[0] if coder.subtract_b_dec else constants
