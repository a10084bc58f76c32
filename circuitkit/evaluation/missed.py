"""What a ranking of nodes may have missed: an upper bound on the largest effect among the nodes not verified.

Verifying the top of a ranking by patching says nothing about the rest. Here random subsets S of the rest are patched
together, exactly, and the outcomes of subsets with and without a node are compared:

    e(S)     = M(clean) - M(clean, with every node of S corrupt)                 mean over the examples of the task
    d(n)     = mean of e(S) over subsets with n - mean of e(S) over subsets without n
    bound(n) = |d(n)| + t * sqrt(var_with / k_with + var_without / k_without)

t is the one-sided quantile of Student's distribution at the wanted confidence, with the degrees of freedom of Welch's
test for unequal variances. Every node is in the same number of subsets, drawn for each node on its own, so that in the
mean over draws the other nodes cancel from d(n).

The largest bound(n) bounds the largest effect with that confidence, and needs no correction for the number of nodes:
the node with the largest effect is one fixed node, the largest bound is at least that node's own, and that one holds
with the confidence asked for.

Assumptions: (1) d(n) estimates the mean effect of n on top of random subsets of the others, which is its effect alone
if effects add up; nodes that stand in for each other, or that only act together, break this. A small share keeps
subsets near the clean run. (2) means of e(S) are nearly normal, so each node is in and out of at least ten subsets.
(3) the bound is about the examples of this task.
The idea is that of Kramár et al. 2024, arXiv:2403.00745; the formulas and the argument are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.methods.base import check_task, run_bytes, with_reference
from circuitkit.methods.nodes import corrupt_activations
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import Hook
from circuitkit.models.sites import Place, activations, editor, find_places
from circuitkit.result import NodeScores
from circuitkit.tasks.base import Batch, Task

LEAST = 10  # subsets with and without each node


@dataclass(frozen=True, eq=False)
class Missed:
    """What the nodes that were not verified may still do.

    Args:
        bound: with the given confidence, none of them changes the metric by more than this.
        confidence: of that statement.
        nodes: their names, by row and column of the table.
        estimates: d(n) of each.
        bounds: bound(n) of each; each holds with the confidence on its own.
        n_subsets: how many subsets were patched.
    """

    bound: float
    confidence: float
    nodes: tuple[str, ...]
    estimates: Float[Tensor, " node"]
    bounds: Float[Tensor, " node"]
    n_subsets: int

    @property
    def suspect(self) -> str:
        """The node that may have been missed most; verify it next."""
        return self.nodes[int(self.bounds.argmax())]

    def __repr__(self) -> str:
        return (
            f"Missed(at most {self.bound:.3g} with confidence {self.confidence:g}, of {len(self.nodes)} nodes, "
            f"most likely {self.suspect})"
        )


def missed_effect(
    model: Model,
    task: Task,
    scores: NodeScores,
    *,
    verified: int,
    subsets: int = 200,
    share: float = 0.2,
    confidence: float = 0.95,
    batch_size: int | str = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Missed:
    """Bound the largest effect of the nodes below the top of a ranking, by patching random subsets of them.

    Args:
        scores: a table of nodes by site, all positions together, as ``atp`` and ``atp-star`` give it.
        verified: how many nodes, from the strongest down, are known and left clean.
        subsets: how many subsets are patched; twice as many make the bound's margin smaller by a factor of 1.4.
        share: the share of subsets that each node is in.

    Raises:
        OptionError: for a table of another kind, no node left to bound, or too few subsets.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> task = ck.task("induction-letters", model, n=16)
    >>> missed_effect(model, task, ck.score(model, task, "atp-star"), verified=1, progress=False).nodes
    ('a0.h0',)
    """
    site, plan = _check(scores, verified, subsets, share, confidence), Plan.of(batch_size, budget, progress, seed)
    check_task(model, task)
    places = find_places(model, site)
    rest = scores.values.abs().flatten().argsort(descending=True, stable=True)[verified:].sort().values
    generator = torch.Generator().manual_seed(seed)
    inside = random_subsets(len(rest), subsets, round(share * subsets), generator)
    chosen = torch.zeros(subsets, scores.values.numel(), dtype=torch.bool)
    chosen[:, rest] = inside
    with torch.no_grad(), model.quiet():
        means = corrupt_activations(model, task, plan, site, places, str(scores.options["corrupt_value"]))
        effects = _patched(model, task, plan, places, chosen, means)
    estimates, bounds = subset_bounds(effects, inside, confidence)
    names = _names(model, places)
    return Missed(float(bounds.max()), confidence, tuple(names[i] for i in rest.tolist()), estimates, bounds, subsets)


def _check(scores: NodeScores, verified: int, subsets: int, share: float, confidence: float) -> str:
    site = str(scores.options.get("site"))
    if "corrupt_value" not in scores.options or scores.options.get("per_position", False) or site in ("None", "resid"):
        raise OptionError(
            f"got scores of {scores.method} with options {dict(scores.options)}, expected a table of single components "
            "at all positions together; score with per_position=False and a site other than 'resid'"
        )
    if not 0 <= verified < scores.values.numel():
        raise OptionError(f"got verified = {verified}, expected at least 0 and less than all {scores.values.numel()}")
    if not 0 < confidence < 1:
        raise OptionError(f"got confidence = {confidence}, expected a number between 0 and 1, such as 0.95")
    if not 0 < share < 1 or min(round(share * subsets), subsets - round(share * subsets)) < LEAST:
        raise OptionError(
            f"got subsets = {subsets} and share = {share}, expected each node in and out of {LEAST} subsets or more"
        )
    return site


def _names(model: Model, places: list[Place]) -> list[str]:
    """Names of the nodes of all places, as in the graph; patterns go by their heads."""
    graph, wiring = model.graph, model.wiring
    known = {site.port: graph.sources[site.rows] for site in wiring.write_sites}
    known |= {site.port: graph.destinations[site.columns] for site in wiring.read_sites}
    patterns = {place.port: tuple(f"a{place.block}.h{i}" for i in range(place.n)) for place in places if place.pattern}
    return [name for place in places if place.port is not None for name in (known | patterns)[place.port]]


def random_subsets(n: int, subsets: int, each: int, generator: torch.Generator) -> Bool[Tensor, "subset node"]:
    """Membership of nodes in subsets: every node in exactly ``each`` of them, independently of the others."""
    order = torch.rand(subsets, n, generator=generator).argsort(0)
    return order < each


def subset_bounds(
    effects: Float[Tensor, " subset"], inside: Bool[Tensor, "subset node"], confidence: float
) -> tuple[Float[Tensor, " node"], Float[Tensor, " node"]]:
    """d(n) and bound(n) of every node, from the joint effects of random subsets.

    >>> inside = random_subsets(3, 60, 30, torch.Generator().manual_seed(0))
    >>> estimates, bounds = subset_bounds(inside.float() @ torch.tensor([0.0, 2.0, 0.0]), inside, 0.95)
    >>> bool(bounds.max() >= 2)
    True
    """
    effects, member = effects.double()[:, None], inside.double()
    sides = []
    for weight in (member, 1 - member):
        count = weight.sum(0)
        mean = (weight * effects).sum(0) / count
        variance = (weight * (effects - mean).square()).sum(0) / (count - 1) / count
        sides.append((mean, variance, variance.square() / (count - 1)))
    (with_n, a, a2), (without_n, b, b2) = sides
    degrees = ((a + b).square() / (a2 + b2)).nan_to_num(float(len(effects)))
    estimates = with_n - without_n
    return estimates, estimates.abs() + student_quantile(confidence, degrees) * (a + b).sqrt()


def student_quantile(confidence: float, degrees: Float[Tensor, " item"]) -> Float[Tensor, " item"]:
    """One-sided quantile of Student's distribution, by its expansion around the normal one (8 degrees: 0.1 % off).

    >>> [round(float(t), 3) for t in student_quantile(0.95, torch.tensor([10.0, 30.0, 1e9]).double())]
    [1.812, 1.697, 1.645]
    """
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * confidence - 1, dtype=torch.float64)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    powers = torch.stack([degrees**-i for i in (1, 2, 3)])
    return z + torch.tensor(terms, dtype=powers.dtype) @ powers


def _patched(
    model: Model, task: Task, plan: Plan, places: list[Place], chosen: Bool[Tensor, "subset node"],
    means: list[Tensor] | None,
) -> Float[Tensor, " subset"]:  # fmt: skip
    """e(S) of every subset; subsets are rows of a batch."""
    start = min(place.block for place in places)

    def one_chunk(batch: Batch, plan: Plan) -> Tensor:
        run = model.record(batch.clean)
        batch = with_reference(model, task, batch, run)
        clean = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
        other = activations(model, model.record(batch.corrupt), places) if means is None else means
        size = max(1, plan.rows(run_bytes(model, batch), model.device) // len(batch))
        found = []
        for some in chosen.to(batch.clean.device).split(size):
            rows = torch.arange(len(batch), device=batch.clean.device).repeat(len(some))
            hooks: list[Hook] = []
            parts = some.repeat_interleave(len(batch), 0).split([place.n for place in places], 1)
            for place, corrupt, part in zip(places, other, parts, strict=True):
                here = part[:, None, :].expand(-1, batch.clean.shape[1], -1)
                assert place.port is not None  # the stream is refused
                hooks.append((place.port, editor(place, corrupt.to(run.inputs[0]), rows, here)))
            last = model.replay(run, start, run.inputs[start][rows], rows, hooks)
            many = batch.rows(rows)
            values = task.metric(model.logits(last, many.positions), many).unflatten(0, (len(some), len(batch)))
            found.append((clean - values).sum(1).cpu().double())
        return torch.cat(found)

    parts = plan.over(task, model.device, "subsets", lambda b: 2 * run_bytes(model, b), one_chunk)
    return torch.stack(list(parts)).sum(0) / len(task)
