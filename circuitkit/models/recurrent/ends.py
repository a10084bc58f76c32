"""What a recorded run leaves behind, and how the user's module is entered and left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import TaskError, UnsupportedModel
from circuitkit.models.hooked import Run
from circuitkit.models.recurrent.parts import Network


@dataclass(frozen=True, eq=False)
class RecurrentRun(Run):
    """What one recorded run left behind, detached. Its inputs are the input vectors and what the read-out reads.

    Args:
        values: every write, by name, and what the read-out reads; ``writes`` are the same as nodes count them: in the
            basis of their writers, ``[batch, step, number, 1]``.
    """

    values: Mapping[str, Float[Tensor, "_ _ _"]]


@dataclass(frozen=True, eq=False)
class Ends:
    """How the user's module is entered and left.

    Args:
        enter: from what the user's module takes to the input vectors of its first recurrent layer.
        leave: from the features to outputs: ``[..., step, feature] -> [..., step, vocab]``.
        forward: the module's own outputs, for the law that compares them.
        positional: whether an output at a step depends on the features of that step alone.
        numbers: how many numbers are read at each step, or None for token ids.
    """

    enter: Callable[[Tensor], Float[Tensor, "batch step size"]]
    leave: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]
    positional: bool = True
    numbers: int | None = None


def check_inputs(inputs: Tensor, numbers: int | None, d_vocab: int) -> None:
    """Refuse inputs unlike ``numbers`` at each step, or unlike ids below ``d_vocab`` if None. Raises TaskError."""
    expected = "ids [batch, step]" if numbers is None else f"numbers [batch, step, {numbers}]"
    if inputs.dim() != (2 if numbers is None else 3) or numbers not in (None, inputs.shape[-1]):
        raise TaskError(f"got inputs of shape {list(inputs.shape)}, expected {expected}")
    if inputs.shape[1] == 0:
        raise TaskError("got a sequence of length zero; a recurrent network needs at least one step")
    if numbers is None:
        if inputs.is_floating_point() or inputs.is_complex():
            raise TaskError(f"got inputs of {inputs.dtype}, expected {expected} as whole numbers")
        if inputs.numel() and not 0 <= int(inputs.min()) <= int(inputs.max()) < d_vocab:
            raise TaskError(f"got ids from {int(inputs.min())} to {int(inputs.max())}, expected 0 to {d_vocab - 1}")
    elif not inputs.isfinite().all():
        row, step = (~inputs.isfinite()).any(2).nonzero()[0].tolist()
        raise TaskError(f"inputs hold NaN or infinite numbers, first in row {row} at step {step}; give finite ones")


def check_finite(network: Network, values: Mapping[str, Tensor]) -> None:
    """Refuse a run that is not finite, naming the first layer and step where it is not. Raises UnsupportedModel."""
    for block in (None, *network.blocks):
        writes = (network.input,) if block is None else block.writes
        bad = torch.stack([~values[w.name].isfinite().flatten(2).all(2).all(0) for w in writes]).any(0)
        if bad.any():
            steps = bad.nonzero().flatten()
            step = int(steps[-1] if block is not None and block.reverse else steps[0])
            where = "the input vectors hold" if block is None else f"layer {block.layer} ({block.stem}) makes"
            raise UnsupportedModel(
                f"{where} NaN or infinite values, first at step {step} of {len(bad)}: "
                "check the weights and inputs; a linear recurrence with an eigenvalue beyond 1 grows without bound"
            )
