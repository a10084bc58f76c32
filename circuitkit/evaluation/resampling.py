"""The same task with other examples: drawn again with replacement, made with another seed, or with labels shuffled."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.tasks.base import Batch, Task

SHUFFLES = ("answers", "swap", "corrupt")


def resampled(task: Task, index: Int[Tensor, " example"]) -> Task:
    """The chosen examples, counted through all batches; one may be chosen twice. Batches keep their lengths."""
    batches, start = [], 0
    for batch in task.batches:
        mine = index[(index >= start) & (index < start + len(batch))] - start
        if len(mine):
            batches.append(batch.rows(mine))
        start += len(batch)
    return replace(task, batches=tuple(batches))


def shuffled(task: Task, what: str, *, seed: int) -> Task:
    """The task with what it is about destroyed.

    Args:
        what: ``answers`` gives every example another one's answers (and target); ``swap`` exchanges right and wrong
            answers of a random half; ``corrupt`` gives every example another one's corrupt input of the same length.
        seed: of the shuffle.

    Raises:
        OptionError: if there is no such shuffle, the metric does not read what it would shuffle, or fewer than two
            examples can be exchanged.
    """
    if what not in SHUFFLES:
        raise OptionError(f"got shuffle {what!r}, expected one of {', '.join(SHUFFLES)}")
    needed = {"answers": {"right", "wrong", "target"}, "swap": {"wrong"}, "corrupt": set(task.metric.needs)}[what]
    if not needed & set(task.metric.needs):
        raise OptionError(
            f"metric {task.metric.name!r} does not read what {what!r} shuffles; use {', '.join(shuffles_for(task))}"
        )
    if len(task) < 2:
        raise OptionError(f"task {task.name!r} has {len(task)} example, a shuffle needs at least 2; make a larger one")
    if what == "corrupt" and all(len(batch.lengths.unique()) == len(batch) for batch in task.batches):
        raise OptionError(
            f"task {task.name!r} has no two prompts of one length to exchange corrupt inputs between; make a larger one"
        )
    generator = torch.Generator().manual_seed(seed)
    change = {"answers": _other_answers, "swap": _swapped, "corrupt": _other_corrupt}[what]
    return replace(task, batches=tuple(change(batch, generator) for batch in task.batches), known=None)


def shuffles_for(task: Task) -> tuple[str, ...]:
    """The shuffles that make sense for a task's metric."""
    needs = set(task.metric.needs)
    labels = ("answers",) if needs & {"right", "wrong", "target"} else ()
    return (*labels, *(("swap",) if {"right", "wrong"} <= needs else ()), "corrupt")


def _other_answers(batch: Batch, generator: torch.Generator) -> Batch:
    order = _moved(len(batch), generator)
    parts = {name: getattr(batch, name)[order] for name in ("right", "wrong")}
    target = None if batch.target is None else batch.target[order]
    return replace(batch, **parts, target=target)


def _swapped(batch: Batch, generator: torch.Generator) -> Batch:
    swap = torch.rand(len(batch), generator=generator)[:, None, None].to(batch.right.device) < 0.5
    wide = max(batch.right.shape[-1], batch.wrong.shape[-1])
    right, wrong = (_padded(ids, wide) for ids in (batch.right, batch.wrong))
    return replace(batch, right=torch.where(swap, wrong, right), wrong=torch.where(swap, right, wrong))


def _padded(ids: Tensor, wide: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, wide - ids.shape[-1]), value=-1)


def _other_corrupt(batch: Batch, generator: torch.Generator) -> Batch:
    corrupt = batch.corrupt.clone()
    for length in batch.lengths.unique().tolist():
        rows = (batch.lengths == length).nonzero().flatten()
        corrupt[rows] = batch.corrupt[rows[_moved(len(rows), generator)]]
    return replace(batch, corrupt=corrupt)


def _moved(n: int, generator: torch.Generator) -> Tensor:
    """A random order in which nothing stays where it was: one cycle through all, in random order."""
    order = torch.randperm(n, generator=generator)
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    return moved
