"""The flip-flop (Sussillo and Barak 2013): remember the sign of the last pulse on each of several channels."""

from __future__ import annotations

import torch

from circuitkit.errors import OptionError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import distinct, generator
from circuitkit.tasks.numbers import check_fits, check_length, outputs_of, signs
from circuitkit.tasks.own import from_tokens

RATE = 0.15  # of pulses after step 0, per channel and step


@task("flip-flop")
def flip_flop(model: Vocabulary, *, n: int = 64, seed: int = 0, length: int = 12, bit: int = 0) -> Task:
    """Every channel has a pulse of 1 or -1 at step 0; others may follow, but none on one channel, the bit.

    The corrupt input has the bit's pulse the other way round, and nothing else. Read at the last step is the
    output of that channel, which should be the pulse's sign: the metric is the output times that sign.

    Args:
        model: a network that reads as many numbers as it gives, such as ``toys/flip-flop_tanh_s0``.
        n: how many pairs.
        seed: seed of the generator that draws them.
        length: steps of a trial.
        bit: the channel that has to be remembered.

    Raises:
        OptionError: if there is no such channel, or fewer than two steps.
        TaskError: if the network has other inputs and outputs, or there are fewer than n pairs.
    """
    channels = outputs_of(model)
    needs = "reads numbers and has as many outputs as it reads numbers"
    check_fits(model, numbers=channels, outputs=channels, use="toys/flip-flop_tanh_s0", needs=needs)
    check_length(length)
    if not 0 <= bit < channels:
        raise OptionError(f"got bit = {bit}, expected a channel between 0 and {channels - 1}")

    def draw(rng: torch.Generator) -> tuple[float, ...]:
        present = torch.rand(length, channels, generator=rng) < RATE
        present[:, bit], present[0] = False, True
        return tuple(torch.where(present, signs((length, channels), rng), 0.0).flatten().tolist())

    clean = torch.tensor(distinct(draw, n, generator(seed))).unflatten(1, (length, channels))
    corrupt, target = clean.clone(), torch.zeros(n, 1, channels)
    corrupt[:, 0, bit] *= -1
    target[:, 0, bit] = clean[:, 0, bit]
    return from_tokens(clean, corrupt, None, target=target, metric="signed-output", name="flip-flop", vocab=model)
