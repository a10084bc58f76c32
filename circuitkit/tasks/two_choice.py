"""Two-choice discrimination: which of two inputs was the stronger one, a little later."""

from __future__ import annotations

import torch

from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import distinct, generator, pick
from circuitkit.tasks.numbers import check_fits
from circuitkit.tasks.own import from_tokens

LENGTH = 200  # steps of 10 ms
ONSET, LASTS = (0, 100), (25, 75)
COHERENCES = (0.1, 0.3, 0.5, 0.7)


@task("two-choice")
def two_choice(model: Vocabulary, *, n: int = 64, seed: int = 0) -> Task:
    """Both inputs are 1 for a while, one of them more by the coherence; the larger output at the end names it.

    The corrupt input has the coherence on the other input. Onset 0 to 1 s, duration 0.25 to 0.75 s, coherence 0.1
    to 0.7, as in the trials that the network was trained on; trials last 2 s in steps of 10 ms.

    Args:
        model: a network that reads two numbers and has two outputs, such as ``2afc/rnn``.
        n: how many pairs.
        seed: seed of the generator that draws them.

    Raises:
        TaskError: if the network has other inputs and outputs, or there are fewer than n pairs.
    """
    check_fits(model, numbers=2, outputs=2, use="2afc/rnn")

    def draw(rng: torch.Generator) -> tuple[int, int, float, int]:
        begin, lasts = (int(torch.randint(a, b + 1, (1,), generator=rng)) for a, b in (ONSET, LASTS))
        return begin, lasts, pick(COHERENCES, rng), int(torch.randint(0, 2, (1,), generator=rng))

    trials = distinct(draw, n, generator(seed))
    clean, corrupt = torch.zeros(n, LENGTH, 2), torch.zeros(n, LENGTH, 2)
    for i, (begin, lasts, coherence, stronger) in enumerate(trials):
        for inputs, side in ((clean, stronger), (corrupt, 1 - stronger)):
            inputs[i, begin : begin + lasts] = 1.0
            inputs[i, begin : begin + lasts, side] += coherence
    right = torch.tensor([side for *_, side in trials])
    return from_tokens(clean, corrupt, right, 1 - right, name="two-choice", vocab=model)
