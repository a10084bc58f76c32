"""Evidence accumulation: the running sum of noisy numbers, kept along a line of states."""

from __future__ import annotations

import torch

from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import generator
from circuitkit.tasks.numbers import check_fits, check_length, signs
from circuitkit.tasks.own import from_tokens

NOISE = 0.6
PULSE = 1.0


@task("integrator")
def integrator(model: Vocabulary, *, n: int = 64, seed: int = 0, length: int = 12) -> Task:
    """A pulse of 1 or -1 at step 0, then normal numbers of standard deviation 0.6; the output is their running sum.

    The corrupt input has the pulse the other way round. The metric is the output at the last step times the sign
    of the pulse: as the noise is the same in both, clean less corrupt is what the network kept of the pulse.

    Args:
        model: a network that reads one number and gives one, such as ``toys/integrator_tanh_s0``.
        n: how many pairs.
        seed: seed of the generator that draws them.
        length: steps of a trial.

    Raises:
        OptionError: for fewer than two steps.
        TaskError: if the network has other inputs and outputs.
    """
    check_fits(model, numbers=1, outputs=1, use="toys/integrator_tanh_s0")
    check_length(length)
    rng = generator(seed)
    clean = NOISE * torch.randn(n, length, 1, generator=rng)
    sign = signs((n, 1), rng)
    clean[:, 0] = PULSE * sign
    corrupt = clean.clone()
    corrupt[:, 0] *= -1
    return from_tokens(
        clean, corrupt, None, target=sign[:, None], metric="signed-output", name="integrator", vocab=model
    )
