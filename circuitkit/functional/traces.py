"""Forward-mode gradients and edge scores of one diagonal recurrence, without keeping the past.

    h(t) = lam h(t-1) + u(t)                          lam diagonal, real or complex
    e(t) = lam e(t-1) + v(t)                          one trace for each parameter or edge
    sum over t of  delta(t) conj(e(t))                delta(t) = dM/dh(t) through the output of step t alone

    what is wanted                                    v(t)
    dM / dlam_j                                       h_j(t-1)
    dM / dW_ji,  where u_j = gain_j (W x)_j           gain_j(t) x_i(t)
    score of edge i -> j: times W_ji, real part       gain_j(t) (x_i(clean) - x_i(corrupt))(t)
    score of j's own carry: times lam_j, real part    (h_j(clean) - h_j(corrupt))(t-1)

A unit's state reaches no other unit's, so for one layer this is what backpropagation through time gives, exactly. The
past is summed up in one trace for each pair of unit and input: memory is O(batch units inputs), whatever the length.
(Zucchet et al. 2023, "Online learning of long-range dependencies", arXiv:2305.15947.)

It is wrong where the metric is not a sum over steps, or where h(t) reaches a later output by another way than through
the next h: several recurrent layers, or an input that depends on earlier states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from circuitkit.errors import MetricError, OptionError

Objective = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Reading:
    """What the units read along one path at one step: ``gain * (W x)``.

    Args:
        x: what is read.
        gain: what the product with the weights is multiplied by, the other factor of a gated input; None for 1.
    """

    x: Float[Tensor, "batch input"]
    gain: Inexact[Tensor, "batch unit"] | None = None


@dataclass(frozen=True, eq=False)
class Received:
    """What reaches the state at one step.

    Args:
        total: u(t).
        readings: by the name of the path; both factors of a product are paths.
    """

    total: Inexact[Tensor, "batch unit"]
    readings: Mapping[str, Reading]


@dataclass(frozen=True, eq=False)
class TraceGradients:
    """Gradients of a metric, summed over steps and examples; of complex tensors, as torch has them: dRe + i dIm.

    Args:
        lam: dM/dlam.
        weights: dM/dW of each path.
    """

    lam: Inexact[Tensor, " unit"]
    weights: Mapping[str, Inexact[Tensor, "unit input"]]


@dataclass(frozen=True, eq=False)
class TraceScores:
    """First-order scores of weight-tied edges: how much the metric falls when one carries its corrupt value always.

    Args:
        carry: of each unit's edge to itself.
        edges: of each path's edges.
    """

    carry: Float[Tensor, "batch unit"]
    edges: Mapping[str, Float[Tensor, "batch unit input"]]


def trace_gradients(lam: Inexact[Tensor, " unit"], steps: Iterable[Received], objective: Objective) -> TraceGradients:
    """dM/dlam and dM/dW in one pass forward through time.

    Args:
        lam: what each unit keeps of its state.
        steps: what the state receives, step after step; may be a generator, so that nothing is kept.
        objective: ``(step, state [batch, unit]) -> this step's part of the metric``, summed over examples; None at
            steps whose output the metric does not read.

    Raises:
        OptionError: if there are no steps.
        MetricError: if no step's part of the metric depends on the state.

    >>> steps = [Received(torch.tensor([[x]]), {"W": Reading(torch.tensor([[x]]))}) for x in (1.0, 0.0, 0.0)]
    >>> found = trace_gradients(torch.tensor([0.5]), steps, lambda t, h: h.sum() if t == 2 else None)
    >>> found.lam, found.weights["W"]  # M = 0.5^2 W x(0)
    (tensor([1.]), tensor([[0.2500]]))
    """
    carry, sums = _sums(lam, ((received, received) for received in steps), objective)
    return TraceGradients(carry.sum(0), {name: x.sum(0) for name, x in sums.items()})


def trace_scores(
    lam: Inexact[Tensor, " unit"],
    weights: Mapping[str, Inexact[Tensor, "unit input"]],
    clean: Iterable[Received],
    corrupt: Iterable[Received],
    objective: Objective,
) -> TraceScores:
    """``eap`` scores of the edges into the recurrence, collapsed over time, on every example.

    Args:
        lam: what each unit keeps of its state.
        weights: W of each path, by name.
        clean: what the state receives in the clean run, where the metric is differentiated.
        corrupt: the same in the corrupt run, as many steps.
        objective: as for `trace_gradients`.

    Raises:
        OptionError: if there are no steps, or not as many in both runs.
        MetricError: if no step's part of the metric depends on the state.

    >>> clean, corrupt = ([Received(torch.tensor([[x]]), {"W": Reading(torch.tensor([[x]]))})] * 2 for x in (1.0, 0.0))
    >>> scores = trace_scores(torch.tensor([0.5]), {"W": torch.ones(1, 1)}, clean, corrupt, lambda t, h: h.sum())
    >>> scores.edges["W"], scores.carry  # the second step reads half of the first once more
    (tensor([[[2.5000]]]), tensor([[0.5000]]))
    """
    carry, sums = _sums(lam, _gaps(clean, corrupt), objective)
    edges = {name: _real(sums[name].conj() * weight) for name, weight in weights.items()}
    return TraceScores(_real(carry.conj() * lam), edges)


def _gaps(clean: Iterable[Received], corrupt: Iterable[Received]) -> Iterator[tuple[Received, Received]]:
    """The clean run, and with its gains the difference of what the two read."""
    try:
        for a, b in zip(clean, corrupt, strict=True):
            readings = {name: Reading(r.x - b.readings[name].x, r.gain) for name, r in a.readings.items()}
            yield a, Received(a.total - b.total, readings)
    except ValueError as error:
        raise OptionError("the two runs differ in their number of steps; cut them to the same length") from error


def _sums(
    lam: Tensor, steps: Iterable[tuple[Received, Received]], objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums over steps of delta conj(e) on every example: for the carry, and for each path.

    Each step is what the state receives, and what the traces do.
    """
    lam = lam.detach()
    h = carried = carry_trace = lam.new_zeros(1, len(lam))
    traces: dict[str, Tensor] = {}
    carry_sum, sums, n_steps, n_slopes = torch.zeros_like(h), dict[str, Tensor](), 0, 0
    for t, (received, traced) in enumerate(steps):
        carry_trace = lam * carry_trace + carried
        carried = lam * carried + traced.total.detach()
        h = lam * h + received.total.detach()
        for name, reading in traced.readings.items():
            gain = lam.new_ones(1, len(lam)) if reading.gain is None else reading.gain.detach()
            new = gain[:, :, None] * reading.x.detach()[:, None, :]
            traces[name] = lam[:, None] * traces[name] + new if name in traces else new
        n_steps += 1
        slope = _slope(objective, t, h)
        if slope is None:
            continue
        n_slopes += 1
        carry_sum = carry_sum + slope * carry_trace.conj()
        for name, trace in traces.items():
            part = slope[:, :, None] * trace.conj()
            sums[name] = sums[name] + part if name in sums else part
    if n_steps == 0:
        raise OptionError("got no steps; give what the state receives at one step at least")
    if n_slopes == 0:
        raise MetricError("no step's part of the metric depends on the state; let objective(step, state) use it")
    return carry_sum, sums


def _slope(objective: Objective, t: int, h: Tensor) -> Tensor | None:
    """dM/dh through the output of one step, or None where there is none."""
    with torch.enable_grad():
        state = h.detach().requires_grad_(True)
        part = objective(t, state)
        if part is None or not part.requires_grad:
            return None
        return torch.autograd.grad(part, state, allow_unused=True)[0]


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x
