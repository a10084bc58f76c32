"""Eigenvalues of a recurrent weight over training, each followed from checkpoint to checkpoint.

    W = sum over modes of  lam_i r_i l_i^T,    l_i^T r_j = 1 if i = j else 0

A mode at one checkpoint is paired with a mode at the next so that the sum of the costs

    |lam - lam'| / s  +  1 - |cos(r, r')| |cos(l, l')|        s = largest magnitude of any eigenvalue

is least. What a mode reads of the input is l_i^T B, what the output reads of it is C r_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from circuitkit.analysis.modes import left_modes, right_modes
from circuitkit.errors import OptionError
from circuitkit.functional.assignment import cheapest_pairs

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class EigenvalueTracks:
    """Modes of a square weight over checkpoints; mode 0 is the one of largest magnitude at the last checkpoint.

    Args:
        steps: training step of each checkpoint.
        values: eigenvalues.
        right: unit right eigenvectors, one per row.
        left: unit left eigenvectors, one per row: ``l^H W = lam l^H``.
        read_in: largest ``|cos|`` of the left vectors with a column of the read-in, or None without one.
        read_out: largest ``|cos|`` of the right vectors with a row of the read-out, or None.
        singular_values: of the weight, largest first.
    """

    steps: tuple[int, ...]
    values: Complex[Tensor, "checkpoint mode"]
    right: Complex[Tensor, "checkpoint mode unit"]
    left: Complex[Tensor, "checkpoint mode unit"]
    read_in: Float[Tensor, "checkpoint mode"] | None
    read_out: Float[Tensor, "checkpoint mode"] | None
    singular_values: Float[Tensor, "checkpoint unit"]

    @property
    def effective_rank(self) -> Float[Tensor, " checkpoint"]:
        """``(sum of squared singular values)^2 / sum of their fourth powers``: 1 for a matrix of rank one."""
        squares = self.singular_values.square()
        return squares.sum(-1).square() / squares.square().sum(-1).clamp_min(1e-300)

    def plot(self, top: int = 5) -> go.Figure:
        """The spectrum in the complex plane over training, and the magnitudes of the top modes against the step."""
        from circuitkit.figures.eigenvalues import eigenvalue_tracks_figure

        return eigenvalue_tracks_figure(self, top)


def track_eigenvalues(
    weights: Sequence[Float[Tensor, "unit unit"]],
    steps: Sequence[int],
    *,
    read_in: Sequence[Float[Tensor, "unit input"]] | None = None,
    read_out: Sequence[Float[Tensor, "output unit"]] | None = None,
) -> EigenvalueTracks:
    """Eigenvalues, left and right vectors of a weight over checkpoints, in float64. Cost: O(unit^3) per checkpoint.

    Modes that cross with equal vectors cannot be told apart, and neither can those of a weight that is not
    diagonalisable: there the left vectors are those of a matrix that differs by rounding.

    Args:
        weights: the weight at each checkpoint, ``h(t) = W h(t-1) + ...``.
        steps: training steps, growing.
        read_in: the matrix from the inputs at each checkpoint.
        read_out: the matrix to the outputs at each checkpoint.

    Raises:
        OptionError: if there is no checkpoint, the counts or sizes differ, steps do not grow, or a weight is not
            finite.

    >>> grown = [torch.diag(torch.tensor([0.1, a])) for a in (0.2, 0.9)]
    >>> track_eigenvalues(grown, [0, 100]).values.real
    tensor([[0.2000, 0.1000],
            [0.9000, 0.1000]], dtype=torch.float64)
    """
    _check(weights, steps, read_in, read_out)
    found = [_modes(w.detach().double()) for w in weights]
    scale = max(float(values.abs().max()) for values, _, _ in found) or 1.0
    order = [found[-1][0].abs().argsort(descending=True)]
    tracked = [tuple(part[order[0]] for part in found[-1])]
    for earlier in reversed(found[:-1]):
        later = tracked[-1]
        gaps = (later[0][:, None] - earlier[0][None, :]).abs() / scale
        alike = (later[1].conj() @ earlier[1].T).abs() * (later[2].conj() @ earlier[2].T).abs()
        pairs = cheapest_pairs(gaps + 1 - alike)
        tracked.append(tuple(part[pairs] for part in earlier))
    values, right, left = (torch.stack([each[k] for each in reversed(tracked)]) for k in range(3))
    return EigenvalueTracks(
        tuple(int(step) for step in steps),
        values,
        right,
        left,
        None if read_in is None else torch.stack([_overlap(v, w.mT) for v, w in zip(left, read_in, strict=True)]),
        None if read_out is None else torch.stack([_overlap(v, w) for v, w in zip(right, read_out, strict=True)]),
        torch.stack([torch.linalg.svdvals(w.detach().double()) for w in weights]),
    )


def _modes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, right = right_modes(weight)
    return values, right, left_modes(weight, values, right)


def _overlap(vectors: Tensor, rows: Tensor) -> Float[Tensor, " mode"]:
    """For each vector the largest ``|cos|`` with a row; rows of zeros overlap with nothing."""
    rows = rows.detach().to(vectors)
    return ((vectors.conj() @ rows.mT).abs() / rows.norm(dim=-1).clamp_min(1e-300)).max(-1).values


def _check(
    weights: Sequence[Tensor], steps: Sequence[int], read_in: Sequence[Tensor] | None, read_out: Sequence[Tensor] | None
) -> None:
    if not weights or len(weights) != len(steps) or any(b <= a for a, b in pairwise(steps)):
        raise OptionError(f"got {len(weights)} weights for steps {list(steps)}; give one for each, steps growing")
    if any(w.shape != weights[0].shape or w.shape[0] != w.shape[-1] for w in weights):
        raise OptionError(f"got weights of shapes {sorted({tuple(w.shape) for w in weights})}; all must be one square")
    for step, w in zip(steps, weights, strict=True):
        if not w.isfinite().all():
            raise OptionError(f"the weight of step {step} is not finite; training went wrong at or before it")
    for name, maps, axis in (("read_in", read_in, 0), ("read_out", read_out, 1)):
        if maps is not None and (len(maps) != len(weights) or any(m.shape[axis] != len(weights[0]) for m in maps)):
            raise OptionError(f"{name} does not fit {len(weights)} weights of {len(weights[0])} units")
