"""Three tests of a circuit by Shi et al. 2024 (arXiv:2410.13032). The hypotheses say what a circuit ought to be.

    equivalence    | P(s(C) > s(M)) - 1/2 | <= margin                    s: the task's metric of one example
    independence   s(M without the edges of C) is independent of s(M)
    minimality     for every edge e of C:  P(d(e, C) > d(r, C + path)) >= quantile,   d: mean |change| if removed

Equivalence: an exact sign test at the edge of the margin; a tie counts as half a win. It asks who wins, not by how
much: a circuit that falls short by a hair on every example is rejected, one that errs both ways is not. Independence:
HSIC with Gaussian kernels and a permutation test. Corrupt values carry the prompt with them, so a complement may depend
on the model's score though it does not do the task. Minimality: `path` is a random path from the input to the logits, r
one of its new edges; every edge of C has a binomial test, with Bonferroni's correction.

None of them proves what it fails to reject: few examples reject nothing. Deviations from the authors' code: each sample
has a kernel width of its own, the permutation p-value counts the sample itself, ties are not wins for either side, the
correction is made, and changes are absolute, not squared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.errors import OptionError
from circuitkit.evaluation.judge import Judge, check_counts
from circuitkit.functional.significance import dependence_p, equivalence_p, rank_p
from circuitkit.graph import Graph
from circuitkit.measures import HypothesisTest
from circuitkit.models.hooked import Model
from circuitkit.shapes import EdgeMask
from circuitkit.tasks.base import Task

MOST_WALKS = 1000


def equivalence_test(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    margin: float = 0.1,
    alpha: float = 0.05,
    corrupt_value: str | None = None,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> HypothesisTest:
    """Is the circuit as likely to do better than the model as to do worse?

    Args:
        margin: how far from 1/2 the chance may be.
        alpha: level of the test.
        corrupt_value: what removed edges carry; by default what the circuit was scored with.

    Raises:
        GraphError: if the circuit belongs to another model's graph.
        OptionError: if it is empty, there are fewer than two examples, or an option is out of range.
    """
    if not 0 <= margin < 0.5:
        raise OptionError(f"got margin = {margin!r}, expected a number from 0 up to 0.5")
    common = {"batch_size": batch_size, "budget": budget, "progress": progress, "seed": seed}
    judge = _judge(model, task, circuit, corrupt_value, alpha, common)
    clean, values = judge.metrics([circuit.mask])
    return equivalence_of(clean, values[0], margin=margin, alpha=alpha)


def equivalence_of(model: Tensor, circuit: Tensor, *, margin: float, alpha: float) -> HypothesisTest:
    """The equivalence test on one number per example of the model and of the circuit; equal up to rounding is a tie."""
    difference = circuit - model
    tie = difference.abs() <= 1e-6 * torch.maximum(circuit.abs(), model.abs()).clamp(min=1e-6)
    wins, ties, n = int(((difference > 0) & ~tie).sum()), int(tie.sum()), len(model)
    rate = (wins + ties / 2) / n
    p = equivalence_p(wins + ties / 2, n, margin)
    seen = f"the circuit beats the model on {wins} of {n} examples and ties on {ties}"
    outcome = "differs from the model" if p <= alpha else "is not shown to differ from the model"
    return HypothesisTest(
        "equivalence", f"|P(circuit > model) - 1/2| <= {margin:g}", rate, p, alpha,
        f"{seen}: it {outcome} (p = {p:.3g}, margin {margin:g})", n,
        {"margin": margin, "wins": float(wins), "ties": float(ties), "mean_difference": float(difference.mean())},
    )  # fmt: skip


def independence_test(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    permutations: int = 1000,
    alpha: float = 0.05,
    corrupt_value: str | None = None,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> HypothesisTest:
    """Does the model without the circuit's edges still know which examples it would do well?

    Args:
        permutations: how often the examples are shuffled; the smallest p-value is 1 / (1 + permutations).
        alpha: level of the test.
        corrupt_value: what removed edges carry; by default what the circuit was scored with.

    Raises:
        GraphError: if the circuit belongs to another model's graph.
        OptionError: if it is empty, there are fewer than two examples, or an option is out of range.
    """
    check_counts(permutations=permutations)
    common = {"batch_size": batch_size, "budget": budget, "progress": progress, "seed": seed}
    judge = _judge(model, task, circuit, corrupt_value, alpha, common)
    clean, values = judge.metrics([circuit.graph.mask & ~circuit.mask])
    generator = torch.Generator().manual_seed(seed)
    hsic, p = dependence_p(clean, values[0], permutations=permutations, generator=generator)
    outcome = "depends on" if p <= alpha else "is not shown to depend on"
    sentence = f"without the circuit's {len(circuit)} edges the score {outcome} the whole model's"
    return HypothesisTest(
        "independence", "the score of the model without the circuit is independent of the whole model's", hsic, p,
        alpha, f"{sentence} (HSIC {hsic:.3g}, p = {p:.3g})", len(clean),
        {"complement": float(values[0].mean()), "clean": float(clean.mean())},
    )  # fmt: skip


def minimality_test(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    quantile: float = 0.9,
    inflations: int = 100,
    alpha: float = 0.05,
    corrupt_value: str | None = None,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> HypothesisTest:
    """Is removing any edge of the circuit a larger change than removing an edge that was only added to it?

    Args:
        quantile: an edge should change more than this share of added edges.
        inflations: how many circuits with one random path more.
        alpha: level of the test, over all edges together.
        corrupt_value: what removed edges carry; by default what the circuit was scored with.

    Raises:
        GraphError: if the circuit belongs to another model's graph.
        OptionError: if it is empty or the whole model, there are fewer than two examples, or an option is out of range.
    """
    check_counts(inflations=inflations)
    if not 0 < quantile < 1 or inflations < 1:
        raise OptionError(
            f"got quantile = {quantile!r} and inflations = {inflations!r}, expected 0 < quantile < 1 and at least 1"
        )
    common = {"batch_size": batch_size, "budget": budget, "progress": progress, "seed": seed}
    judge = _judge(model, task, circuit, corrupt_value, alpha, common)
    base, generator = circuit.mask, torch.Generator().manual_seed(seed)
    added = [_inflated(circuit.graph, base, generator) for _ in range(inflations)]
    edges = list(zip(circuit.src.tolist(), circuit.dst.tolist(), strict=True))
    reduced = (_minus(base, edge) for edge in edges)
    inflated = (mask for larger, edge in added for mask in (larger, _minus(larger, edge)))
    values = judge.metrics(mask for masks in ((base,), reduced, inflated) for mask in masks)[1]
    effects = (values[1 : 1 + len(edges)] - values[0]).abs().mean(1)
    rest = values[1 + len(edges) :]
    chance = (rest[::2] - rest[1::2]).abs().mean(1)
    return minimality_of(effects, chance, circuit.edge_names(), quantile=quantile, alpha=alpha, n=values.shape[1])


def minimality_of(
    effects: Tensor, chance: Tensor, names: list[str], *, quantile: float, alpha: float, n: int
) -> HypothesisTest:
    """The minimality test on the change that each edge makes, and on those of edges added at random."""
    larger = (effects[:, None] > chance[None, :]).sum(1).tolist()
    p_values = [min(1.0, len(names) * rank_p(k, len(chance), quantile)) for k in larger]
    offenders = tuple(name for name, p in zip(names, p_values, strict=True) if p <= alpha)
    outcome = (
        f"{len(offenders)} of {len(names)} edges matter less than that: the circuit is not minimal"
        if offenders
        else f"none of {len(names)} edges is shown to matter less than that"
    )
    sentence = f"an edge ought to change more than {quantile:.0%} of {len(chance)} added ones; {outcome}"
    return HypothesisTest(
        "minimality", f"every edge changes more than {quantile:.0%} of added edges", min(larger) / len(chance),
        min(p_values), alpha, sentence, n,
        {"quantile": quantile, "median_effect": float(effects.median()), "median_chance": float(chance.median())},
        offenders,
    )  # fmt: skip


def _judge(
    model: Model, task: Task, circuit: Circuit, corrupt_value: str | None, alpha: float, common: dict[str, Any]
) -> Judge:
    if not 0 < alpha < 1:
        raise OptionError(f"got alpha = {alpha!r}, expected a number between 0 and 1")
    judge = Judge.of(model, task, circuit, corrupt_value, common)
    if len(task) < 2:
        raise OptionError(f"task {task.name!r} has {len(task)} example, a test needs at least 2; make a larger one")
    return judge


def _minus(mask: EdgeMask, edge: tuple[int, int]) -> EdgeMask:
    mask = mask.clone()
    mask[edge] = False
    return mask


def _inflated(graph: Graph, base: EdgeMask, generator: torch.Generator) -> tuple[EdgeMask, tuple[int, int]]:
    """A circuit with one random path more, and one of the edges that are new."""
    for _ in range(MOST_WALKS):
        path = _random_path(graph, generator)
        new = [edge for edge in path if not base[edge]]
        if new:
            mask = base.clone()
            mask[tuple(torch.tensor(path).T)] = True
            return mask, new[_draw(len(new), generator)]
    raise OptionError("no random path adds an edge to this circuit, so there is nothing to compare; take a smaller one")


def _random_path(graph: Graph, generator: torch.Generator) -> list[tuple[int, int]]:
    """Edges of a walk from the logits back to a root: a random incoming edge, then a random input of its writer."""
    path: list[tuple[int, int]] = []
    readers = graph.sinks.nonzero().flatten().tolist()
    while readers and len(path) <= len(graph.sources):
        dst = readers[_draw(len(readers), generator)]
        writers = graph.mask[:, dst].nonzero().flatten().tolist()
        if not writers:
            break
        src = writers[_draw(len(writers), generator)]
        path.append((src, dst))
        readers = graph.feeds[:, src].nonzero().flatten().tolist()
    return path


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=generator))
