"""Examples for learned masks: what a mask costs on some of them, and the slope of that in every edge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import MetricError
from circuitkit.functional.norms import at_least_float32
from circuitkit.methods.base import (
    clean_and_corrupt,
    corrupt_writes,
    run_bytes,
    with_reference,
)
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.tasks.base import Batch, Task


@dataclass(frozen=True, eq=False)
class Recorded:
    """Some examples, their clean run, and what each write site carries along a removed edge."""

    batch: Batch
    run: Run
    corrupt: tuple[Tensor, ...]


class Minibatches:
    """The examples of a task: recorded once if half of the memory budget holds them, else whenever they are drawn."""

    def __init__(self, model: Model, task: Task, plan: Plan, corrupt_value: str) -> None:
        self.model, self.task, self.plan = model, task, plan
        self._corrupt_of = corrupt_writes(model, task, plan, corrupt_value)
        self._parts: list[Batch | Recorded] = list(task.batches)
        if all(2 * len(task) <= plan.rows(_kept_bytes(model, batch), model.device) for batch in task.batches):
            kept = plan.over(task, model.device, "runs", lambda b: _kept_bytes(model, b), lambda b, _: self._record(b))
            self._parts = list(kept)

    def slope(
        self, rows: Int[Tensor, " example"], keep: Float[Tensor, "example src dst"]
    ) -> tuple[float, Float[Tensor, "example src dst"]]:
        """The loss (minus the metric, mean over the chosen examples, each with its own mask) and its gradient in them.

        Raises:
            MetricError: if a masked run is not finite, or the metric does not depend on it.
        """
        loss, out, first = 0.0, torch.zeros_like(keep), 0
        for part in self._parts:
            batch = part.batch if isinstance(part, Recorded) else part
            places = ((first <= rows) & (rows < first + len(batch))).nonzero().flatten()
            while len(places):
                some = places[: self._at_once(batch)]
                try:
                    value, gradient = self._chunk(part, rows[some] - first, keep[some.to(keep.device)])
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    bytes_each = _step_bytes(self.model, batch)
                    self.plan = self.plan.halved(error, len(some), bytes_each, self.model.device)
                    continue
                loss += value / len(rows)
                out[some.to(out.device)] = gradient.to(out.dtype) / len(rows)
                places = places[len(some) :]
            first += len(batch)
        return loss, out

    def gap(self, most: int = 64) -> float:
        """How much is lost, on the first examples, when every edge is removed: the natural unit of the loss."""
        rows = torch.arange(min(most, len(self.task)))
        like = at_least_float32(self.model.start(self.task.batches[0].clean[:1]))
        keep = like.new_ones(len(rows), *self.model.graph.mask.shape)
        return self.slope(rows, 0 * keep)[0] - self.slope(rows, keep)[0]

    def _chunk(self, part: Batch | Recorded, each: Tensor, keep: Tensor) -> tuple[float, Tensor]:
        """Sum of the loss over some examples of a part, and its gradient in their masks."""
        device = self.model.device
        if isinstance(part, Batch):
            part, each = self._record(part.rows(each).to(device)), torch.arange(len(each))
        each = each.to(device)
        with torch.enable_grad():
            keep = keep.detach().requires_grad_(True)
            at = part.batch.positions
            logits = self.model.run_circuits(part.run, part.corrupt, keep, at, each=each[:, None])[:, 0]
            if not bool(logits.isfinite().all()):
                raise MetricError(
                    "the logits of a masked run are NaN or infinite (at step 1: check final norm and unembedding)"
                )
            loss = -self.task.metric(logits, part.batch.rows(each)).sum()
        if not loss.requires_grad:
            raise MetricError(f"metric {self.task.metric.name!r} does not depend on the logits, so it has no gradient")
        return float(loss.detach()), torch.autograd.grad(loss, keep)[0]

    def _record(self, batch: Batch) -> Recorded:
        run, corrupt = clean_and_corrupt(self.model, batch, self._corrupt_of)
        return Recorded(with_reference(self.model, self.task, batch, run), run, corrupt)

    def _at_once(self, batch: Batch) -> int:
        size = self.plan.rows(_step_bytes(self.model, batch), self.model.device)
        return size if self.plan.batch_size == "auto" else min(size, int(self.plan.batch_size))


def nothing_differs(task: Task, corrupt_value: str) -> bool:
    """Whether removing edges cannot change anything, because the two sides of every pair are the same."""
    if corrupt_value != "counterfactual":
        return False
    for batch in task.batches:
        real = torch.arange(batch.clean.shape[1]) < batch.lengths[:, None].cpu()
        changed = (batch.clean != batch.corrupt).cpu()
        changed = changed if changed.dim() == 2 else changed.any(-1)
        if bool((changed & real).any()):
            return False
    return True


def _kept_bytes(model: Model, batch: Batch) -> float:
    """Bytes per example of what is kept of it: the clean run, the corrupt writes, the logits."""
    return 2 * run_bytes(model, batch) + 4.0 * batch.positions.shape[1] * model.d_vocab


def _step_bytes(model: Model, batch: Batch) -> float:
    """Bytes per example of a masked run and its backward pass."""
    return model.step_bytes(batch.clean.shape[1])
