"""Whether activity travels across the units of a layer: its power in space and time.

    a(s, t) = sum over k, f of  A(k, f) exp(2 pi i (k s + f t))        velocity of a component: -f / k units per step

Power on the line f = 0 stands still, and power at k = 0 is the same at all units. The rest moves, but a standing wave
does too, as two waves that run against each other: so the direction is reported beside it. Units have to be ordered
as they lie in space (along a ring, or the places of a convolution). Compare Keller et al. (2023), arXiv:2309.08045.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import OptionError

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Waves:
    """Activity in space and time and its spectrum.

    Args:
        activity: what was given, the mean over all units and steps taken off.
        power: mean squared activity at each spatial and temporal frequency, 0 in the middle; sums to the variance.
        wavenumbers: turns per unit.
        frequencies: turns per step.
    """

    activity: Float[Tensor, "step unit"]
    power: Float[Tensor, "frequency wavenumber"]
    wavenumbers: Float[Tensor, " wavenumber"]
    frequencies: Float[Tensor, " frequency"]

    @property
    def moving(self) -> float:
        """Share of the power at neither f = 0 nor k = 0; 0 for activity that never varies."""
        return float(self._moving().sum() / self.power.sum().clamp_min(1e-300))

    @property
    def direction(self) -> float:
        """(power that runs towards later units - towards earlier ones) / both: 0 for a standing wave."""
        onward = self._moving() * -(self.frequencies[:, None] * self.wavenumbers[None, :]).sign()
        return float(onward.sum() / self._moving().sum().clamp_min(1e-300))

    @property
    def velocity(self) -> float | None:
        """Units per step of the strongest moving component; None if nothing moves."""
        moving = self._moving()
        if float(moving.sum()) <= 1e-12 * float(self.power.sum()):
            return None
        f, k = divmod(int(moving.argmax()), len(self.wavenumbers))
        return float(-self.frequencies[f] / self.wavenumbers[k])

    def _moving(self) -> Tensor:
        # At the Nyquist frequencies a wave and its mirror image are the same samples: no direction can be told.
        f, k = self.frequencies, self.wavenumbers
        return self.power * ((f != 0) & (f != -0.5))[:, None] * ((k != 0) & (k != -0.5))[None, :]

    def plot(self) -> go.Figure:
        """Activity by unit and step, and its spectrum with the line of the dominant velocity."""
        from circuitkit.figures.waves import waves_figure

        return waves_figure(self)


def space_time(activity: Float[Tensor, "step unit"]) -> Waves:
    """Power spectrum of activity over units and steps.

    Args:
        activity: one run; units in their order in space. Ends that do not fit together (space is taken as a ring, and
            time too) spread power around every component: give whole periods where they are known.

    Raises:
        OptionError: if there are fewer than 3 steps or units, or a number is not finite.

    >>> t, s = torch.arange(20)[:, None], torch.arange(10)[None, :]
    >>> waves = space_time(torch.cos(2 * torch.pi * (s / 10 - t / 20)))
    >>> round(waves.moving, 3), round(waves.direction, 3), waves.velocity
    (1.0, 1.0, 0.5)
    """
    if min(activity.shape) < 3 or not activity.isfinite().all():
        raise OptionError(f"got activity of shape {tuple(activity.shape)}; give 3 steps and 3 units or more, finite")
    activity = activity.detach().double()
    activity = activity - activity.mean()
    n_steps, n_units = activity.shape
    power = torch.fft.fftshift(torch.fft.fft2(activity).abs().square()) / activity.numel() ** 2
    wavenumbers, frequencies = (torch.fft.fftshift(torch.fft.fftfreq(n)).double() for n in (n_units, n_steps))
    return Waves(activity, power, wavenumbers.to(power), frequencies.to(power))
