"""Working memory in phase (Pals et al. 2024): which stimulus was shown is kept as an offset to a rhythm."""

from __future__ import annotations

import math

import torch

from circuitkit.errors import TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import generator
from circuitkit.tasks.numbers import check_fits, check_length
from circuitkit.tasks.own import from_tokens

HZ = 8.0
ONSET, LASTS = (0.125, 0.25), (0.125, 0.175)  # seconds: ranges of the pulse's begin and of its duration


@task("stimulus-phase")
def stimulus_phase(model: Vocabulary, *, n: int = 64, seed: int = 0, length: int = 300) -> Task:
    """A sine of 8 Hz and a pulse on one of two channels; then the output is the sine, shifted by that one's offset.

    The corrupt input has the pulse on the other channel, whose offset is half a cycle away. The metric is the mean
    of output times target over the last cycle: about 1/2 if the stimulus is kept, about -1/2 if it is the other.

    Args:
        model: a network of the card ``phase-memory``, such as ``phase-memory/full_rank_n100``.
        n: how many pairs.
        seed: seed of the generator that draws them.
        length: steps of a trial.

    Raises:
        OptionError: if the trial ends before one cycle after the pulse.
        TaskError: if the network has other inputs and outputs, or its card has no offsets and time step.
    """
    check_fits(model, numbers=3, outputs=1, use="phase-memory/full_rank_n100")
    if missing := [key for key in ("phase_offsets_cycles", "dt_ms") if key not in model.card]:
        raise TaskError(f"the card of {model.name!r} lacks {', '.join(missing)}: use 'phase-memory/full_rank_n100'")
    step = model.card["dt_ms"] / 1000
    cycle = math.ceil(1 / HZ / step)
    check_length(length, math.ceil((ONSET[1] + LASTS[1]) / step) + cycle)
    rng = generator(seed)
    phase, begin, lasts = (torch.rand(n, 1, generator=rng) for _ in range(3))
    time = torch.arange(length) * step
    rhythm = 2 * math.pi * (HZ * time + phase)
    begin = ONSET[0] + (ONSET[1] - ONSET[0]) * begin
    end = begin + LASTS[0] + (LASTS[1] - LASTS[0]) * lasts
    pulse = ((time >= begin) & (time < end)).float()
    shown = torch.randint(0, 2, (n,), generator=rng)
    # Stimulus i is channel -(i + 1).
    clean, corrupt = (
        torch.stack((rhythm.sin(), pulse * s, pulse * (1 - s)), -1) for s in (shown[:, None], 1 - shown[:, None])
    )
    offset = torch.tensor(model.card["phase_offsets_cycles"])[shown][:, None]
    target = (rhythm + 2 * math.pi * offset).sin()[:, -cycle:]
    where = torch.arange(length - cycle, length).expand(n, -1)
    return from_tokens(
        clean,
        corrupt,
        None,
        positions=where,
        target=target,
        metric="signed-output",
        name="stimulus-phase",
        vocab=model,
    )
