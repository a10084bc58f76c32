"""`Plan`: how a method's work is cut so that it fits memory, and shown while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from tqdm.std import tqdm

from circuitkit.errors import OptionError
from circuitkit.tasks.base import Batch, Task

R = TypeVar("R")


@dataclass(frozen=True)
class Plan:
    """How the work is cut: never more rows at once than the batch size and the memory budget allow.

    Args:
        batch_size: most examples at once, or ``"auto"``.
        budget: bytes that one chunk's activations may take, or None for a default by device.
        progress: whether to show a bar for work that takes more than two seconds.
        seed: for whatever is drawn at random.
    """

    batch_size: int | str = "auto"
    budget: int | None = None
    progress: bool = True
    seed: int = 0

    @classmethod
    def of(cls, batch_size: int | str, budget: int | str | None, progress: bool, seed: int) -> Plan:
        """A checked plan; a budget may be written ``"4GiB"``. Raises OptionError."""
        if batch_size != "auto" and (type(batch_size) is not int or batch_size < 1):
            raise OptionError(f"got batch_size = {batch_size!r}, expected 'auto' or a whole number of at least 1")
        return cls(batch_size, parse_bytes(budget), progress, seed)

    def rows(self, bytes_per_row: float, device: torch.device) -> int:
        """How many rows fit into the budget; at least one."""
        return max(1, int(self._budget(device) // max(bytes_per_row, 1)))

    def over(
        self,
        task: Task,
        device: torch.device,
        label: str,
        bytes_per_example: Callable[[Batch], float],
        function: Callable[[Batch, Plan], R],
    ) -> Iterator[R]:
        """Results of a function of (examples, plan) over the task, in chunks that fit, with a progress bar.

        If memory runs out all the same, the budget is halved and the chunk done again; what was done before is kept.

        Raises:
            OptionError: if memory runs out with a single example and next to no budget.
        """
        plan = self
        with self.bar(len(task), label) as bar:
            for batch in task.batches:
                start = 0
                while start < len(batch):
                    size = plan.rows(bytes_per_example(batch), device)
                    size = size if plan.batch_size == "auto" else min(size, int(plan.batch_size))
                    part = batch.rows(slice(start, start + size)).to(device)
                    try:
                        result = function(part, plan)
                    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                        plan = plan.halved(error, len(part), bytes_per_example(batch), device)
                        continue
                    yield result
                    start += len(part)
                    bar.update(len(part))

    def halved(self, error: Exception, n: int, bytes_per_example: float, device: torch.device) -> Plan:
        """A plan with half the budget, or of half the examples that ran out of memory, whichever is less.

        Raises:
            OptionError: if there is nothing left to halve; any other error as it is.
        """
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)):
            raise error
        budget = int(min(self._budget(device), n * bytes_per_example)) // 2
        if budget < 2**10:
            raise OptionError(
                "out of memory with one example at a time; use shorter inputs, a smaller model or a narrower dtype"
            ) from error
        return replace(self, budget=budget)

    def _budget(self, device: torch.device) -> int:
        if self.budget is not None:
            return self.budget
        return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 400 * 2**20

    def bar(self, total: int, label: str) -> tqdm:
        """A progress bar that appears only after two seconds."""
        return tqdm(total=total, desc=label, disable=not self.progress, delay=2, leave=False)


def parse_bytes(budget: int | str | None) -> int | None:
    """Bytes from ``512``, ``"512MiB"`` or ``"4 GiB"``. Raises OptionError for anything else.

    >>> parse_bytes("1.5GiB"), parse_bytes(None)
    (1610612736, None)
    """
    if budget is None:
        return None
    text = str(budget).strip()
    for unit, factor in (
        ("GiB", 2**30),
        ("MiB", 2**20),
        ("KiB", 2**10),
        ("GB", 10**9),
        ("MB", 10**6),
        ("B", 1),
        ("", 1),
    ):
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit)) * factor
            except ValueError:
                break
            if 1 <= value < float("inf"):
                return int(value)
            break
    raise OptionError(f"got budget = {budget!r}, expected bytes such as 536870912, '512MiB' or '4GiB'")
