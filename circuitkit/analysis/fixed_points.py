"""States where a recurrent network stands still: found, told apart, and classified by their Jacobians.

    q(h) = 1/2 |F(h, u) - h|^2        fixed points: q = 0;  slow points: local minima of q with a small speed |F - h|

Sussillo and Barak (2013), Neural Computation 25, 626-649. A fixed point is stable where all eigenvalues of dF/dh lie
inside the unit circle; a saddle with k unstable directions has k of them outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from circuitkit.errors import OptionError

if TYPE_CHECKING:
    import plotly.graph_objects as go

Step = Callable[[Tensor, Tensor], Tensor]  # (state [..., state], x [..., input]) -> state [..., state]
_NUMBERS = 2**23  # numbers in the Jacobians held at once
_FREEZE_EVERY = 25
_FLAT = 1e-6  # |(J - 1)^T r| / |r| below which q counts as flat at a point that moves


@dataclass(frozen=True, eq=False)
class FixedPoints:
    """Fixed and slow points of a network under a constant input, the stillest first within each kind.

    Args:
        states: where they are.
        x: the input under which they stand still.
        speeds: ``|F(h, x) - h|`` there, per step.
        jacobians: dF/dh; row i holds the derivatives of number i of the next state.
        input_jacobians: dF/dx.
        eigenvalues: of the Jacobians, largest magnitude first.
        found: how many starts ended at each.
        n_lost: how many starts ended at no fixed or slow point.
        tolerance: the speed below which a point counts as fixed.
        visited: the states that the search began from, without noise.
    """

    states: Float[Tensor, "point state"]
    x: Float[Tensor, " input"]
    speeds: Float[Tensor, " point"]
    jacobians: Float[Tensor, "point state state"]
    input_jacobians: Float[Tensor, "point state input"]
    eigenvalues: Complex[Tensor, "point state"]
    found: Int[Tensor, " point"]
    n_lost: int
    tolerance: float
    visited: Float[Tensor, "start state"]

    def __len__(self) -> int:
        return len(self.states)

    @property
    def n_unstable(self) -> Int[Tensor, " point"]:
        """How many eigenvalues lie outside the unit circle."""
        return (self.eigenvalues.abs() > 1).sum(-1)

    @property
    def kinds(self) -> tuple[str, ...]:
        """``stable``, ``saddle-k`` with k unstable directions, or ``slow``."""
        return tuple(
            "slow" if speed > self.tolerance else f"saddle-{k}" if k else "stable"
            for speed, k in zip(self.speeds.tolist(), self.n_unstable.tolist(), strict=True)
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind: stable, then saddles with ever more unstable directions, then slow."""
        kinds = self.kinds
        return {kind: kinds.count(kind) for kind in sorted(set(kinds), key=_order)}

    @property
    def index_sum(self) -> int:
        """Sum of ``sign det(1 - J)`` over the fixed points: 1 if none is missing, in a network that stays in a ball.

        Lefschetz: a continuous map of a ball (or cube) into itself has fixed points whose indices sum to 1, where none
        is degenerate. tanh networks and GRUs map the cube [-1, 1]^n into itself. Another sum proves that the search
        missed points; 1 does not prove that it did not.
        """
        fixed = self.speeds <= self.tolerance
        eye = torch.eye(self.states.shape[-1]).to(self.jacobians)
        return int(torch.linalg.det(eye - self.jacobians[fixed]).sign().sum())

    def of(self, kind: str) -> Int[Tensor, " chosen"]:
        """Which points are of a kind."""
        return torch.tensor([i for i, other in enumerate(self.kinds) if other == kind], dtype=torch.long)

    def unstable_direction(self, point: int) -> Float[Tensor, " state"]:
        """Unit right eigenvector of the eigenvalue of largest magnitude, which has to be real.

        Raises:
            OptionError: if that eigenvalue is one of a complex pair.
        """
        values, vectors = torch.linalg.eig(self.jacobians[point])
        top = int(values.abs().argmax())
        if abs(float(values[top].imag)) > 1e-9 * abs(complex(values[top])):
            raise OptionError(f"point {point} turns away in a plane: its top eigenvalue {complex(values[top]):.4g}")
        direction = vectors[:, top].real
        return direction / direction.norm()

    def plot(self) -> go.Figure:
        """The points in the plane of the first two principal components of the visited states, and their spectra."""
        from circuitkit.figures.fixed_points import fixed_points_figure

        return fixed_points_figure(self)


def find_fixed_points(
    step: Step,
    states: Float[Tensor, "*row state"],
    x: Float[Tensor, " input"],
    *,
    n_starts: int = 512,
    noise: float = 0.5,
    steps: int = 1000,
    rate: float = 0.01,
    polish: int = 50,
    tolerance: float = 1e-9,
    slow: float = 1e-3,
    apart: float = 1e-3,
    seed: int = 0,
) -> FixedPoints:
    """Fixed and slow points of a network under a constant input, searched for from noisy visited states in float64.

    All starts descend q together by Adam; a start that stands still is frozen. Then damped Gauss-Newton steps take
    them to rounding error. Cost: ``n_starts * steps`` steps of the network forward and backward, at most.

    Args:
        step: one time step, as `circuitkit.models.recurrent.transition.transition` makes it, or any function of yours
            that is differentiable and works on batches.
        states: visited states, the more varied the better.
        x: the input, held constant.
        n_starts: how many starts.
        noise: standard deviation of the noise on every number of a start, in root mean square deviations of a number
            of the visited states from its mean.
        steps: most steps of Adam.
        rate: learning rate of Adam, in the same unit as the noise.
        polish: most Gauss-Newton steps.
        tolerance: speed below which a point is fixed.
        slow: speed below which a local minimum of q is kept as a slow point.
        apart: distance below which two ends are one point, in root mean square distances of visited states from
            their mean.
        seed: of the starts.

    Raises:
        OptionError: if there are no states, one given or made by the step is not finite, or an option is out of range.

    >>> rest = find_fixed_points(lambda h, x: torch.tanh(2 * h + x), torch.randn(64, 1), torch.zeros(1), n_starts=32)
    >>> rest.counts
    {'stable': 2, 'saddle-1': 1}
    """
    visited, x = states.detach().reshape(-1, states.shape[-1]).double(), x.detach().double()
    _check(visited, x, n_starts, noise, rate, tolerance, slow, apart)
    spread = float((visited - visited.mean(0)).square().mean().sqrt()) or 1.0
    random = torch.Generator().manual_seed(seed)
    starts = visited[torch.randint(len(visited), (n_starts,), generator=random).to(visited.device)]
    ends = starts + noise * spread * torch.randn(starts.shape, generator=random, dtype=torch.float64).to(visited)
    step = getattr(step, "frozen", lambda _like: step)(visited)  # a Transition fetches its weights once
    if not _residual(step, ends, x).isfinite().all():
        raise OptionError("the step gives NaN or infinite states; check its weights, and the states to start from")
    ends = _descend(step, ends, x, steps, rate * spread, tolerance)
    parts = ends.split(max(1, _NUMBERS // visited.shape[-1] ** 2))
    ends = torch.cat([_polish(step, part, x, polish) for part in parts])
    speeds = _residual(step, ends, x).norm(dim=-1)
    still = (speeds <= tolerance) | ((speeds <= slow) & _at_minimum(step, ends, x))
    chosen, found = _different(ends[still], speeds[still], apart * spread * visited.shape[-1] ** 0.5)
    states_found = ends[still][chosen]
    by_state, by_input = jacobians(step, states_found, x)
    values = torch.linalg.eigvals(by_state)
    values = values.gather(1, values.abs().argsort(1, descending=True))
    about = (speeds[still][chosen], by_state, by_input, values, found, int((~still).sum()), tolerance, starts)
    return _sorted(FixedPoints(states_found, x, *about))


def jacobians(
    step: Step, states: Float[Tensor, "point state"], x: Float[Tensor, " input"]
) -> tuple[Float[Tensor, "point state state"], Float[Tensor, "point state input"]]:
    """dF/dh and dF/dx at each state, by reverse-mode derivatives of all points at once."""
    if not len(states):
        n = states.shape[-1]
        return states.new_zeros(0, n, n), states.new_zeros(0, n, len(x))
    both = torch.func.vmap(torch.func.jacrev(step, argnums=(0, 1)), in_dims=(0, None))
    parts = [both(part, x) for part in states.split(max(1, _NUMBERS // states.shape[-1] ** 2))]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _residual(step: Step, states: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return step(states, x.expand(*states.shape[:-1], -1)) - states


def _descend(step: Step, starts: Tensor, x: Tensor, steps: int, rate: float, tolerance: float) -> Tensor:
    """Adam on q, every start for itself: moments are elementwise, so starts that stand still can leave the batch."""
    ends, active = starts.clone(), torch.arange(len(starts), device=starts.device)
    h, first, second = starts.clone(), torch.zeros_like(starts), torch.zeros_like(starts)
    for t in range(1, steps + 1):
        h = h.detach().requires_grad_()
        with torch.enable_grad():
            gap = (step(h, x.expand(len(h), -1)) - h).square().sum(-1) / 2
            (slope,) = torch.autograd.grad(gap.sum(), h)
        with torch.no_grad():
            first, second = first.lerp(slope, 0.1), second.lerp(slope.square(), 0.001)
            # The rate falls to a hundredth, so that starts settle rather than circle.
            now = rate * 0.01 ** (t / steps)
            new = h - now * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-12)
            still = gap <= tolerance**2 / 2
            new = torch.where(still[:, None], h, new)
            if t % _FREEZE_EVERY == 0 or t == steps:
                ends[active] = new
                h, first, second, active = new[~still], first[~still], second[~still], active[~still]
            else:
                h = new
        if not len(h):
            break
    return ends.detach()


def _polish(step: Step, states: Tensor, x: Tensor, steps: int) -> Tensor:
    """Gauss-Newton with a damping of its own for every point (Levenberg-Marquardt); a step that raises q is undone."""
    n = states.shape[-1]
    eye = torch.eye(n, dtype=states.dtype, device=states.device)
    damping = torch.full((len(states), 1, 1), 1e-3, dtype=states.dtype, device=states.device)
    gap = _residual(step, states, x)
    for _ in range(steps):
        slope = jacobians(step, states, x)[0] - eye
        normal = slope.mT @ slope
        move = torch.linalg.solve_ex(normal + damping * eye, slope.mT @ gap[..., None]).result[..., 0]
        new = states - move
        new_gap = _residual(step, new, x)
        better = new_gap.square().sum(-1) < gap.square().sum(-1)
        states, gap = torch.where(better[:, None], new, states), torch.where(better[:, None], new_gap, gap)
        damping = torch.where(better[:, None, None], damping / 5, damping * 5).clamp(1e-15, 1e6)
        if not bool((better & (gap.norm(dim=-1) > 1e-14)).any()) and bool((damping > 1e3).all()):
            break
    return states


def _at_minimum(step: Step, states: Tensor, x: Tensor) -> Tensor:
    """Whether the slope of q is next to nothing against the slope that its residual could have."""
    slopes, gap = jacobians(step, states, x)[0], _residual(step, states, x)
    slopes.diagonal(dim1=1, dim2=2).sub_(1)
    return torch.linalg.vecdot(slopes.mT, gap[:, None, :]).norm(dim=-1) <= _FLAT * gap.norm(dim=-1)


def _different(states: Tensor, speeds: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Indices of points more than a radius apart, the stillest of each crowd, and how many crowd there."""
    left = speeds.argsort()
    chosen, found = [], []
    while len(left):
        near = (states[left] - states[left[0]]).norm(dim=-1) <= radius
        chosen.append(int(left[0]))
        found.append(int(near.sum()))
        left = left[~near]
    return torch.tensor(chosen, dtype=torch.long), torch.tensor(found, dtype=torch.long)


def _order(kind: str) -> tuple[int, int]:
    rank, _, k = kind.partition("-")
    return ("stable", "saddle", "slow").index(rank), int(k or 0)


def _sorted(points: FixedPoints) -> FixedPoints:
    kinds = points.kinds
    order = sorted(range(len(points)), key=lambda i: (_order(kinds[i]), float(points.speeds[i])))
    per_point = ("states", "speeds", "jacobians", "input_jacobians", "eigenvalues", "found")
    fields = {name: getattr(points, name)[order] for name in per_point}
    return FixedPoints(**fields, x=points.x, n_lost=points.n_lost, tolerance=points.tolerance, visited=points.visited)


def _check(
    visited: Tensor, x: Tensor, n_starts: int, noise: float, rate: float, tolerance: float, slow: float, apart: float
) -> None:
    if not visited.numel():
        raise OptionError("got no visited states to start from; give the states of a run")
    if not (visited.isfinite().all() and x.isfinite().all()):
        raise OptionError("got states or an input that are not finite; see where the run went wrong first")
    if n_starts < 1 or noise < 0 or min(rate, tolerance, slow, apart) <= 0:
        raise OptionError(
            f"got n_starts={n_starts}, noise={noise}, rate={rate}, tolerance={tolerance}, slow={slow}, apart={apart}; "
            "n_starts must be at least 1, noise at least 0, the others positive"
        )
