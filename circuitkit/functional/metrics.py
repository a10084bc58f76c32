"""How well the behaviour is done: one number per example from the logits at its answers. Bigger is better.

Each formula is per answer position, then averaged over the positions of the example. All of it is computed in
float32 or better, whatever the dtype of the logits: a log-softmax in bfloat16 has two digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.errors import MetricError
from circuitkit.registry import Registry
from circuitkit.shapes import Logits, PerExample


@dataclass(frozen=True)
class Metric:
    """A named function ``(logits at the answer positions, batch) -> one number per example``.

    Args:
        name: the name that users type.
        function: the formula.
        needs: fields of the batch that it reads: ``right``, ``wrong``, ``target``, ``reference``.
        differentiable: False if its gradient is zero almost everywhere.
    """

    name: str
    function: Callable[[Logits, Any], PerExample]
    needs: tuple[str, ...] = ("right",)
    differentiable: bool = True

    def __call__(self, logits: Logits, batch: Any) -> PerExample:
        """One finite number per example.

        Raises:
            MetricError: if the batch lacks what the metric reads, or the function returns another shape, or a
                value that is not finite.
        """
        self._check_batch(logits, batch)
        values = self.function(logits, batch)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise MetricError(
                f"metric {self.name!r} returned {got}, expected one number per example: ({len(logits)},). "
                "Do not average over the batch."
            )
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if bad:
            raise MetricError(f"metric {self.name!r} is not finite on examples {bad[:8]}; {self._why(logits, bad)}")
        return values

    def _why(self, logits: Logits, bad: list[int]) -> str:
        """What a person should look at when values are not finite."""
        if logits[bad].isnan().any():
            return "the logits there are NaN, the recorded streams are not: check the final norm and the unembedding"
        if logits[bad].isposinf().any():
            return "the logits there are infinite: check the unembedding, or load the model in float32"
        return "the logits there are numbers, so it is the metric's formula that fails"

    def _check_batch(self, logits: Logits, batch: Any) -> None:
        # Unchecked, a wrong shape would broadcast to a plausible number, and on a GPU a wrong id ends the
        # process.
        for name in self.needs:
            value = getattr(batch, name, None)
            if value is None:
                raise MetricError(f"metric {self.name!r} needs batch.{name}, and there is none")
            per_class = name in ("target", "reference")
            size = logits.shape if per_class else logits.shape[:2]
            if value.shape[: len(size)] != size:
                raise MetricError(
                    f"metric {self.name!r}: batch.{name} is {tuple(value.shape)}, the logits "
                    f"{tuple(logits.shape)}; expected the same examples and answer positions"
                )
            if not per_class and value.numel() and int(value.max()) >= logits.shape[-1]:
                raise MetricError(f"batch.{name} has id {int(value.max())}, the model only {logits.shape[-1]} outputs")


METRICS: Registry[Metric] = Registry("metric")


def metric(
    name: str, *, needs: tuple[str, ...] = ("right",), differentiable: bool = True
) -> Callable[[Callable[[Logits, Any], PerExample]], Callable[[Logits, Any], PerExample]]:
    """Register a metric under the name that users type."""

    def register(function: Callable[[Logits, Any], PerExample]) -> Callable[[Logits, Any], PerExample]:
        METRICS.add(name)(Metric(name, function, needs, differentiable))
        return function

    return register


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _gather(values: Logits, ids: Int[Tensor, "batch answer k"], unused: float) -> Tensor:
    """Values at token ids; slots marked -1 get ``unused``."""
    return values.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, unused)


def _mean_of_slots(values: Logits, ids: Int[Tensor, "batch answer k"]) -> Tensor:
    return _gather(values, ids, 0.0).sum(-1) / (ids >= 0).sum(-1).clamp(min=1)


@metric("logit-diff", needs=("right", "wrong"))
def logit_diff(logits: Logits, batch: Any) -> PerExample:
    """Mean logit of the right tokens minus mean logit of the wrong ones."""
    values = _precise(logits)
    return (_mean_of_slots(values, batch.right) - _mean_of_slots(values, batch.wrong)).mean(-1)


@metric("prob-diff", needs=("right", "wrong"))
def prob_diff(logits: Logits, batch: Any) -> PerExample:
    """Probability of the set of right tokens minus that of the set of wrong ones (Hanna et al. 2023)."""
    p = _precise(logits).softmax(-1)
    return (_gather(p, batch.right, 0.0).sum(-1) - _gather(p, batch.wrong, 0.0).sum(-1)).mean(-1)


@metric("kl", needs=("reference",))
def kl(logits: Logits, batch: Any) -> PerExample:
    """Minus the divergence KL(clean run || this run), summed over the vocabulary, in nats."""
    reference, current = _precise(batch.reference).log_softmax(-1), _precise(logits).log_softmax(-1)
    # A class that both runs rule out (logit -inf) adds 0, not 0 * (inf - inf).
    per_class = (reference.exp() * (reference - current)).masked_fill(reference == -torch.inf, 0.0)
    return -per_class.sum(-1).mean(-1)


@metric("cross-entropy")
def cross_entropy(logits: Logits, batch: Any) -> PerExample:
    """Log probability of the set of right tokens, in nats (minus the usual loss)."""
    return _gather(_precise(logits).log_softmax(-1), batch.right, -torch.inf).logsumexp(-1).mean(-1)


@metric("accuracy", differentiable=False)
def accuracy(logits: Logits, batch: Any) -> PerExample:
    """Share of answer positions whose highest logit is a right token."""
    hit = _precise((logits.argmax(-1, keepdim=True) == batch.right).any(-1))
    # argmax picks a NaN, which would count as a plain miss.
    return hit.masked_fill(logits.isnan().any(-1), torch.nan).mean(-1)


@metric("squared-error", needs=("target",))
def squared_error(logits: Logits, batch: Any) -> PerExample:
    """Minus the squared distance of the outputs to the target numbers."""
    return -(_precise(logits) - _precise(batch.target)).square().sum(-1).mean(-1)


@metric("signed-output", needs=("target",))
def signed_output(logits: Logits, batch: Any) -> PerExample:
    """Mean of target times output over the outputs whose target is not 0: how far each of them goes the right way.

    For outputs that are numbers and no classes, such as the read-out of one stored bit; a target of 0 says that the
    output does not matter. Unlike the squared error it has a slope where the output is exactly right.
    """
    output, target = _precise(logits), _precise(batch.target)
    return ((target * output).sum(-1) / (target != 0).sum(-1).clamp(min=1)).mean(-1)
