"""What tasks for networks that read and give numbers have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.errors import OptionError, TaskError
from circuitkit.tasks.base import Vocabulary


def outputs_of(model: Vocabulary) -> int:
    """How many outputs a network has at each step."""
    return int(getattr(model, "d_vocab_out", None) or model.d_vocab)


def check_fits(model: Vocabulary, *, numbers: int | None, outputs: int, use: str, needs: str | None = None) -> None:
    """Refuse a network of other sizes. Raises TaskError naming one that fits.

    Args:
        model: the network.
        numbers: how many numbers it must read at each step; None for token ids.
        outputs: how many outputs it must have.
        use: name of a network of the zoo that fits.
        needs: what the task asks for, in words, where these numbers follow from the network itself.
    """
    reads = getattr(model, "numbers", None)
    if (reads, outputs_of(model)) == (numbers, outputs):
        return
    kind = getattr(model, "family", "network").replace("recurrent", "recurrent network")
    needs = needs or f"reads {_reads(numbers)} and has {_counted(outputs, 'output')}"
    raise TaskError(
        f"{model.name!r} is a {kind} that reads {_reads(reads)} and has {_counted(outputs_of(model), 'output')}; "
        f"this task needs a recurrent network that {needs}: use {use!r}"
    )


def _reads(numbers: int | None) -> str:
    return "a token id at each step" if numbers is None else f"{_counted(numbers, 'number')} at each step"


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def check_length(length: int, least: int = 2) -> None:
    """Raises OptionError for a trial that is too short."""
    if length < least:
        raise OptionError(f"got length = {length}, expected at least {least} steps")


def signs(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Numbers that are 1 or -1, either with probability one half."""
    return torch.randint(0, 2, shape, generator=rng) * 2.0 - 1.0
