"""Networks that are driven periodically: the cycles that they settle into, and whether these remember a stimulus.

    G(h) = F(... F(F(h, u_1), u_2) ..., u_T)        the stroboscopic map: one period T of the drive u

A limit cycle that is locked to the drive is a fixed point of G. It is stable where all eigenvalues of dG/dh, its
Floquet multipliers, lie inside the unit circle. A network may keep which stimulus it saw as the cycle it is on: then
the outputs on the cycles differ in phase to the drive (Pals, Macke, Barak 2024, PLoS Comput. Biol. 20, e1011852).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from circuitkit.analysis.fixed_points import Step
from circuitkit.errors import OptionError

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class LimitCycles:
    """Cycles locked to a periodic drive.

    Args:
        drive: the input over one period.
        orbits: the state after each step of the period, for each cycle.
        gaps: distance between the state at the end of a period and a period before.
        multipliers: Floquet multipliers, largest magnitude first.
        reached: the cycle that each start ended on, or -1.
    """

    drive: Float[Tensor, "step input"]
    orbits: Float[Tensor, "cycle step state"]
    gaps: Float[Tensor, " cycle"]
    multipliers: Complex[Tensor, "cycle state"]
    reached: Int[Tensor, " start"]

    def __len__(self) -> int:
        return len(self.orbits)

    @property
    def stable(self) -> tuple[bool, ...]:
        """Whether all multipliers of a cycle lie inside the unit circle."""
        return tuple((self.multipliers.abs() < 1).all(-1).tolist())

    def plot(self) -> go.Figure:
        """The cycles in the plane of their first two principal components."""
        from circuitkit.figures.limit_cycles import limit_cycles_figure

        return limit_cycles_figure(self)


@dataclass(frozen=True, eq=False)
class PhaseMemory:
    """Whether each stimulus leaves the network on a cycle of its own, with an output of the wanted phase.

    Args:
        cycles: start i is the state after stimulus i.
        outputs: over one period, after each stimulus has been forgotten or kept.
        targets: the wanted sines.
        offsets: phase of each output to the reference, in turns of the reference, in (-1/2, 1/2].
        amplitudes: of the outputs at the reference's frequency.
        wanted: the offsets that the task asks for, in turns.
        correlations: of output and wanted sine over one period.
        threshold: the least correlation that passes.
    """

    cycles: LimitCycles
    outputs: Float[Tensor, "stimulus step"]
    targets: Float[Tensor, "stimulus step"]
    offsets: Float[Tensor, " stimulus"]
    amplitudes: Float[Tensor, " stimulus"]
    wanted: tuple[float, ...]
    correlations: Float[Tensor, " stimulus"]
    threshold: float

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it does not remember; nothing if it does."""
        reached, found = self.cycles.reached.tolist(), []
        if -1 in reached:
            found.append(f"stimulus {reached.index(-1)} leads to no cycle that is locked to the drive")
        for i, cycle in enumerate(reached):
            if cycle >= 0 and cycle in reached[:i]:
                found.append(f"stimuli {reached.index(cycle)} and {i} end on the same cycle")
        found += [f"cycle {i} is not stable" for i, stable in enumerate(self.cycles.stable) if not stable]
        for i, correlation in enumerate(self.correlations.tolist()):
            if not correlation >= self.threshold:  # an output that stands still correlates with nothing: nan
                found.append(f"the output after stimulus {i} correlates {correlation:.2f} with the wanted one")
        return tuple(found)

    @property
    def works(self) -> bool:
        """Whether each stimulus has a stable cycle of its own and the wanted output."""
        return not self.problems

    def plot(self) -> go.Figure:
        """The outputs over one period beside the wanted ones."""
        from circuitkit.figures.limit_cycles import phase_memory_figure

        return phase_memory_figure(self)


def stroboscopic(step: Step, drive: Float[Tensor, "step input"]) -> Callable[[Tensor, Tensor], Tensor]:
    """One period of a drive as one step: ``(state, x) -> state``; what ``x`` holds is added to every input.

    Give it to `find_fixed_points` with ``x = 0`` for cycles that are not stable.
    """

    def period(state: Tensor, x: Tensor) -> Tensor:
        for u in drive.to(state):
            state = step(state, (u + x).expand(*state.shape[:-1], -1))
        return state

    return period


def find_limit_cycles(
    step: Step,
    starts: Float[Tensor, "start state"],
    drive: Float[Tensor, "step input"],
    *,
    periods: int = 400,
    tolerance: float = 1e-8,
    apart: float = 1e-3,
) -> LimitCycles:
    """The cycles that a network settles into when it is driven periodically, in float64. Finds stable ones only.

    Args:
        step: one time step.
        starts: states to begin from, at the start of a period.
        drive: the input over one period, which must hold a whole number of steps: 125 of 2 ms for two turns of 8 Hz.
        periods: most periods.
        tolerance: change over one period below which a start has settled, relative to the states' size.
        apart: distance below which two ends are one cycle, relative to the states' size.

    Raises:
        OptionError: if there is no start or no drive, or a number is not finite.

    >>> cycles = find_limit_cycles(lambda h, x: 0.5 * h + x, torch.zeros(1, 1), torch.tensor([[1.0], [-1.0]]))
    >>> cycles.stable, [round(x, 6) for x in cycles.orbits.flatten().tolist()]
    ((True,), [0.666667, -0.666667])
    """
    if not (starts.numel() and drive.numel() and starts.isfinite().all() and drive.isfinite().all()):
        raise OptionError("got no start or no drive, or one that is not finite; give finite states and one period")
    state, drive = starts.detach().double(), drive.detach().double()
    step = getattr(step, "frozen", lambda _like: step)(state)
    period, none = stroboscopic(step, drive), drive.new_zeros(drive.shape[1])
    with torch.no_grad():
        for _ in range(periods):
            before, state = state, period(state, none)
            gaps, size = (state - before).norm(dim=-1), state.norm(dim=-1).max().clamp_min(1e-30)
            # A network that blows up has no cycle: its gaps are infinite, or not a number.
            settled = gaps.isfinite() & (gaps <= tolerance * size)
            if bool(settled.all()) or not bool(gaps.isfinite().any()):
                break
        chosen, reached = _cycles(state, settled, float(apart * size))
        orbits, at = [], state[chosen]
        for u in drive:
            at = step(at, u.expand(len(at), -1))
            orbits.append(at)
    slopes = torch.func.vmap(torch.func.jacfwd(period), in_dims=(0, None))
    values = torch.linalg.eigvals(slopes(state[chosen], none)) if chosen else state.new_zeros(0, state.shape[1]) + 0j
    values = values.gather(1, values.abs().argsort(1, descending=True))
    return LimitCycles(drive, torch.stack(orbits, 1), gaps[chosen], values, reached)


def phase_memory(
    step: Step,
    read_out: Callable[[Tensor], Tensor],
    start: Float[Tensor, " state"],
    stimuli: Float[Tensor, "stimulus pulse_step input"],
    drive: Float[Tensor, "step input"],
    wanted: Sequence[float],
    *,
    turns: int = 1,
    reference: int = 0,
    threshold: float = 0.9,
    periods: int = 400,
) -> PhaseMemory:
    """Whether a driven network keeps which stimulus it saw as the phase of its output.

    Args:
        step: one time step.
        read_out: ``state [..., state] -> output [..., 1]``.
        start: the state before the stimuli.
        stimuli: inputs while each is shown, the drive included, over a whole number of periods.
        drive: the input over one period, without stimuli.
        wanted: phase of the output to the reference for each stimulus, in turns.
        turns: how many turns of the reference one period holds.
        reference: which input is the reference, a sine.
        threshold: least correlation of output and wanted sine.
        periods: most periods to settle.

    Raises:
        OptionError: if the stimuli do not fit the wanted offsets or the period.
    """
    if len(stimuli) != len(wanted) or stimuli.shape[1] % len(drive):
        raise OptionError(
            f"got {len(stimuli)} stimuli of {stimuli.shape[1]} steps for {len(wanted)} offsets and a period of "
            f"{len(drive)} steps; give one offset for each, and a whole number of periods"
        )
    state = start.detach().double().expand(len(stimuli), -1)
    step = getattr(step, "frozen", lambda _like: step)(state)
    with torch.no_grad():
        for t in range(stimuli.shape[1]):
            state = step(state, stimuli[:, t].double())
        cycles = find_limit_cycles(step, state, drive, periods=periods)
        orbits = cycles.orbits[cycles.reached.clamp_min(0)] if len(cycles) else None
        outputs = drive.new_full((len(stimuli), len(drive)), math.nan, dtype=torch.float64)
        if orbits is not None:
            outputs = torch.where(cycles.reached[:, None] >= 0, read_out(orbits)[..., 0], outputs)
    wave = torch.exp(-2j * math.pi * turns * torch.arange(len(drive), device=drive.device).double() / len(drive))
    beat = 2 * (cycles.drive[:, reference] * wave).mean()
    parts = 2 * (outputs * wave).mean(-1)
    offsets = (parts / beat).angle() / (2 * math.pi)
    goal = torch.exp(2j * math.pi * torch.tensor(list(wanted), dtype=torch.float64, device=drive.device))
    targets = (beat * goal[:, None] * wave.conj()).real
    correlations = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(outputs, targets, strict=True)])
    return PhaseMemory(cycles, outputs, targets, offsets, parts.abs(), tuple(wanted), correlations, threshold)


def _cycles(ends: Tensor, settled: Tensor, radius: float) -> tuple[list[int], Tensor]:
    """One end of each cycle, and the cycle of each start, -1 where it did not settle."""
    chosen, reached = list[int](), torch.full((len(ends),), -1, dtype=torch.long, device=ends.device)
    for i in settled.nonzero().flatten().tolist():
        near = [k for k, j in enumerate(chosen) if float((ends[i] - ends[j]).norm()) <= radius]
        if not near:
            chosen.append(i)
        reached[i] = near[0] if near else len(chosen) - 1
    return chosen, reached
