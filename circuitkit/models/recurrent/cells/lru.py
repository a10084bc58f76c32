"""The linear recurrent unit (Orvieto et al. 2023, arXiv:2303.06349): a diagonal complex recurrence.

    lam = exp(-exp(nu_log) + i exp(theta_log))        |lam| < 1 whatever the parameters
    h(t) = lam h(t-1) + exp(gamma_log) (B x(t))       complex; gamma starts at sqrt(1 - |lam|^2)
    y(t) = Re(C h(t)) + D x(t)

A complex unit is one writer of two numbers, its real and its imaginary part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from circuitkit.errors import OptionError
from circuitkit.functional.traces import Reading, Received
from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.inputs import constant, input_links, linear_block, random_weight
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


class LRU(nn.Module):
    """A linear recurrent unit.

    Args:
        input_size: numbers read at each step.
        hidden_size: complex units.
        output_size: numbers given at each step; as many as are read if None.
        radius: smallest and largest |lam| at the start.
        phase: largest angle of lam at the start, in radians.

    Raises:
        OptionError: unless ``0 < radius[0] < radius[1] < 1`` and ``phase > 0``.

    >>> LRU(3, 4)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        radius: tuple[float, float] = (0.4, 0.99),
        phase: float = 2 * math.pi,
    ):
        super().__init__()
        if not 0 < radius[0] < radius[1] < 1 or phase <= 0:
            raise OptionError(
                f"got radius {radius} and phase {phase}, expected 0 < smallest < largest < 1 and phase > 0"
            )
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, output_size or input_size
        # Uniform on the ring between the two radii.
        square = torch.rand(hidden_size) * (radius[1] ** 2 - radius[0] ** 2) + radius[0] ** 2
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(square)))
        self.theta_log = nn.Parameter(torch.log(phase * torch.rand(hidden_size)))
        self.gamma_log = nn.Parameter(0.5 * torch.log1p(-square))
        self.B_re, self.B_im = (nn.Parameter(random_weight(hidden_size, input_size) / 2**0.5) for _ in range(2))
        self.C_re, self.C_im = (random_weight(self.output_size, hidden_size) for _ in range(2))
        self.D = random_weight(self.output_size, input_size)

    def lam(self) -> Complex[Tensor, " unit"]:
        """What each unit keeps of its state."""
        return torch.polar(torch.exp(-torch.exp(self.nu_log)), torch.exp(self.theta_log))

    def drive(self) -> Complex[Tensor, "unit input"]:
        """``gamma B``: what a unit's state receives per unit of input."""
        return torch.exp(self.gamma_log)[:, None] * torch.complex(self.B_re, self.B_im)

    def forward(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step output"]:
        """Outputs at every step, from a state of zeros."""
        lam, gamma = self.lam(), torch.exp(self.gamma_log)
        B = torch.complex(self.B_re, self.B_im)
        h = x.new_zeros(len(x), self.hidden_size, dtype=lam.dtype)
        outputs = []
        for x_t in x.unbind(1):
            h = lam * h + gamma * (x_t.to(lam.dtype) @ B.T)
            outputs.append(self.read(h, x_t))
        return torch.stack(outputs, 1)

    def read(self, h: Complex[Tensor, "batch unit"], x: Float[Tensor, "batch input"]) -> Float[Tensor, "batch output"]:
        """The output at one step: ``Re(C h) + D x``."""
        return (h @ torch.complex(self.C_re, self.C_im).T).real + x @ self.D.T

    def received(self, x: Float[Tensor, "batch input"]) -> Received:
        """What the state receives at one step, for `circuitkit.functional.traces`; W of its path is `drive`."""
        return Received(x.to(self.lam().dtype) @ self.drive().T, {"in": Reading(x)})

    def spectral_radius(self) -> float:
        """Largest |lam|."""
        return float(self.lam().detach().abs().max())


def pairs(z: Complex[Tensor, "unit *rest"]) -> Float[Tensor, "number *rest"]:
    """Real and imaginary parts of each unit, one after the other, along the first axis.

    >>> pairs(torch.tensor([1 + 2j, 3 + 4j])).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    return torch.stack((z.real, z.imag), 1).flatten(0, 1)


@cell(LRU, example=lambda: LRU(3, 4, 2))
def lru(module: LRU, place: Place) -> Described:
    """The recurrence, and its read-out as a block of its own."""
    n = module.hidden_size
    h = Write(f"{place.stem()}.h", n, 2)

    def step(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        lam = module.lam()
        re, im = constant(lam.real, pre["carry"]), constant(lam.imag, pre["carry"])
        h_re, h_im = pre["carry"].unflatten(-1, (n, 2)).unbind(-1)
        kept = see("kept", torch.stack((re * h_re - im * h_im, re * h_im + im * h_re), -1).flatten(-2))
        return {h.name: see("h", kept + pre["in"])}

    slots = (Slot("in", n, 2, feeds=(h.name,)), Slot("carry", n, 2, feeds=(h.name,)))
    links = (*input_links(place, ("in",), lambda: pairs(module.drive())), Link(h.name, ("carry",), lag=1))
    recurrence = Stage(slots, (h,), links, step, ("in_pre", "carry_pre", "kept", "h"))
    # Re(C h) = C_re h_re - C_im h_im
    read = Link(h.name, ("y_in",), lambda: torch.stack((module.C_re, -module.C_im), -1).flatten(1))
    skip = input_links(place, ("y_in",), lambda: module.D)
    y = linear_block(place, "y", (read, *skip), module.output_size)
    return Described((Block(place.layer, (recurrence,), stem=place.stem()), y), (y.writes[0].name,))
