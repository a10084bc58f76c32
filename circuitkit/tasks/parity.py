"""Parity: whether an odd number of ones has been read, the smallest task that needs a state which changes sign."""

from __future__ import annotations

import torch

from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import distinct, generator
from circuitkit.tasks.numbers import check_fits, check_length
from circuitkit.tasks.own import from_tokens


@task("parity")
def parity(model: Vocabulary, *, n: int = 64, seed: int = 0, length: int = 12) -> Task:
    """Random bits; the corrupt input has one of them changed, at any step, so that the parity is the other one.

    Token 0 is a zero and token 1 a one; output 0 says even and output 1 odd, read at the last step.

    Args:
        model: a network of two token ids and two outputs, such as ``toys/parity_gru_s0``.
        n: how many pairs.
        seed: seed of the generator that draws them.
        length: steps of a trial.

    Raises:
        OptionError: for fewer than two steps.
        TaskError: if the network has other inputs and outputs, or there are fewer than n pairs.
    """
    check_fits(model, numbers=None, outputs=2, use="toys/parity_gru_s0")
    check_length(length)

    def draw(rng: torch.Generator) -> tuple[tuple[int, ...], int]:
        bits = torch.randint(0, 2, (length,), generator=rng).tolist()
        return tuple(bits), int(torch.randint(0, length, (1,), generator=rng))

    pairs = distinct(draw, n, generator(seed))
    clean = torch.tensor([bits for bits, _ in pairs])
    corrupt, rows = clean.clone(), torch.arange(n)
    at = torch.tensor([where for _, where in pairs])
    corrupt[rows, at] = 1 - clean[rows, at]
    return from_tokens(clean, corrupt, clean.sum(1) % 2, corrupt.sum(1) % 2, name="parity", vocab=model)
