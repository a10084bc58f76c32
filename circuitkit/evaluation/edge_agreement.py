"""Whether scores of edges come true: each of some edges is cut alone in the running model.

    predicted   score(e)
    measured    M(clean) - M(clean, edge e carrying its corrupt value)        mean over the examples of the task

The largest edges say whether the numbers that a circuit rests on are right, random ones whether small scores are small.
`exact` measures all edges; this costs one run for each edge asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.faithfulness import circuit_metrics
from circuitkit.evaluation.feature_graphs import Checked
from circuitkit.methods.base import check_task
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task

if TYPE_CHECKING:
    import plotly.graph_objects as go

MODE = "cut alone"


@dataclass(frozen=True)
class EdgeAgreement:
    """Scores next to what cutting did.

    Args:
        largest: the edges of largest score.
        random: as many drawn from all others.
        method: that gave the scores.
        task: on which they were measured.
    """

    largest: Checked
    random: Checked
    method: str
    task: str

    def __repr__(self) -> str:
        said = (
            f"{name} ({len(part)}) Spearman {part.spearman(MODE):.2f}, R2 {part.r_squared(MODE):.2f}"
            for name, part in (("largest", self.largest), ("random", self.random))
        )
        return f"EdgeAgreement({self.method} on {self.task}: {'; '.join(said)})"

    def plot(self) -> go.Figure:
        """Predicted against measured; right predictions lie on the diagonal."""
        from circuitkit.figures.predicted_measured import scores_measured

        return scores_measured(self)


def edge_agreement(
    model: Model,
    task: Task,
    scores: Scores,
    *,
    n: int = 50,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> EdgeAgreement:
    """Cut the ``n`` edges of largest score, and as many random others, one at a time.

    Args:
        model: that the scores are of.
        task: where they are measured.
        scores: of edges, signed.
        n: how many edges of either kind.
        seed: of the random edges.

    Raises:
        GraphError: if the scores are of another graph.
        OptionError: if n is below 1, or the scores are magnitudes that predict no change.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=8)
    >>> edge_agreement(model, task, ck.score(model, task, "exact", progress=False), n=3, progress=False)
    EdgeAgreement(exact on induction-letters: largest (3) Spearman 1.00, R2 1.00; random (3) Spearman 1.00, R2 1.00)
    """
    if not scores.graph.same_as(model.graph):
        raise GraphError(f"got scores of another graph than that of {model.name}; score this model")
    if n < 1 or not scores.signed:
        raise OptionError(f"got n = {n} and {scores.method}'s scores, expected n of at least 1 and signed scores")
    check_task(model, task)
    possible = scores.graph.mask.flatten().nonzero().flatten()
    order = possible[scores.values.flatten()[possible].abs().argsort(descending=True, stable=True)]
    rest = order[n:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:n]]
    chosen = torch.cat([order[:n], drawn]).tolist()
    masks = scores.graph.mask.repeat(len(chosen), 1, 1)
    for mask, edge in zip(masks, chosen, strict=True):
        mask.view(-1)[edge] = False
    plan, carried = Plan.of(batch_size, budget, progress, seed), scores.options.get("corrupt_value", "counterfactual")
    clean, values = circuit_metrics(model, task, masks, plan=plan, corrupt_value=carried)
    moved = (clean.mean() - values.mean(1)).tolist()
    split = len(order[:n])
    return EdgeAgreement(
        _checked(scores, chosen[:split], moved[:split]), _checked(scores, chosen[split:], moved[split:]),
        scores.method, task.name,
    )  # fmt: skip


def _checked(scores: Scores, edges: Sequence[int], moved: Sequence[float]) -> Checked:
    graph, width = scores.graph, scores.values.shape[1]
    names = tuple(f"{graph.sources[i // width]}->{graph.destinations[i % width]}" for i in edges)
    return Checked(names, tuple(float(scores.values.view(-1)[i]) for i in edges), {MODE: tuple(moved)})
