"""A ranking of edges as the logits that learning begins with."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.norms import at_least_float32
from circuitkit.functional.sparsity import logits_from_ranking
from circuitkit.methods.base import METHODS, edge_methods
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task

WarmStart = str | Scores | None


def warm_logits(
    model: Model, task: Task, plan: Plan, warm_start: WarmStart, *, spread: float, corrupt_value: str
) -> Float[Tensor, " edge"]:
    """Logits from -spread to spread in the order of a ranking by magnitude; all 0 without one.

    Args:
        warm_start: the name of an edge method, a file of scores, scores, or None.
        spread: half the distance between the strongest and the weakest edge.
        corrupt_value: what removed edges carry, for a method that is to be run.

    Raises:
        OptionError: if it is none of these, or scores of another model.
    """
    like = at_least_float32(model.start(task.batches[0].clean[:1]))
    zeros = like.new_zeros(model.graph.n_edges)
    if warm_start is None:
        return zeros
    if isinstance(warm_start, str) and warm_start in edge_methods():
        function = METHODS[warm_start]
        options = {"corrupt_value": corrupt_value} if "corrupt_value" in inspect.signature(function).parameters else {}
        scores = function(model, task, plan=plan, **options)
    else:
        scores = _read(warm_start)
    if not scores.graph.same_as(model.graph):
        raise OptionError(f"warm_start holds scores of another graph than that of {model.name}; score this model first")
    return logits_from_ranking(scores.values[model.graph.mask].abs().to(zeros), spread)


def ranking_identity(warm_start: WarmStart) -> str | None:
    """What a ranking is, as text that two runs can compare: the method's name, or a hash of the scores."""
    if warm_start is None or (isinstance(warm_start, str) and warm_start in edge_methods()):
        return warm_start
    scores = _read(warm_start)
    return f"{scores.method} {hashlib.sha256(scores.values.double().numpy().tobytes()).hexdigest()[:16]}"


def _read(warm_start: str | Scores) -> Scores:
    if isinstance(warm_start, Scores):
        return warm_start
    if not isinstance(warm_start, str) or not Path(warm_start).is_file():
        raise OptionError(
            f"got warm_start = {warm_start!r}, expected an edge method ({', '.join(edge_methods())}), a file that "
            "Scores.save wrote, Scores, or None"
        )
    return Scores.load(warm_start)
