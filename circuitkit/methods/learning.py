"""Shared by the methods that learn a mask over edges: the loop, the warm start, and what is done when it breaks off.

    minimise over a     E[ -M(run with mask m(a)) ] + unit * penalty(a)
    M: how close a run is to the whole model (`fidelity`);  unit: M(whole model) - M(every edge removed)

Each step draws some examples, gives every one a mask of its own, runs them through `run_circuits` with these as soft
``keep``, and takes one Adam step on a. Edges in which the loss never had a slope score exactly 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.errors import FormatError, MetricError, OptionError
from circuitkit.functional.ablation import check_corrupt_value
from circuitkit.methods.base import fidelity
from circuitkit.methods.checkpoint import Parameters, Progress, load_progress, save_progress
from circuitkit.methods.minibatches import Minibatches, nothing_differs
from circuitkit.methods.plan import Plan
from circuitkit.methods.warm_start import ranking_identity
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.shapes import EdgeMask
from circuitkit.tasks.base import Task

SAVE_SECONDS = 30.0  # between two writes of the checkpoint
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True, eq=False)
class Learning:
    """Options that all these methods share, and what tells one run from another.

    Args:
        method: the registered name.
        steps: how many.
        lr: learning rate of the logits.
        examples: how many examples a step draws.
        objective: what is held up, as for `fidelity`.
        corrupt_value: what removed edges carry.
        warm_start: an edge method, a file of scores, or scores, whose ranking the logits begin with; None for none.
        checkpoint: a file to go on from, or None.
        own: the method's other options.
    """

    method: str
    steps: int
    lr: float
    examples: int
    objective: str | None
    corrupt_value: str
    warm_start: str | Scores | None
    checkpoint: str | None
    own: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_corrupt_value(self.corrupt_value)
        for name, value in (("steps", self.steps), ("examples", self.examples)):
            if type(value) is not int or value < 1:
                raise OptionError(f"got {name} = {value!r}, expected a whole number of at least 1")
        check_positive("lr", self.lr)


def check_positive(name: str, value: float) -> None:
    """Refuse an option that is not a positive finite number. Raises OptionError."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise OptionError(f"got {name} = {value!r}, expected a number above 0")


def edge_number(name: str, value: int | float, n: int) -> int:
    """A number of edges from a number, or from a share of ``n``. Raises OptionError.

    >>> edge_number("target", 0.02, 1701), edge_number("target", 100, 1701)
    (34, 100)
    """
    whole = type(value) is int
    if not (1 <= value <= n if whole else 0 < value < 1):
        raise OptionError(f"got {name} = {value!r}, expected a share above 0 and below 1, or 1 to {n:,} edges")
    return int(value) if whole else max(1, int(value * n))


@dataclass(frozen=True, eq=False)
class Recipe:
    """What one method adds to the loop; masks are over possible edges, in matrix order.

    Args:
        begin: what is learned, by name.
        rates: learning rate of each; negative for what climbs.
        sample: (parameters, share of the steps done, number of masks, generator) -> masks, with a gradient.
        penalty: (parameters, share of the steps done) -> what is added to the loss, in units of what is lost when every
            edge is removed; so the same options fit every metric and model.
        size: how many edges the parameters keep, for the progress bar.
    """

    begin: Parameters
    rates: Mapping[str, float]
    sample: Callable[[Parameters, float, int, torch.Generator], Float[Tensor, "example edge"]]
    penalty: Callable[[Parameters, float], Tensor]
    size: Callable[[Parameters], float]


def learn(model: Model, task: Task, plan: Plan, learning: Learning, recipe: Recipe) -> Progress:
    """What is learned after all steps; from the checkpoint on, if there is one.

    Raises:
        MetricError: at the first step whose loss, gradients or parameters are not finite.
        FormatError, OptionError: if the checkpoint cannot be read, or belongs to another run.
    """
    task = fidelity(task, learning.objective)
    if not task.metric.differentiable:
        raise MetricError(f"metric {task.metric.name!r} has no useful gradient; use another objective, such as 'kl'")
    now = Progress.begin(recipe.begin, model.graph.n_edges, plan.seed)
    run = _run_of(model, task, plan, learning) if learning.checkpoint else {}
    if learning.checkpoint:
        now = load_progress(learning.checkpoint, run, now)
    if now.step == learning.steps or nothing_differs(task, learning.corrupt_value):
        return now
    data, saved = Minibatches(model, task, plan, learning.corrupt_value), time.monotonic()
    unit = max(data.gap(), 0.0)
    with plan.bar(learning.steps, learning.method) as bar:
        bar.update(now.step)
        try:
            while now.step < learning.steps:
                now, loss = _step(model, data, unit, learning, recipe, now)
                bar.set_postfix(loss=f"{loss:.3f}", edges=f"{recipe.size(now.value):.0f}", refresh=False)
                bar.update(1)
                if learning.checkpoint and time.monotonic() - saved > SAVE_SECONDS:
                    save_progress(now, run, learning.checkpoint)
                    saved = time.monotonic()
        except BaseException as error:
            _save_anyway(now, run, learning, error)
            raise
    if learning.checkpoint:
        save_progress(now, run, learning.checkpoint)
    return now


def learned_scores(model: Model, task: Task, end: Progress, values: Float[Tensor, " edge"]) -> Scores:
    """Scores from one value per possible edge; edges in which the loss never had a slope get 0."""
    matrix = torch.zeros(model.graph.mask.shape)
    matrix[model.graph.mask] = torch.where(end.felt, values, 0.0).float().cpu()
    return Scores(matrix, model.graph, "", signed=False, n_examples=len(task))


def chosen_edges(model: Model, end: Progress, chosen: Bool[Tensor, " edge"]) -> EdgeMask:
    """The chosen ones of the possible edges as a matrix, without those in which the loss never had a slope."""
    matrix = torch.zeros_like(model.graph.mask)
    matrix[model.graph.mask] = (chosen & end.felt).cpu()
    return matrix


def _step(
    model: Model, data: Minibatches, unit: float, learning: Learning, recipe: Recipe, now: Progress
) -> tuple[Progress, float]:
    generator = torch.Generator()
    generator.set_state(now.random)
    done = now.step / learning.steps
    rows = torch.randperm(len(data.task), generator=generator)[: learning.examples]
    leaves = {name: value.clone().requires_grad_(True) for name, value in now.value.items()}
    src, dst = model.graph.mask.nonzero(as_tuple=True)
    try:
        with torch.enable_grad():
            mask = recipe.sample(leaves, done, len(rows), generator)
            keep = mask.new_zeros(len(rows), *model.graph.mask.shape)
            keep[:, src, dst] = mask.detach()
            loss, slope = data.slope(rows, keep)
            slope = slope[:, src, dst]
            total = (mask * slope).sum() + unit * recipe.penalty(leaves, done)
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    except MetricError as error:
        raise MetricError(f"{learning.method}, step {now.step + 1}: {error}; {_advice(learning)}") from error
    value, first, second = dict(now.value), dict(now.first), dict(now.second)
    for name, gradient in zip(leaves, gradients, strict=True):
        first[name] = torch.lerp(gradient, first[name], BETAS[0])
        second[name] = torch.lerp(gradient.square(), second[name], BETAS[1])
        mean = first[name] / (1 - BETAS[0] ** (now.step + 1))
        scale = (second[name] / (1 - BETAS[1] ** (now.step + 1))).sqrt() + EPS
        value[name] = value[name] - recipe.rates[name] * mean / scale
    if not math.isfinite(loss) or not all(bool(v.isfinite().all()) for v in [*gradients, *value.values()]):
        raise MetricError(
            f"{learning.method} diverged at step {now.step + 1} of {learning.steps}: "
            f"the loss is {loss:.3g}, and gradients or masks are not finite; {_advice(learning)}"
        )
    steepest = torch.maximum(now.steepest, slope.abs().amax(0))
    return Progress(now.step + 1, value, first, second, steepest, generator.get_state()), loss


def _advice(learning: Learning) -> str:
    return f"lower lr (now {learning.lr:g}), try another warm_start, or another objective"


def _save_anyway(now: Progress, run: Mapping[str, Any], learning: Learning, error: BaseException) -> None:
    """Keep the last whole step; what broke off stays the error that is raised."""
    if learning.checkpoint:
        try:
            save_progress(now, run, learning.checkpoint)
        except FormatError as second:
            error.add_note(f"and the checkpoint could not be written: {second}")
        else:
            error.add_note(f"step {now.step} of {learning.steps} is kept in {learning.checkpoint}; run again to go on")


def _run_of(model: Model, task: Task, plan: Plan, learning: Learning) -> dict[str, Any]:
    """What must be equal for one run to go on where another stopped."""
    from circuitkit.runs.provenance import data_sha256, model_sha256

    shared = {k: v for k, v in vars(learning).items() if k not in ("checkpoint", "own", "warm_start")}
    about = {"model": model_sha256(model.module), "task": data_sha256(task), "seed": plan.seed}
    return {**about, **shared, **learning.own, "warm_start": ranking_identity(learning.warm_start)}
