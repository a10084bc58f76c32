"""Where the second largest number stands: the task of the hand-made networks of AlgZoo."""

from __future__ import annotations

import torch

from circuitkit.errors import TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import generator
from circuitkit.tasks.numbers import check_fits, outputs_of
from circuitkit.tasks.own import from_tokens


@task("second-largest")
def second_largest(model: Vocabulary, *, n: int = 64, seed: int = 0) -> Task:
    """As many normal numbers as the network has outputs; right is the output of the second largest one's position.

    The corrupt input has the largest and the second largest exchanged, so the position of the largest is wrong on
    the clean input and right on the corrupt one. Read after the last number.

    Args:
        model: a network that reads one number at each step, such as ``second-largest/length_3``.
        n: how many pairs.
        seed: seed of the generator that draws them.

    Raises:
        TaskError: if the network has other inputs and outputs.
    """
    length = outputs_of(model)
    needs = "reads one number at each step and has an output for each step"
    check_fits(model, numbers=1, outputs=length, use="second-largest/length_3", needs=needs)
    if length < 2:
        raise TaskError(
            f"{model.name!r} has one output, and of one number none is second: use 'second-largest/length_3'"
        )
    clean = torch.randn(n, length, generator=generator(seed))
    order = clean.argsort(1, descending=True)
    largest, second = order[:, :1], order[:, 1:2]
    corrupt = clean.scatter(1, largest, clean.gather(1, second)).scatter(1, second, clean.gather(1, largest))
    return from_tokens(clean[..., None], corrupt[..., None], second, largest, name="second-largest", vocab=model)
