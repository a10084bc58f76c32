"""A file from which learning goes on where it stopped, to the same result bit for bit.

A safetensors file: parameters, the optimiser's two moments of each, how steep the loss has been in every edge, the
state of the random generator, and as text the step and what run it belongs to. Nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.checkpoints import read_checkpoint, write_checkpoint

Parameters = dict[str, Tensor]
PARTS = ("value", "first", "second")


@dataclass(frozen=True, eq=False)
class Progress:
    """Everything that the next step depends on.

    Args:
        step: how many steps are done.
        value: what is learned, by name.
        first: running mean of each gradient.
        second: running mean of each squared gradient.
        steepest: the largest slope that the loss has had in each edge, as a magnitude.
        random: state of the generator.
    """

    step: int
    value: Parameters
    first: Parameters
    second: Parameters
    steepest: Float[Tensor, " edge"]
    random: Tensor

    @property
    def felt(self) -> Bool[Tensor, " edge"]:
        """Edges in which the loss has had a slope that is more than rounding."""
        floor = 8 * torch.finfo(self.steepest.dtype).eps * self.steepest.max()
        return self.steepest > floor

    @classmethod
    def begin(cls, value: Parameters, edges: int, seed: int) -> Progress:
        """Before the first step."""
        zero = {name: torch.zeros_like(tensor) for name, tensor in value.items()}
        random = torch.Generator().manual_seed(seed).get_state()
        steepest = next(iter(value.values())).new_zeros(edges)
        return cls(0, value, zero, zero, steepest, random)


def save_progress(progress: Progress, run: Mapping[str, Any], path: str | Path) -> Path:
    """Write the file in one step. Raises FormatError if it cannot be written."""
    return write_checkpoint(path, "learning", progress.step, run, _tensors(progress))


def load_progress(path: str | Path, run: Mapping[str, Any], begin: Progress) -> Progress:
    """What `save_progress` wrote, or ``begin`` if there is no file yet.

    Raises:
        FormatError: if the file is truncated, of another kind or does not fit.
        OptionError: if it belongs to another run; says in what that differs.
    """
    found = read_checkpoint(path, "learning", run, _tensors(begin))
    if found is None:
        return begin
    step, tensors = found
    named = {part: {name: tensors[f"{part}.{name}"] for name in getattr(begin, part)} for part in PARTS}
    return Progress(step, steepest=tensors["steepest"], random=tensors["random"], **named)


def _tensors(progress: Progress) -> Parameters:
    named = {f"{part}.{name}": t for part in PARTS for name, t in getattr(progress, part).items()}
    return named | {"steepest": progress.steepest, "random": progress.random}
