"""How much each unit of a linear recurrence matters, and how long it remembers.

    importance(u) = NMSE with u's state zero at every step - NMSE of the whole network,     NMSE = MSE / variance

A trained network has many units that do nothing; a histogram of decays that counts them all says little of how the
network works, so decays are weighted by importance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.analysis.implicit_attention import implicit_attention
from circuitkit.errors import OptionError
from circuitkit.models.recurrent.parts import FEATURES
from circuitkit.models.recurrent.stepper import run_network

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitkit.models.recurrent.model import RecurrentModel


@dataclass(frozen=True, eq=False)
class UnitImportance:
    """Importance and decay of each unit of a layer.

    Args:
        names: of the units: ``l0.h0``, ...
        importance: change of the NMSE when the unit is zero throughout; below 0 where the unit did harm.
        decay: magnitude of what a unit keeps of its state from one step to the next.
        nmse: of the whole network.
    """

    names: tuple[str, ...]
    importance: Float[Tensor, " unit"]
    decay: Float[Tensor, " unit"]
    nmse: float

    def histogram(self, bins: int = 20) -> tuple[Float[Tensor, " edge"], Float[Tensor, " bin"], Float[Tensor, " bin"]]:
        """Edges of bins over the decays, the share of units in each, and the share of importance (none below 0).

        The last bin holds everything from its left edge on.
        """
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        place = (self.decay.double().cpu() * bins).floor().clamp(0, bins - 1).long()
        weight = self.importance.double().cpu().clamp(min=0)
        count = torch.bincount(place, minlength=bins).double()
        weighed = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, weight)
        return edges, count / count.sum(), weighed / weighed.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def plot(self, *, bins: int = 20) -> go.Figure:
        """Histogram of the decays: units counted, and weighted by importance."""
        from circuitkit.figures.trilinear import decay_histogram

        return decay_histogram(self, bins=bins)


def unit_importance(
    model: RecurrentModel, inputs: Tensor, target: Float[Tensor, "batch step out"], *, layer: str = "l0"
) -> UnitImportance:
    """Importance of every unit of a linear recurrence whose decays are the same at every step.

    Args:
        model: a loaded recurrent model.
        inputs: as the model takes them.
        target: what its outputs at every step should be.
        layer: whose units.

    Raises:
        OptionError: if the layer is no such recurrence, or the target does not fit the outputs or does not vary.

    >>> import circuitkit as ck
    >>> from circuitkit.analysis.trilinear import linear_attention_as_gated_rnn, with_constant
    >>> cell = linear_attention_as_gated_rnn(*torch.eye(2).expand(3, 2, 2))
    >>> x = with_constant(torch.randn(50, 5, 2, generator=torch.Generator().manual_seed(0)))
    >>> found = unit_importance(ck.load(cell), x, cell(x).detach())
    >>> found.decay.tolist(), bool((found.importance > 0.01).all())
    ([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], True)
    """
    maps = implicit_attention(model, inputs[:1]).get(layer)
    if maps is None or maps.pattern.shape[-1] < 2:
        raise OptionError(f"layer {layer!r} is no linear recurrence over two steps or more; give the name of one")
    decays = maps.pattern[0].diagonal(-1, -2, -1)
    if not torch.allclose(decays, decays[:, :1].expand_as(decays)):
        raise OptionError(f"the decays of layer {layer!r} differ from step to step; there is no one number per unit")
    block = next(block for block in model.network.blocks if block.stem == layer and block.recurrent)
    (write,) = block.writes
    x, site = model.vectors(inputs), write.name
    whole = _nmse(model, x, target, None, site)
    found = []
    for unit in range(write.n):
        numbers = slice(unit * write.width, (unit + 1) * write.width)
        found.append(_nmse(model, x, target, numbers, site) - whole)
    return UnitImportance(maps.heads, torch.stack(found), decays[:, 0].abs(), float(whole))


def _nmse(
    model: RecurrentModel, x: Tensor, target: Float[Tensor, "batch step out"], zeroed: slice | None, site: str
) -> Float[Tensor, ""]:
    def edit(name: str, value: Tensor, _step: int | None) -> Tensor:
        if name != site or zeroed is None:
            return value
        value = value.clone()
        value[..., zeroed] = 0
        return value

    with torch.no_grad():
        outputs = model.read_out(run_network(model.network, x, edit=edit)[FEATURES])
    variance = (target - target.mean((0, 1))).square().mean()
    if outputs.shape != target.shape or not float(variance) > 0:
        raise OptionError(
            f"got a target of shape {tuple(target.shape)} for outputs {tuple(outputs.shape)}, expected numbers of that "
            "shape that are not all the same"
        )
    return (outputs - target).square().mean() / variance
