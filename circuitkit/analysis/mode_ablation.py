"""What a network's outputs lose when one of its modes at a fixed point is held still.

    J = sum over modes of  lam_i r_i l_i^T  with  l_i^T r_j = 1 if i = j else 0
    h <- h* + (1 - sum over ablated i of r_i l_i^T) (h - h*)          after every step

The left vector reads how far the mode is out, the right one is what it moves. Complex modes go in conjugate pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from circuitkit.analysis.fixed_points import Step
from circuitkit.analysis.modes import dual, right_modes
from circuitkit.errors import OptionError

if TYPE_CHECKING:
    import plotly.graph_objects as go

ReadOut = Callable[[Tensor], Tensor]  # state [..., state] -> outputs [..., output]


@dataclass(frozen=True, eq=False)
class ModeAblation:
    """Outputs with and without a mode.

    Args:
        eigenvalues: of the ablated modes, conjugates included.
        whole: outputs of the whole network after every step.
        ablated: outputs with the modes held still.
    """

    eigenvalues: Complex[Tensor, " mode"]
    whole: Float[Tensor, "batch step output"]
    ablated: Float[Tensor, "batch step output"]

    @property
    def effect(self) -> Float[Tensor, " output"]:
        """Root mean square change of each output, in root mean square deviations of the whole network's from its mean.

        1 is as much as if the output were replaced by its mean; an output that never varies has no effect to speak of.
        """
        change = (self.ablated - self.whole).square().mean((0, 1)).sqrt()
        varies = (self.whole - self.whole.mean((0, 1))).square().mean((0, 1)).sqrt()
        return torch.where(varies > 0, change / varies, torch.nan)

    def plot(self) -> go.Figure:
        """The effect on every output."""
        from circuitkit.figures.fixed_points import mode_ablation_figure

        return mode_ablation_figure(self)


def mode_projector(
    jacobian: Float[Tensor, "state state"], modes: Sequence[int]
) -> tuple[Float[Tensor, "state state"], Complex[Tensor, " mode"]]:
    """``1 - sum r_i l_i^T`` over some modes and their conjugates, and their eigenvalues; 0 is the largest magnitude.

    Raises:
        OptionError: if a mode does not exist, or the Jacobian's eigenvectors do not span the space.

    >>> mode_projector(torch.diag(torch.tensor([0.5, 2.0], dtype=torch.float64)), [0])[0]
    tensor([[1., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    values, right = right_modes(jacobian)
    order = values.abs().argsort(descending=True)
    values, right = values[order], right[order]
    if not modes or min(modes) < 0 or max(modes) >= len(values):
        raise OptionError(f"got modes {list(modes)}; give numbers from 0 to {len(values) - 1}")
    left = dual(right)
    scale = float(values.abs().max()) or 1.0
    pairs = {int((values - values[i].conj()).abs().argmin()) for i in modes if abs(values[i].imag) > 1e-9 * scale}
    chosen = sorted({*modes, *pairs})
    eye = torch.eye(len(values), dtype=jacobian.dtype, device=jacobian.device)
    return eye - (right[chosen].mT @ left[chosen]).real, values[chosen]


def ablate_modes(
    step: Step,
    read_out: ReadOut,
    point: Float[Tensor, " state"],
    jacobian: Float[Tensor, "state state"],
    modes: Sequence[int],
    start: Float[Tensor, "*batch state"],
    x: Float[Tensor, "batch step input"],
) -> ModeAblation:
    """Outputs of a network with and without some modes of a fixed point, which are held still after every step.

    Args:
        step: one time step.
        read_out: outputs of a state.
        point: the fixed point.
        jacobian: dF/dh there.
        modes: which, 0 for the eigenvalue of largest magnitude; the conjugate of a complex one goes with it.
        start: states before the first step.
        x: inputs.
    """
    projector, values = mode_projector(jacobian, modes)
    start = start.to(point).expand(len(x), -1)
    runs = []
    with torch.no_grad():
        for held in (False, True):
            state, outputs = start, []
            for t in range(x.shape[1]):
                state = step(state, x[:, t].to(point))
                state = point + (state - point) @ projector.T if held else state
                outputs.append(read_out(state))
            runs.append(torch.stack(outputs, 1))
    return ModeAblation(values, *runs)
