"""A behaviour as data: `Batch` (pairs of inputs and answers), `Task` (batches and a metric), the registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.metrics import METRICS, Metric
from circuitkit.registry import Registry
from circuitkit.shapes import Inputs, Logits


class Vocabulary(Protocol):
    """What a task needs to know of a model."""

    name: str
    d_vocab: int
    n_ctx: int
    tokenizer: Any
    card: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Aligned pairs of inputs, padded on the right, and where and how the answer is read.

    Args:
        clean: inputs that show the behaviour: token ids, or the numbers that a recurrent network reads.
        corrupt: inputs of the same lengths that do not.
        lengths: real tokens in each row; what follows is padding.
        positions: where the answer is read.
        right: token ids counted as right at each position; -1 marks an unused slot.
        wrong: token ids counted as wrong; -1 marks an unused slot; no column for metrics that need none.
        target: numbers that a numerical output should equal, or None.
        reference: logits of the clean run at the positions, filled in for metrics that compare with it.
        spans: number of the span that each position belongs to, -1 for padding; or None.
    """

    clean: Inputs
    corrupt: Inputs
    lengths: Int[Tensor, " batch"]
    positions: Int[Tensor, "batch answer"]
    right: Int[Tensor, "batch answer k"]
    wrong: Int[Tensor, "batch answer j"]
    target: Float[Tensor, "batch answer vocab"] | None = None
    reference: Logits | None = None
    spans: Int[Tensor, "batch pos"] | None = None

    def __len__(self) -> int:
        return len(self.clean)

    def rows(self, index: Tensor | slice) -> Batch:
        """The examples chosen by an index, as a batch."""
        parts = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **parts)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        parts = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **parts)


@dataclass(frozen=True, eq=False)
class Task:
    """A named behaviour.

    Args:
        name: the registered name, or the user's own.
        batches: examples grouped by length where a model needs it, else one batch.
        metric: one number per example; bigger means the behaviour is done better.
        known: names of the edges of the known circuit, or None.
        spans: names of the spans that tile every prompt, in order; () if nothing says which positions belong together.
    """

    name: str
    batches: tuple[Batch, ...]
    metric: Metric
    known: tuple[str, ...] | None = None
    spans: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def __repr__(self) -> str:
        return f"Task({self.name}, {len(self)} pairs, {self.metric.name})"

    def with_metric(self, metric: str) -> Task:
        """The same pairs judged by another metric.

        Raises:
            UnknownName: if no metric has that name.
            TaskError: if the metric needs answers or targets that the pairs do not have.
        """
        from circuitkit.tasks.rows import check_needs

        for batch in self.batches:
            check_needs(METRICS[metric], batch)
        return replace(self, metric=METRICS[metric])

    @classmethod
    def from_tokens(
        cls, clean: Inputs, corrupt: Inputs, right: Tensor | None, wrong: Tensor | None = None, **options: Any
    ) -> Task:
        """See `circuitkit.tasks.own.from_tokens`."""
        from circuitkit.tasks.own import from_tokens

        return from_tokens(clean, corrupt, right, wrong, **options)

    @classmethod
    def from_pairs(
        cls,
        model: Vocabulary,
        clean: Sequence[str],
        corrupt: Sequence[str],
        right: Any,
        wrong: Any = None,
        **options: Any,
    ) -> Task:
        """See `circuitkit.tasks.own.from_pairs`."""
        from circuitkit.tasks.own import from_pairs

        return from_pairs(model, clean, corrupt, right, wrong, **options)

    @classmethod
    def from_csv(cls, model: Vocabulary, path: str, **options: Any) -> Task:
        """See `circuitkit.tasks.own.from_csv`."""
        from circuitkit.tasks.own import from_csv

        return from_csv(model, path, **options)


TASKS: Registry[Callable[..., Task]] = Registry("task", "circuitkit.tasks")


def task(name: str) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Register a factory ``(model, *, n, seed, ...) -> Task`` under the name that users type."""
    return TASKS.add(name)


def make(name: str, model: Vocabulary, *, n: int = 64, seed: int = 0, **options: Any) -> Task:
    """The task of that name, made for one model.

    Args:
        name: a registered name.
        model: whose tokenizer, vocabulary and context the inputs must fit.
        n: how many pairs.
        seed: seed of the generator that draws them.
        options: the task's own options.

    Raises:
        UnknownName: if no task has that name.
        OptionError: if the task has no such option, or n is not positive.
    """
    factory = TASKS[name]
    if n < 1:
        raise OptionError(f"got n = {n}, expected at least one pair")
    parameters = inspect.signature(factory).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("n", "seed")]
    if unknown := sorted(set(options) - set(known)):
        raise OptionError(f"task {name!r} has no option {unknown[0]!r}; its options: {', '.join(known) or 'none'}")
    return factory(model, n=n, seed=seed, **options)
