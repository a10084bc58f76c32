"""Which attention a gated recurrent network has become: its trilinear coefficients (Zucchet et al. 2023, 2309.01775).

    y_t = sum over i, j, k of  T[:, i, j, k] (sum over s <= t of x_s x_s^T)[i, j] x_t[k]

Linear attention is exactly of this form, with T[o, i, j, k] the part of  W_v[o, i] (W_k^T W_q)[j, k]  that is symmetric
in i and j. A network whose outputs the form explains (R2 near 1) computes linear attention with those coefficients,
whatever its weights look like: units can share, split and rotate keys and values, so weights need not match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.models.recurrent.cells.gated_linear import GatedLinear

if TYPE_CHECKING:
    import plotly.graph_objects as go

Inputs = Float[Tensor, "batch step d"]
Outputs = Float[Tensor, "batch step out"]


@dataclass(frozen=True, eq=False)
class Trilinear:
    """The coefficients of a trilinear form, and how much of the outputs they explain.

    Args:
        coefficients: T, symmetric in its two middle axes.
        r2: share of the outputs' variance that the form explains; 1 for one that was written down.
        n: how many outputs it was fitted to; 0 for one that was written down.
    """

    coefficients: Float[Tensor, "out d d d"]
    r2: float = 1.0
    n: int = 0

    def __call__(self, x: Inputs) -> Outputs:
        """What the form makes of a sequence."""
        memory = torch.einsum("bsi,bsj->bsij", x, x).cumsum(1)
        return torch.einsum("oijk,bsij,bsk->bso", self.coefficients.to(x), memory, x)

    def cosine(self, other: Trilinear) -> float:
        """Cosine between the coefficients of two forms.

        Raises:
            OptionError: if they are of different sizes.
        """
        a, b = self._beside(other)
        return float(a @ b / (a.norm() * b.norm()))

    def relative_error(self, other: Trilinear) -> float:
        """Norm of the coefficients' difference over the norm of the other's.

        Raises:
            OptionError: if they are of different sizes.
        """
        a, b = self._beside(other)
        return float((a - b).norm() / b.norm())

    def _beside(self, other: Trilinear) -> tuple[Tensor, Tensor]:
        a, b = self.coefficients, other.coefficients
        if a.shape != b.shape:
            raise OptionError(f"got coefficients {tuple(a.shape)} and {tuple(b.shape)}; compare forms of one size")
        return a.detach().flatten().double(), b.detach().flatten().double()

    def plot(self, teacher: Trilinear | None = None) -> go.Figure:
        """The coefficients against a teacher's; as a heatmap per output without one."""
        from circuitkit.figures.trilinear import coefficient_maps, coefficients_against

        return coefficient_maps(self) if teacher is None else coefficients_against(self, teacher)


def fit_trilinear(x: Inputs, y: Float[Tensor, "_ _ out"]) -> Trilinear:
    """The trilinear form that explains outputs best, by least squares without an intercept.

    There are d^2 (d + 1) / 2 coefficients per output; give several times as many steps, of inputs that vary freely.

    Raises:
        OptionError: if inputs and outputs do not belong together, or do not determine the coefficients.

    >>> x = torch.randn(10, 8, 2, generator=torch.Generator().manual_seed(0)).double()
    >>> teacher = trilinear_of_attention(*torch.eye(2, dtype=torch.float64).expand(3, 2, 2))
    >>> fitted = fit_trilinear(x, teacher(x))
    >>> round(fitted.cosine(teacher), 6), round(fitted.r2, 6)
    (1.0, 1.0)
    """
    if x.shape[:2] != y.shape[:2]:
        raise OptionError(f"got inputs {tuple(x.shape)} and outputs {tuple(y.shape)}, expected one output per step")
    x, y = x.detach().double(), y.detach().double()
    d = x.shape[-1]
    above = torch.triu_indices(d, d, device=x.device)
    memory = torch.einsum("bsi,bsj->bsij", x, x).cumsum(1)[..., above[0], above[1]]
    features = torch.einsum("bsm,bsk->bsmk", memory, x).flatten(2).flatten(0, 1)
    outputs = y.flatten(0, 1)
    # Columns of one size, so that the rank does not depend on the scale of the inputs.
    size = features.norm(dim=0).clamp(min=torch.finfo(features.dtype).tiny)
    found = torch.linalg.lstsq(features.cpu() / size.cpu(), outputs.cpu(), driver="gelsd")
    if int(found.rank) < features.shape[1]:
        raise OptionError(
            f"{len(features)} steps determine {int(found.rank)} of {features.shape[1]} coefficients; give more "
            "sequences, or inputs whose numbers do not depend on each other"
        )
    found_at = found.solution.to(x) / size[:, None]
    left = outputs - features @ found_at
    packed = found_at.T.unflatten(1, (above.shape[1], d))
    coefficients = x.new_zeros(y.shape[-1], d, d, d)
    # An entry above the diagonal is the sum of two equal ones.
    packed = packed / torch.where(above[0] == above[1], 1, 2)[:, None]
    coefficients[:, above[0], above[1]] = coefficients[:, above[1], above[0]] = packed
    r2 = 1 - float(left.square().sum() / (outputs - outputs.mean(0)).square().sum())
    return Trilinear(coefficients, r2, len(outputs))


def trilinear_of_attention(
    w_q: Float[Tensor, "key d"], w_k: Float[Tensor, "key d"], w_v: Float[Tensor, "out d"]
) -> Trilinear:
    """The form that linear attention  y_t = sum over s <= t of  (q_t . k_s) v_s  computes.

    >>> trilinear_of_attention(*torch.ones(3, 1, 2)).coefficients.unique()
    tensor([1.])
    """
    full = torch.einsum("oi,ej,ek->oijk", w_v, w_k, w_q).detach()
    return Trilinear((full + full.transpose(1, 2)) / 2)


def linear_attention_as_gated_rnn(
    w_q: Float[Tensor, "key d"], w_k: Float[Tensor, "key d"], w_v: Float[Tensor, "out d"]
) -> GatedLinear:
    """A gated linear recurrence that computes linear attention exactly; it reads ``[x, 1]``, see `with_constant`.

    Units ``(o, j)`` with lam = 1 hold the fast weights, sum over s of v_o k_j; units ``j`` with lam = 0 hold the
    query, q_j times the constant; one product per (o, j) reads one of each.

    >>> cell = linear_attention_as_gated_rnn(*torch.eye(4).expand(3, 4, 4))
    >>> cell.hidden_size, cell.lam.sum().item()
    (20, 16.0)
    """
    (keys, d), values = w_k.shape, w_v.shape[0]
    pairs = values * keys
    cell = GatedLinear(d + 1, pairs + keys, pairs, values).to(w_q)
    o, j = torch.arange(pairs).div(keys, rounding_mode="floor"), torch.arange(pairs) % keys
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.lam[:pairs] = 1
        cell.A[:pairs, :d], cell.B[:pairs, :d] = w_v[o], w_k[j]
        cell.A[pairs:, :d], cell.B[pairs:, d] = w_q, 1
        cell.C1[torch.arange(pairs), torch.arange(pairs)] = 1
        cell.C2[torch.arange(pairs), pairs + j] = 1
        cell.D[o, torch.arange(pairs)] = 1
    return cell


def with_constant(x: Inputs) -> Float[Tensor, "batch step number"]:
    """Inputs with a 1 behind them, which turns a product of two linear maps into one linear map where that is needed.

    >>> with_constant(torch.zeros(1, 1, 2))
    tensor([[[0., 0., 1.]]])
    """
    return torch.cat((x, torch.ones_like(x[..., :1])), -1)
