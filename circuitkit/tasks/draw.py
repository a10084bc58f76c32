"""Seeded drawing of distinct pairs; the global random state is never touched."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from circuitkit.errors import TaskError

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


def generator(seed: int) -> torch.Generator:
    """A generator of its own for one task."""
    return torch.Generator().manual_seed(seed)


def pick(items: Sequence[T], rng: torch.Generator) -> T:
    """One item, uniformly."""
    return items[int(torch.randint(len(items), (1,), generator=rng))]


def sample(items: Sequence[T], k: int, rng: torch.Generator) -> list[T]:
    """``k`` different items in random order."""
    return [items[i] for i in torch.randperm(len(items), generator=rng)[:k].tolist()]


def choose(items: Sequence[T], n: int, rng: torch.Generator) -> list[T]:
    """``n`` of all the pairs that exist, in random order.

    Raises:
        TaskError: if there are fewer than ``n``.
    """
    if n > len(items):
        raise TaskError(
            f"got n = {n}, but this task has only {len(items)} distinct pairs for this model; ask for fewer"
        )
    return sample(items, n, rng)


def distinct(draw: Callable[[torch.Generator], H], n: int, rng: torch.Generator) -> list[H]:
    """``n`` different pairs from a space too large to list.

    Raises:
        TaskError: if 100 draws in a row bring nothing new.

    >>> sorted(distinct(lambda rng: pick("abc", rng), 3, generator(0)))
    ['a', 'b', 'c']
    """
    found: dict[H, None] = {}
    misses = 0
    while len(found) < n:
        pair = draw(rng)
        misses = misses + 1 if pair in found else 0
        found[pair] = None
        if misses >= 100:
            raise TaskError(f"got n = {n}, but found only {len(found)} distinct pairs for this model; ask for fewer")
    return list(found)
