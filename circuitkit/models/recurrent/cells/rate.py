"""The continuous-time rate network, by Euler steps of ``alpha = dt / tau``.

    h(t) = (1 - alpha) h(t-1) + alpha (W r(t-1) + W_in x(t) + b)
    r(t) = phi(h(t))                                  phi: tanh or ReLU

Low rank (Mastrogiuseppe and Ostojic 2018, arXiv:1711.09672): W = m n^T / N, and the latent variables
``kappa(t) = n^T r(t-1) / N`` are writers, in a stage of their own: every way from unit to unit leads through them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.errors import OptionError
from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.elman import NONLINEARITIES
from circuitkit.models.recurrent.cells.inputs import input_links, random_weight
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


class RateRNN(nn.Module):
    """A rate network.

    Args:
        input_size: numbers read at each step.
        hidden_size: units, N.
        alpha: Euler step divided by the time constant.
        nonlinearity: ``tanh`` or ``relu``.
        rank: of the recurrent weights; None for a full matrix.
        output: what it gives at each step: rates ``r`` or currents ``h``.

    The currents before step 0 are the parameter ``start``, zeros at first.

    Raises:
        OptionError: unless ``0 < alpha <= 1``, and the names are known.

    >>> RateRNN(3, 4, alpha=0.1, rank=2)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        alpha: float,
        *,
        nonlinearity: str = "tanh",
        rank: int | None = None,
        output: str = "r",
    ):
        super().__init__()
        if not 0 < alpha <= 1:
            raise OptionError(f"got alpha = {alpha}, expected the Euler step over the time constant, 0 < alpha <= 1")
        if nonlinearity not in NONLINEARITIES or output not in ("r", "h"):
            raise OptionError(f"got {nonlinearity!r} and {output!r}, expected 'tanh' or 'relu', and 'r' or 'h'")
        self.input_size, self.hidden_size, self.alpha = input_size, hidden_size, alpha
        self.nonlinearity, self.rank, self.output = nonlinearity, rank, output
        if rank is None:
            self.W = random_weight(hidden_size, hidden_size)
        else:
            self.m, self.n = (nn.Parameter(torch.randn(hidden_size, rank)) for _ in range(2))
        self.W_in = random_weight(hidden_size, input_size)
        self.b = nn.Parameter(torch.zeros(hidden_size))
        self.start = nn.Parameter(torch.zeros(hidden_size))

    def phi(self, h: Float[Tensor, "*lead unit"]) -> Float[Tensor, "*lead unit"]:
        """Rates of currents."""
        return NONLINEARITIES[self.nonlinearity](h)

    def weight(self) -> Float[Tensor, "unit unit"]:
        """The recurrent weights: W, or m n^T / N."""
        return self.W if self.rank is None else self.m @ self.n.T / self.hidden_size

    def forward(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step unit"]:
        """Rates, or currents, at every step."""
        h, W, outputs = self.start.expand(len(x), -1), self.weight(), []
        for x_t in x.unbind(1):
            h = (1 - self.alpha) * h + self.alpha * (self.phi(h) @ W.T + x_t @ self.W_in.T + self.b)
            outputs.append(h if self.output == "h" else self.phi(h))
        return torch.stack(outputs, 1)


def _step(module: RateRNN, h: str, r: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    kept, new = see("kept", (1 - module.alpha) * pre["carry"]), see("new", module.alpha * pre["drive"])
    current = see("h", kept + new)
    return {h: current, r: see("r", module.phi(current))}


def _latent(name: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    return {name: see("kappa", pre["kappa"])}


@cell(RateRNN, example=lambda: RateRNN(3, 4, alpha=0.2, rank=2))
def rate(module: RateRNN, place: Place) -> Described:
    """One stage, and one before it for the latent variables of low-rank weights."""
    stem, size = place.stem(), module.hidden_size
    h = Write(f"{stem}.h", size, start=lambda: module.start)
    r = Write(f"{stem}.r", size, start=lambda: module.phi(module.start))
    slots = (
        Slot("drive", size, feeds=(h.name, r.name), bias=lambda: module.b),
        Slot("carry", size, feeds=(h.name, r.name)),
    )
    stages = list[Stage]()
    recurrent = Link(r.name, ("drive",), module.weight, lag=1)
    if module.rank is not None:
        kappa = Write(f"{stem}.kappa", module.rank, kind="latent")
        slot = Slot("kappa", module.rank, feeds=(kappa.name,))
        read = Link(r.name, ("kappa",), lambda: module.n.T / size, lag=1)
        stages.append(Stage((slot,), (kappa,), (read,), partial(_latent, kappa.name), ("kappa_pre", "kappa")))
        recurrent = Link(kappa.name, ("drive",), lambda: module.m)
    links = (*input_links(place, ("drive",), lambda: module.W_in), recurrent, Link(h.name, ("carry",), lag=1))
    sites = ("drive_pre", "carry_pre", "kept", "new", "h", "r")
    stages.append(Stage(slots, (h, r), links, partial(_step, module, h.name, r.name), sites))
    out = r if module.output == "r" else h
    return Described((Block(place.layer, tuple(stages), stem=stem),), (out.name,))
