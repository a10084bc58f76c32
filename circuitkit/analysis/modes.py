"""Eigenvalues and eigenvectors of a square matrix that need not be normal.

    W = sum over modes of  lam_i r_i l_i^H,    l_i^H r_j = 1 if i = j else 0

Two ways to the left vectors, of which neither does for all: `left_modes` and `dual`.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.assignment import cheapest_pairs

Values = Complex[Tensor, " mode"]
Vectors = Complex[Tensor, "mode unit"]
WORST = 1e10  # condition number of right vectors that still span the space


def right_modes(weight: Float[Tensor, "unit unit"]) -> tuple[Values, Vectors]:
    """Eigenvalues, and unit right vectors as rows: ``W r = lam r``.

    >>> right_modes(torch.tensor([[0.5, 0.0], [0.0, 2.0]]))[0]
    tensor([0.5000+0.j, 2.0000+0.j])
    """
    values, right = torch.linalg.eig(weight)
    return values, right.mT / right.mT.norm(dim=-1, keepdim=True)


def left_modes(weight: Float[Tensor, "unit unit"], values: Values, right: Vectors) -> Vectors:
    """Unit left vectors as rows, ``l^H W = lam l^H``, each beside its right one.

    They are the eigenvectors of the transpose, paired with the right ones by value and by overlap, and exist where
    right vectors do not span the space and `dual` has nothing to invert. Modes of one value need not be dual.
    """
    # The left vector of lam is l with l^H W = lam l^H, so W^T conj(l) = lam conj(l).
    others, left = right_modes(weight.mT)
    alike, scale = (right @ left.mT).abs(), float(values.abs().max()) or 1.0
    return left[cheapest_pairs((values[:, None] - others[None, :]).abs() / scale * 1e3 - alike)].conj()


def dual(right: Vectors) -> Vectors:
    """``l_i^H`` as rows, scaled so that ``l_i^H r_j`` is 1 if i = j, else 0: the inverse of the right vectors.

    Left vectors found by themselves would be dual up to rounding only where no two values are near each other.

    Raises:
        OptionError: if the right vectors do not span the space, up to rounding.
    """
    if float(torch.linalg.cond(right)) > WORST:
        raise OptionError("the Jacobian has no full set of eigenvectors: its modes cannot be told apart")
    return torch.linalg.inv(right.mT)
