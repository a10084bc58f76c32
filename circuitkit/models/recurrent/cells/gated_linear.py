"""The gated linear recurrence (Zucchet et al. 2023, arXiv:2309.01775): products going in, products coming out.

    h(t) = lam h(t-1) + (A x(t)) * (B x(t))           elementwise, lam real
    y(t) = D [(C1 h(t)) * (C2 h(t))]

Each factor of a product is a slot of its own, so that value and gate edges are told apart. With ``lam`` 1 for d^2
units and 0 for d others the cell computes linear attention exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.functional.traces import Reading, Received
from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.inputs import constant, input_links, linear_block, random_weight
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


class GatedLinear(nn.Module):
    """A gated linear recurrence.

    ``lam`` is a plain parameter, so that 0 and 1 can be reached exactly; keep it within [-1, 1] yourself.

    Args:
        input_size: numbers read at each step.
        hidden_size: units.
        gate_size: products at the output.
        output_size: numbers given at each step.

    >>> GatedLinear(3, hidden_size=5, gate_size=4, output_size=2)(torch.zeros(2, 6, 3)).shape
    torch.Size([2, 6, 2])
    """

    def __init__(self, input_size: int, hidden_size: int, gate_size: int, output_size: int):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.gate_size, self.output_size = gate_size, output_size
        self.lam = nn.Parameter(torch.rand(hidden_size))
        self.A, self.B = (random_weight(hidden_size, input_size) for _ in range(2))
        self.C1, self.C2 = (random_weight(gate_size, hidden_size) for _ in range(2))
        self.D = random_weight(output_size, gate_size)

    def forward(self, x: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step output"]:
        """Outputs at every step, from a state of zeros."""
        h = x.new_zeros(len(x), self.hidden_size)
        outputs = []
        for x_t in x.unbind(1):
            h = self.lam * h + (x_t @ self.A.T) * (x_t @ self.B.T)
            outputs.append(self.read(h))
        return torch.stack(outputs, 1)

    def read(self, h: Float[Tensor, "batch unit"]) -> Float[Tensor, "batch output"]:
        """The output at one step: ``D [(C1 h) * (C2 h)]``."""
        return ((h @ self.C1.T) * (h @ self.C2.T)) @ self.D.T

    def received(self, x: Float[Tensor, "batch input"]) -> Received:
        """What the state receives at one step, for `circuitkit.functional.traces`; W of the two paths are A and B."""
        value, gate = x @ self.A.T, x @ self.B.T
        return Received(value * gate, {"value": Reading(x, gate), "gate": Reading(x, value)})

    def spectral_radius(self) -> float:
        """Largest |lam|."""
        return float(self.lam.detach().abs().max())


@cell(GatedLinear, example=lambda: GatedLinear(3, 5, 4, 2))
def gated_linear(module: GatedLinear, place: Place) -> Described:
    """The recurrence, the products that read it, and the sum of these."""
    stem = place.stem()
    h, m = Write(f"{stem}.h", module.hidden_size), Write(f"{stem}.m", module.gate_size)

    def recur(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        kept = see("kept", constant(module.lam, pre["carry"]) * pre["carry"])
        return {h.name: see("h", kept + see("new", pre["value"] * pre["gate"]))}

    def multiply(pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
        return {m.name: see("m", pre["left"] * pre["right"])}

    recurrence = Stage(
        tuple(Slot(name, h.n, feeds=(h.name,)) for name in ("value", "gate", "carry")),
        (h,),
        (
            *input_links(place, ("value",), lambda: module.A),
            *input_links(place, ("gate",), lambda: module.B),
            Link(h.name, ("carry",), lag=1),
        ),
        recur,
        ("value_pre", "gate_pre", "carry_pre", "kept", "new", "h"),
    )
    products = Stage(
        tuple(Slot(name, m.n, feeds=(m.name,)) for name in ("left", "right")),
        (m,),
        (Link(h.name, ("left",), lambda: module.C1), Link(h.name, ("right",), lambda: module.C2)),
        multiply,
        ("left_pre", "right_pre", "m"),
    )
    y = linear_block(place, "y", (Link(m.name, ("y_in",), lambda: module.D),), module.output_size)
    blocks = (Block(place.layer, (recurrence,), stem=stem), Block(place.layer, (products,), stem=stem), y)
    return Described(blocks, (y.writes[0].name,))
