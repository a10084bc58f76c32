"""Bilinear state transitions (Revisiting bi-linear state transitions, arXiv:2505.21749): the input chooses the matrix.

    h(t) = A(x(t)) h(t-1)                             A linear in x; nothing is added

    diagonal    A = diag(f(W x))                      f: identity (signed), or sigmoid, which cannot change a sign
    full        A_ij = sum_k W_ijk x_k                one reader per row of A
    factored    A = U diag(V x) R                     the products are writers

With ``normalise`` h is divided by its length at every step, in a stage of its own: h = m / |m|.
The state before step 0 is a parameter, ``start``: from zeros it would stay zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.inputs import input_links, random_weight, rows_times
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


class _Bilinear(nn.Module):
    """The loop that all forms share."""

    def __init__(self, input_size: int, hidden_size: int, *, normalise: bool = False):
        super().__init__()
        self.input_size, self.hidden_size, self.normalise = input_size, hidden_size, normalise
        self.start = nn.Parameter(torch.full((hidden_size,), hidden_size**-0.5))

    def factors(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step factor"]:
        """What the input makes of ``A(x)``, at all steps."""
        raise NotImplementedError

    def advance(self, a: Float[Tensor, "batch factor"], h: Float[Tensor, "*batch unit"]) -> Float[Tensor, "batch unit"]:
        """``A(x) h``."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step unit"]:
        """The state at every step."""
        h: Tensor = self.start
        states: list[Tensor] = []
        for a in self.factors(x).unbind(1):
            h = self.advance(a, h)
            h = normalize(h, dim=-1) if self.normalise else h
            states.append(h)
        return torch.stack(states, 1)


class DiagonalBilinear(_Bilinear):
    """``h_i(t) = f(w_i x(t)) h_i(t-1)``.

    Args:
        input_size: numbers read at each step.
        hidden_size: units.
        signed: factors of any sign (f = identity); else between 0 and 1 (f = sigmoid).
        normalise: whether h keeps length 1.

    >>> DiagonalBilinear(3, 4)(torch.ones(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, input_size: int, hidden_size: int, *, signed: bool = True, normalise: bool = False):
        super().__init__(input_size, hidden_size, normalise=normalise)
        self.signed = signed
        self.W = random_weight(hidden_size, input_size)

    def factors(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step factor"]:
        """``f(W x)``: the diagonal of A."""
        a = x @ self.W.T
        return a if self.signed else torch.sigmoid(a)

    def advance(self, a: Float[Tensor, "batch factor"], h: Float[Tensor, "*batch unit"]) -> Float[Tensor, "batch unit"]:
        """``f(W x) * h``."""
        return a * h


class FullBilinear(_Bilinear):
    """``h_i(t) = sum over j, k of W_ijk x_k(t) h_j(t-1)``.

    Args:
        input_size: numbers read at each step.
        hidden_size: units.
        normalise: whether h keeps length 1.

    >>> FullBilinear(3, 4)(torch.ones(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, input_size: int, hidden_size: int, *, normalise: bool = False):
        super().__init__(input_size, hidden_size, normalise=normalise)
        self.W = nn.Parameter(torch.randn(hidden_size, hidden_size, input_size) / (hidden_size * input_size) ** 0.5)

    def factors(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step factor"]:
        """The rows of A, one after the other."""
        return x @ self.W.flatten(0, 1).T

    def advance(self, a: Float[Tensor, "batch factor"], h: Float[Tensor, "*batch unit"]) -> Float[Tensor, "batch unit"]:
        """``A h``."""
        return (a.unflatten(-1, self.W.shape[:2]) * h[..., None, :]).sum(-1)


class FactoredBilinear(_Bilinear):
    """``h(t) = U [(V x(t)) * (R h(t-1))]``.

    Args:
        input_size: numbers read at each step.
        hidden_size: units.
        rank: products.
        normalise: whether h keeps length 1.

    >>> FactoredBilinear(3, 4, rank=6)(torch.ones(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, input_size: int, hidden_size: int, rank: int, *, normalise: bool = False):
        super().__init__(input_size, hidden_size, normalise=normalise)
        self.rank = rank
        self.U, self.R = random_weight(hidden_size, rank), random_weight(rank, hidden_size)
        self.V = random_weight(rank, input_size)

    def factors(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step factor"]:
        """``V x``."""
        return x @ self.V.T

    def advance(self, a: Float[Tensor, "batch factor"], h: Float[Tensor, "*batch unit"]) -> Float[Tensor, "batch unit"]:
        """``U [(V x) * (R h)]``."""
        return (a * (h @ self.R.T)) @ self.U.T


def _scale(m_name: str, h_name: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    return {h_name: see("h", normalize(pre[m_name], dim=-1))}


def _described(module: _Bilinear, place: Place, stages: Callable[[Write, Write], tuple[Stage, ...]]) -> Described:
    """The block: stages that make m from the state h, and where asked for the one that divides m by its length."""
    stem, n = place.stem(), module.hidden_size
    h = Write(f"{stem}.h", n, start=lambda: module.start)
    if not module.normalise:
        return Described((Block(place.layer, stages(h, h), stem=stem),), (h.name,))
    m = Write(f"{stem}.m", n)
    slot = Slot("m", n, feeds_all=(h.name,))
    scaling = Stage((slot,), (h,), (Link(m.name, ("m",)),), partial(_scale, "m", h.name), ("m_pre", "h"))
    return Described((Block(place.layer, (*stages(m, h), scaling), stem=stem),), (h.name,))


def _site(write: Write) -> str:
    return write.name.rpartition(".")[2]


@cell(DiagonalBilinear, example=lambda: DiagonalBilinear(3, 4, normalise=True))
def diagonal_bilinear(module: DiagonalBilinear, place: Place) -> Described:
    """One stage: factors ``a``, each times the unit's own past."""

    def stages(m: Write, h: Write) -> tuple[Stage, ...]:
        def step(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
            a = see("a", pre["a"] if module.signed else torch.sigmoid(pre["a"]))
            return {m.name: see(_site(m), a * pre["carry"])}

        slots = tuple(Slot(name, m.n, feeds=(m.name,)) for name in ("a", "carry"))
        links = (*input_links(place, ("a",), lambda: module.W), Link(h.name, ("carry",), lag=1))
        return (Stage(slots, (m,), links, step, ("a_pre", "carry_pre", "a", _site(m))),)

    return _described(module, place, stages)


@cell(FullBilinear, example=lambda: FullBilinear(3, 4))
def full_bilinear(module: FullBilinear, place: Place) -> Described:
    """One stage: reader i of ``a`` is row i of A(x); every unit's past, ``carry``, enters every product."""

    def stages(m: Write, h: Write) -> tuple[Stage, ...]:
        def step(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
            return {m.name: see(_site(m), rows_times(pre["a"], pre["carry"]))}

        slots = (Slot("a", m.n, m.n, feeds=(m.name,)), Slot("carry", m.n, feeds_all=(m.name,)))
        links = (*input_links(place, ("a",), lambda: module.W.flatten(0, 1)), Link(h.name, ("carry",), lag=1))
        return (Stage(slots, (m,), links, step, ("a_pre", "carry_pre", _site(m))),)

    return _described(module, place, stages)


@cell(FactoredBilinear, example=lambda: FactoredBilinear(3, 4, 5, normalise=True))
def factored_bilinear(module: FactoredBilinear, place: Place) -> Described:
    """Two stages: products ``p`` of a gate (from the input) and a value (from the state), and the sums of these."""
    p = Write(f"{place.stem()}.p", module.rank)

    def multiply(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        return {p.name: see("p", pre["gate"] * pre["value"])}

    def stages(m: Write, h: Write) -> tuple[Stage, ...]:
        def add(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
            return {m.name: see(_site(m), pre["sum"])}

        slots = tuple(Slot(name, p.n, feeds=(p.name,)) for name in ("gate", "value"))
        inward = input_links(place, ("gate",), lambda: module.V)
        links = (*inward, Link(h.name, ("value",), lambda: module.R, lag=1))
        out = Link(p.name, ("sum",), lambda: module.U)
        return (
            Stage(slots, (p,), links, multiply, ("gate_pre", "value_pre", "p")),
            Stage((Slot("sum", m.n, feeds=(m.name,)),), (m,), (out,), add, ("sum_pre", _site(m))),
        )

    return _described(module, place, stages)
