"""Shared by methods that take gradients at the clean run: slopes at any port, with one block's writes cut or not.

GradDrop repeats the backward pass once per block, each time without what flows back through that block's writes. Where
a component's direct and indirect effects cancel, some pass shows one without the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.models.edits import gradients_at
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook
from circuitkit.models.wiring import Port
from circuitkit.tasks.base import Batch, Task

Slopes = dict[Port, tuple[Tensor, Tensor]]


def clean_slopes(
    model: Model, task: Task, batch: Batch, run: Run, ports: Sequence[Port], cut: int | None = None
) -> Slopes:
    """What passes some ports in the clean run, and the metric's gradient there, example by example.

    Args:
        cut: the block whose writes pass no gradient; nothing in that block is worth anything then.
    """
    own = [] if cut is None else [site.port for site in model.wiring.write_sites if site.block == cut]

    def objective(logits: Tensor) -> Tensor:
        return task.metric(logits, batch).sum()

    rules: list[Hook] = [(port, _cut) for port in own]
    wanted = list(dict.fromkeys(ports))
    found = gradients_at(model, run, run.inputs[0], batch.positions, objective, wanted, rules)
    # The copy at which a gradient is taken comes after the cut, so a port's own slope is still there.
    return {
        port: (tensor, torch.zeros_like(slope) if port in own else slope)
        for port, (tensor, slope) in zip(wanted, found, strict=True)
    }


def _cut(y: Tensor) -> Tensor:
    """The same values; the gradient is zero but still asked for, as it must be further back."""
    return y.detach() + 0 * y


def passes(model: Model, grad_drop: bool) -> list[int | None]:
    """The block that each backward pass leaves out; one plain pass without GradDrop, or if there is but one block."""
    n = len(model.wiring.blocks)
    return list(range(n)) if grad_drop and n > 1 else [None]


def worth_of_passes(cuts: Sequence[int | None], block: int | None) -> int:
    """By what the sum over passes is divided for a node of a block (or of none): the pass that cuts it shows 0."""
    return len(cuts) - (block is not None and block in cuts)


def flatness(task: Task, batch: Batch, model: Model, run: Run, corrupt: Tensor, slope: Tensor) -> tuple[float, float]:
    """First-order size of the change from clean to corrupt after the last block, and the metric's own change.

    Args:
        corrupt: the stream after the last block with every edge removed.
        slope: the metric's gradient at that stream in the clean run.
    """
    clean = at_least_float32(run.inputs[-1])
    size = float(((clean - corrupt).abs() * at_least_float32(slope).abs()).flatten(1).sum(1).max())
    here, there = (
        task.metric(model.logits(x.to(run.inputs[-1].dtype), batch.positions), batch) for x in (clean, corrupt)
    )
    return size, float((here - there).abs().max())
