"""What all methods share: the registry, `score`, what removed edges carry, and how much memory things take."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from circuitkit.errors import MetricError, OptionError, TaskError
from circuitkit.functional.ablation import check_corrupt_value, task_mean
from circuitkit.functional.stats import Moments
from circuitkit.methods.kinds import check_kinds
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.registry import Registry
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task


class Method(Protocol):
    """``(model, task, *, plan, <options>) -> Scores``; keyword-only arguments are the options a user can set.

    A method with ``level = "node"`` scores components and returns `NodeScores`; one with ``positions`` scores the edges
    of a graph with positions, which the task's spans make of the model's. ``families`` are the kinds of models that it
    understands: a method that asks for no more than `circuitkit.models.operations` has takes recurrent networks too.
    """

    level: str
    positions: bool
    families: tuple[str, ...]

    def __call__(self, model: Model, task: Task, *, plan: Plan, **options: Any) -> Any:
        """Score every edge or node."""


METHODS: Registry[Method] = Registry("method", "circuitkit.methods")


EVERY_FAMILY = ("transformer", "recurrent")


def method(
    name: str, *, level: str = "edge", positions: bool = False, families: tuple[str, ...] = ("transformer",)
) -> Callable[[Any], Any]:
    """Register a method under the name that users type; ``level`` says whether it scores edges or nodes."""

    def register(function: Any) -> Any:
        function.level, function.positions, function.families = level, positions, families
        return METHODS.add(name)(function)

    return register


def edge_methods(family: str = "transformer") -> tuple[str, ...]:
    """Names of the methods that score edges of such models, from whose scores a circuit can be cut."""
    return tuple(name for name, f in METHODS.items() if f.level == "edge" and family in f.families)


def check_family(name: str, model: Model) -> None:
    """Refuse a method that does not understand a kind of model. Raises OptionError."""
    if model.family not in METHODS[name].families:
        able = [other for other, function in METHODS.items() if model.family in function.families]
        raise OptionError(
            f"{name} needs a {' or '.join(METHODS[name].families)}, and {model.name} is {model.family}; "
            f"use one of {', '.join(able)}"
        )


def score(
    model: Model,
    task: Task,
    method: str = "eap-ig",
    *,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Score every edge (or, with ``activation-patching``, every component) of the model on a task by a named method.

    Returns:
        `Scores`, or `NodeScores` from a method of node level.

    Raises:
        UnknownName: if no method has that name.
        OptionError: for an option that the method does not have, or a value out of range.
        MetricError: if the metric has no gradient here, or is not finite.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> ck.score(model, ck.task("induction-letters", model, n=8), "eap")
    Scores(eap, 12 edges, 8 examples)
    """
    function = METHODS[method]
    options = checked_options(method, function, options)
    check_family(method, model)
    check_task(model, task)
    plan = Plan.of(batch_size, budget, progress, seed)
    start = time.perf_counter()
    with torch.no_grad(), model.quiet():
        scores = function(model, task, plan=plan, **options)
    if function.level == "edge":
        _check_finite(scores, task)
    elif scores.values.isinf().any():
        raise MetricError(f"{method} gave infinite scores on task {task.name!r}; check the metric")
    about = {"task": task.name, "metric": task.metric.name, "model": model.name, "seed": seed}
    about["seconds"] = round(time.perf_counter() - start, 3)
    return replace(scores, method=method, options=options, provenance={**scores.provenance, **about})


def _check_finite(scores: Scores, task: Task) -> None:
    """Refuse scores that are no numbers, naming the earliest reader that has one. Raises MetricError."""
    bad = ~scores.values.isfinite() & scores.graph.mask
    if bad.any():
        column = int(bad.any(0).nonzero()[0])
        row = int(bad[:, column].nonzero()[0])
        first = f"{scores.graph.sources[row]}->{scores.graph.destinations[column]}"
        raise MetricError(
            f"{int(bad.sum())} of {scores.graph.n_edges} scores on task {task.name!r} are NaN or infinite, "
            f"first that of {first}; the runs themselves were finite: check the metric's gradient"
        )


def checked_options(name: str, function: Method, options: dict[str, Any]) -> dict[str, Any]:
    """The method's options with defaults filled in.

    Raises:
        OptionError: for an option that the method does not have, or a value of the wrong kind.
    """
    known = {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name != "plan"
    }
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise OptionError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}")
    check_kinds(name, function, options)
    return known | options


def check_task(model: Model, task: Task) -> None:
    """Refuse a task that does not fit the model. Raises TaskError."""
    if len(task) == 0:
        raise TaskError(f"task {task.name!r} has no examples")
    for batch in task.batches:
        model.check_answers(batch.positions)
        for side in (batch.clean, batch.corrupt):
            if model.numbers is not None or side.dim() == 3:
                _check_numbers(model, task, side)
                continue
            if side.dtype not in (torch.int64, torch.int32):
                raise TaskError(f"task {task.name!r} has {side.dtype} tokens, expected token ids (int64)")
            if int(side.min()) < 0 or int(side.max()) >= model.d_vocab:
                raise TaskError(
                    f"task {task.name!r} has token ids from {int(side.min())} to {int(side.max())}, "
                    f"{model.name} knows 0 to {model.d_vocab - 1}"
                )
            if side.shape[1] > model.n_ctx:
                raise TaskError(
                    f"task {task.name!r} has {side.shape[1]} tokens, {model.name} reads at most {model.n_ctx}"
                )
        if not model.causal and bool((batch.lengths != batch.clean.shape[1]).any()):
            raise TaskError(
                f"{model.name} is not causal, so padding would change its answers: give one batch per length"
            )


def _check_numbers(model: Model, task: Task, side: Tensor) -> None:
    """Refuse numbers that a network cannot read, or that it does not expect. Raises TaskError."""
    wanted = "token ids [n, pos]" if model.numbers is None else f"numbers [n, pos, {model.numbers}]"
    if side.dim() != 3 or not side.is_floating_point() or side.shape[2] != model.numbers:
        raise TaskError(
            f"task {task.name!r} has inputs {tuple(side.shape)} of {side.dtype}, {model.name} reads {wanted}"
        )
    if side.shape[1] == 0:
        raise TaskError(f"task {task.name!r} has sequences of length zero; a recurrent network needs at least one step")
    if not bool(side.isfinite().all()):
        row, step = (side.isfinite().all(2) == False).nonzero()[0].tolist()  # noqa: E712
        raise TaskError(f"task {task.name!r} has NaN or infinite inputs, first in row {row} at step {step}")


def with_reference(model: Model, task: Task, batch: Batch, run: Run) -> Batch:
    """The batch, with the clean run's logits filled in if the metric compares with them."""
    if "reference" not in task.metric.needs:
        return batch
    return replace(batch, reference=model.logits(run.inputs[-1], batch.positions))


def fidelity(task: Task, metric: str | None) -> Task:
    """The task judged by how close a run stays to the whole model's own output, as ACDC and learned masks judge.

    Args:
        metric: ``None`` for minus the KL divergence from the clean run (or the task's own metric where outputs are
            numbers, not tokens); ``"task"`` for the task's own metric; or the name of a metric.
    """
    if metric == "task":
        return task
    if metric is None:
        numbers = any(batch.target is not None for batch in task.batches)
        return task if numbers else task.with_metric("kl")
    return task.with_metric(metric)


CorruptWrites = Callable[[Run], tuple[Tensor, ...]] | None


def corrupt_writes(model: Model, task: Task, plan: Plan, corrupt_value: str) -> CorruptWrites:
    """A function from a clean run to what each write site carries along a removed edge; None for the paired run itself.

    Means are over the clean inputs of the whole task, padding left out; optimal constants are learned on them.

    Raises:
        OptionError: if the name is not one of `CORRUPT_VALUES`.
    """
    check_corrupt_value(corrupt_value)
    if corrupt_value == "counterfactual":
        return None
    if corrupt_value == "zero":
        return lambda run: tuple(torch.zeros_like(w) for w in run.writes)
    if corrupt_value == "optimal" and model.family != "transformer":
        raise OptionError(
            f"optimal constants are learned for transformers, and {model.name} is {model.family}; use "
            "corrupt_value = 'counterfactual', 'mean', 'position-mean' or 'zero'"
        )
    if corrupt_value == "optimal":
        from circuitkit.methods.optimal_constants import optimal_writes  # which needs what is in this file

        return optimal_writes(model, task, plan)
    per_position = corrupt_value == "position-mean"
    recorded = list(
        plan.over(
            task,
            model.device,
            "mean activations",
            lambda b: run_bytes(model, b),
            lambda b, _: (model.record(b.clean).writes, b.lengths),
        )
    )
    sites = range(len(recorded[0][0]))
    means = [task_mean(((w[i], lengths) for w, lengths in recorded), per_position=per_position) for i in sites]
    return lambda run: tuple(mean[: w.shape[1]].to(w).expand_as(w) for mean, w in zip(means, run.writes, strict=True))


def clean_and_corrupt(model: Model, batch: Batch, corrupt_of: CorruptWrites) -> tuple[Run, tuple[Tensor, ...]]:
    """The clean run of a batch, and what each write site carries along a removed edge."""
    run = model.record(batch.clean)
    return run, model.record(batch.corrupt).writes if corrupt_of is None else corrupt_of(run)


def run_bytes(model: Model, batch: Batch) -> float:
    """Bytes per example of a recorded run."""
    return model.run_bytes(batch.clean.shape[1])


def matrix_bytes(model: Model, batch: Batch) -> float:
    """Bytes per example of the writes of all components as circuits need them."""
    return model.matrix_bytes(batch.clean.shape[1])


def backward_bytes(model: Model, batch: Batch) -> float:
    """Bytes per example that a backward pass keeps."""
    return model.backward_bytes(batch.clean.shape[1])


def finished(model: Model, moments: Moments, **fields: Any) -> Scores:
    """Scores from running moments, zero where no edge is possible."""
    mask = model.graph.mask
    values, stderr = (torch.where(mask, t.float().cpu(), torch.zeros(())) for t in (moments.mean, moments.stderr))
    return Scores(values, model.graph, "", stderr=stderr, n_examples=moments.n, **fields)
