"""Controls: circuits found where there is nothing to find, next to the real one.

    answers   every example gets another one's answers         swap   right and wrong change places in a random half
    corrupt   every example gets another one's corrupt input of the same length

The method runs on the shuffled task. There no circuit should be better than chance, and scores should be weak: with n
examples, about 1 / sqrt(n) of the real ones. The circuit it finds is also measured on the real task. Do not expect 0:
what is left of scores whose signs cancel is largest where labels matter most, so a ranking by magnitude finds much
of the real circuit even so. A control as faithful as the real circuit says that the ranking rests on where logits hang,
not on the labels. The `corrupt` control can be a fair task: interchangeable corrupt inputs change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from circuitkit.circuit import Circuit
from circuitkit.comparisons import Control, Controls
from circuitkit.errors import OptionError
from circuitkit.evaluation.faithfulness import evaluate, normalised, random_masks
from circuitkit.evaluation.judge import Judge
from circuitkit.evaluation.resampling import shuffled, shuffles_for
from circuitkit.evaluation.stability import cut, jaccard
from circuitkit.methods.base import score
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.tasks.base import Task


def controls(
    model: Model,
    task: Task,
    method: str = "eap-ig",
    *,
    edges: int,
    shuffles: Sequence[str] | None = None,
    times: int = 3,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
    **options: Any,
) -> Controls:
    """Find circuits of one size on a task and on shuffled versions of it, and compare what they do.

    Args:
        edges: size of every circuit.
        shuffles: ``answers``, ``swap``, ``corrupt``; by default those that the metric can see.
        times: shuffles of each kind.
        options: the method's own options.

    Raises:
        OptionError: if there are fewer than two examples, or the metric does not see a shuffle.
        UnknownName: if no method has that name.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=32)
    >>> controls(model, task, "exact", edges=3, times=1).verdict
    'better than chance'
    """
    if type(times) is not int or times < 1:
        raise OptionError(f"got times = {times!r}, expected at least one shuffle of each kind")
    kinds = shuffles_for(task) if shuffles is None else tuple(shuffles)
    made = [(kind, seed + i, shuffled(task, kind, seed=seed + i)) for kind in kinds for i in range(times)]
    common: dict[str, Any] = {"batch_size": batch_size, "budget": budget, "seed": seed}
    real_scores = score(model, task, method, progress=progress, **common, **options)
    real = cut(real_scores, edges)
    result = evaluate(model, task, real, curve=False, progress=progress, **common)
    found: list[Circuit] = []
    verdicts: list[str] = []
    with Plan.of(batch_size, budget, progress, seed).bar(len(made), "controls") as bar:
        for _, _, other in made:
            found.append(cut(score(model, other, method, progress=False, **common, **options), edges))
            own = evaluate(model, other, found[-1], curve=False, progress=False, **common)
            verdicts.append(own.verdict)
            bar.update()
    random = random_masks(real, seed)
    faithful = _faithfulness(model, task, real, [c.mask for c in found] + random, common | {"progress": progress})
    rows = zip(made, found, verdicts, faithful, strict=False)
    return Controls(
        task.name, method, dict(real_scores.options), len(real), len(task), result.faithfulness,
        result.faithfulness_interval, tuple(f for f in faithful[len(made) :] if f is not None),
        tuple(
            Control(kind, at, f, jaccard(c.mask, real.mask), _strength(c, real), verdict)
            for (kind, at, _), c, verdict, f in rows
        ),
        result.verdict, seed,
    )  # fmt: skip


def _strength(control: Circuit, real: Circuit) -> float:
    whole = float(real.score.abs().sum())
    return float(control.score.abs().sum()) / whole if whole else 0.0


def _faithfulness(
    model: Model, task: Task, real: Circuit, masks: list[torch.Tensor], common: dict[str, Any]
) -> list[float | None]:
    judge = Judge.of(model, task, real, None, common)
    clean, values = judge.metrics([torch.zeros_like(real.mask), *masks])
    return [normalised(v, values[0], clean) for v in values[1:]]
