"""What a recurrent layer made of its past, as attention: maps with the values they weigh and the sum they explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.functional.implicit_maps import diagonal_map

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Rounding of a sum over steps; a map that is further off does not describe the layer.
_ROUNDING = 1e3


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """One layer's maps:  output_t = sum over s of pattern[t, s] values_s + start_t,  on the run they were read from.

    Args:
        name: of the layer, as its sites are called: ``l0``.
        what: what is explained, and how, in words.
        heads: name of each head; a recurrent unit or channel is a head of its own.
        pattern: weight of source step s (key) in step t (query); signed, or complex, and rows add up to anything.
        values: what each source step contributes.
        start: what is left of the state before the first step.
        output: the layer's own values, from its run.
        local: whether the pattern was frozen: computed by the run from the same inputs that the values depend on, so
            that it holds for this run, and says nothing of how the pattern would change with the input.
    """

    name: str
    what: str
    heads: tuple[str, ...]
    pattern: Inexact[Tensor, "batch head step step"]
    values: Inexact[Tensor, "batch step head width"]
    start: Inexact[Tensor, "batch step head width"]
    output: Inexact[Tensor, "batch step head width"]
    local: bool = False

    @property
    def sum(self) -> Inexact[Tensor, "batch step head width"]:
        """What the maps say the output is."""
        return torch.einsum("bhts,bshw->bthw", self.pattern, self.values) + self.start

    @property
    def error(self) -> float:
        """Largest difference between the maps' sum and the layer's own output."""
        return float((self.sum - self.output).abs().max()) if self.output.numel() else 0.0

    def checked(self) -> AttentionMaps:
        """The maps themselves, if they reproduce the run up to rounding.

        Raises:
            UnsupportedModel: if they do not, or if the run is not finite.
        """
        scale = float(torch.einsum("bhts,bshw->bthw", self.pattern.abs(), self.values.abs()).amax()) + 1.0
        allowed = _ROUNDING * torch.finfo(self.output.dtype).eps * scale
        if not self.error <= allowed:
            raise UnsupportedModel(
                f"the attention maps of {self.name} ({self.what}) are off by {self.error:.2g}, expected at most "
                f"{allowed:.2g}; either the run is not finite, or the layer computes something else than its sites say"
            )
        return self

    def contributions(self, example: int, query: int) -> Float[Tensor, "step head"]:
        """What each source step adds to a query step's output, in the output's units; the norm if it has a width."""
        parts = self.pattern[example, :, query, :].T[..., None] * self.values[example]
        return parts[..., 0] if parts.shape[-1] == 1 and not parts.is_complex() else parts.abs().norm(dim=-1)

    def plot(self, *, example: int = 0, heads: Sequence[int] | None = None) -> go.Figure:
        """The maps of some heads on one example as pictures; the first six without ``heads``."""
        from circuitkit.figures.attention import attention_maps

        return attention_maps(self, example=example, heads=heads)

    def plot_lags(self, *, heads: Sequence[int] | None = None) -> go.Figure:
        """How far back each head looks: mean share of the weight by lag."""
        from circuitkit.figures.attention import lag_curves

        return lag_curves(self, heads=heads)


def recurrence_maps(
    name: str,
    what: str,
    heads: tuple[str, ...],
    *,
    decay: Inexact[Tensor, "batch step unit"],
    strength: Inexact[Tensor, "batch step unit"],
    values: Inexact[Tensor, "batch step unit"],
    first: Inexact[Tensor, " unit"],
    output: Inexact[Tensor, "batch step unit"],
    reverse: bool = False,
    local: bool = False,
) -> AttentionMaps:
    """The maps of  h_t = decay_t h_{t-1} + strength_t values_t  from h = first, with every unit a head.

    Raises:
        UnsupportedModel: if that is not what the output is.
    """
    if reverse:
        decay, strength = decay.flip(1), strength.flip(1)
    pattern = diagonal_map(decay, strength, torch.ones_like(decay))
    start = decay.cumprod(1) * first
    if reverse:
        pattern, start = pattern.flip(-1, -2), start.flip(1)
    values, start, output = (x[..., None] for x in (values, start, output))
    return AttentionMaps(name, what, heads, pattern, values, start, output, local).checked()


def chosen_units(layer: str, n: int, units: Sequence[int] | None) -> list[int]:
    """The numbers of the units that are asked for; all if None.

    Raises:
        OptionError: if the layer has no such unit.
    """
    chosen = list(range(n)) if units is None else [int(unit) for unit in units]
    if wrong := [unit for unit in chosen if not 0 <= unit < n]:
        raise OptionError(f"{layer} has heads 0 to {n - 1}, got {wrong}; choose among those")
    return chosen
