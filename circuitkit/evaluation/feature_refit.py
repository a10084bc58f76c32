"""A feature circuit fitted anew where attribution failed: gates on its candidates, learned in the running model.

    minimise over a    mean over prompts of ((M(z f) - M(model)) / gap)^2 + l_1 g + l_2 g^2
    z = hard concrete(a), one for each latent at all positions;    g = log(expected number of open gates / size)

gap: how far the metric falls, on average, with all latents ablated. Candidates are the latents of most influence in the
graphs, all others stay ablated; gates begin in that order. The multipliers l climb for as long as the size is missed.
Of the learned gates the ``size`` highest are the new circuit. Judge it on prompts that it was not fitted to.
References: Louizos, Welling and Kingma 2018, arXiv:1712.01312 (gates). The use on feature circuits is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.errors import OptionError
from circuitkit.evaluation.faithfulness import N_RANDOM
from circuitkit.evaluation.feature_faithfulness import Case, Gated, check, judged, kept_errors, mean_latents
from circuitkit.evaluation.feature_graphs import running_of
from circuitkit.evaluation.feature_shares import FeatureFaithfulness
from circuitkit.features.attribution import STEMS
from circuitkit.features.graph import FeatureGraph
from circuitkit.features.interventions import latent_of
from circuitkit.features.readout import Readout
from circuitkit.features.running import Running
from circuitkit.features.targets import Target
from circuitkit.functional.sparsity import chance_open, hard_concrete, lagrangian, logits_from_ranking, uniform_noise
from circuitkit.models.hooked import Model

CANDIDATES = 4  # times the size
TOGETHER = 4  # prompts in a step
SPREAD, CLIMB = 2.0, 0.05
Latent = tuple[Site, int]
Prompts = tuple[Sequence[FeatureGraph], Sequence[Target | tuple[int, int]] | None]


@dataclass(frozen=True)
class Refitted:
    """A circuit of latents, each at all positions, before and after its gates were learned.

    Args:
        latents: those of the new circuit, by name.
        before: what as many latents of most influence do.
        after: what the new ones do.
        losses: of every step, size left out.
    """

    latents: tuple[str, ...]
    before: FeatureFaithfulness
    after: FeatureFaithfulness
    losses: tuple[float, ...]

    def __repr__(self) -> str:
        return f"Refitted({len(self.latents)} latents)\nbefore: {self.before!r}\nafter: {self.after!r}"


def refit(
    model: Model,
    dictionaries: Sequence[Dictionary],
    graphs: Sequence[FeatureGraph],
    size: int,
    *,
    targets: Sequence[Target | tuple[int, int]] | None = None,
    judge: Prompts | None = None,
    steps: int = 200,
    lr: float = 0.1,
    mode: str = "free",
    errors: str = "kept",
    baseline: Sequence[Int[Tensor, " _"]] = (),
    n_random: int = N_RANDOM,
    budget: int | str | None = None,
    seed: int = 0,
) -> Refitted:
    """Learn which latents, each at all positions, keep a behaviour up.

    Args:
        model: the graphs' model.
        dictionaries: the graphs' dictionaries.
        graphs: whole graphs of the prompts to learn from; their influences name and order the candidates.
        size: how many latents.
        targets: as for `circuit_faithfulness`.
        judge: graphs and targets of other prompts to measure on; those learned from, which flatters, if None.
        steps: of Adam, each with up to four prompts.
        lr: learning rate of the gates.
        mode: as for `circuit_faithfulness`; so are ``errors``, ``baseline``, ``n_random``, ``budget``.
        seed: of gates, prompts and random circuits.

    Raises:
        OptionError: for options that do not fit.
    """
    check(graphs, targets, mode, errors, n_random)
    if size < 1 or steps < 1 or not lr > 0:
        raise OptionError(f"got size = {size}, steps = {steps}, lr = {lr}; expected at least 1, 1 and above 0")
    means = mean_latents(model, dictionaries, baseline)
    prompts = list(_cases(model, dictionaries, (graphs, targets), {}, 0, seed))
    worth = _ranked(prompts)
    candidates = sorted(worth, key=lambda latent: -worth[latent])[: CANDIDATES * size]
    if len(candidates) <= size:
        raise OptionError(
            f"got size = {size}, and the graphs have {len(candidates)} latents with influence; take fewer"
        )
    strength = torch.tensor([worth[latent] for latent in candidates])
    gates = _Gates(prompts, candidates, means, mode, errors)
    logits, losses = _learned(gates, logits_from_ranking(strength, SPREAD), size, steps, lr, seed)
    chosen = [candidates[i] for i in logits.topk(size).indices.tolist()]

    def measured(latents: Sequence[Latent]) -> FeatureFaithfulness:
        cases = _cases(model, dictionaries, judge or (graphs, targets), _by_site(latents), n_random, seed)
        ablated = "mean" if len(baseline) else "zero"
        return judged(cases, means, mode=mode, errors=errors, ablated=ablated, budget=budget, seed=seed)

    names = tuple(f"{STEMS[site.kind].format(site.layer)}.f{index}" for site, index in chosen)
    return Refitted(names, measured(candidates[:size]), measured(chosen), losses)


def _by_site(latents: Sequence[Latent]) -> dict[Site, list[int]]:
    found: dict[Site, list[int]] = {}
    for site, index in latents:
        found.setdefault(site, []).append(index)
    return found


def _cases(
    model: Model,
    dictionaries: Sequence[Dictionary],
    prompts: Prompts,
    own: Mapping[Site, Sequence[int]],
    n_random: int,
    seed: int,
) -> Iterator[Case]:
    """Each prompt with a set of latents at all positions, and random sets of as many that are active on it."""
    for i, graph in enumerate(prompts[0]):
        running = running_of(model, dictionaries, graph)
        targets = prompts[1]
        readout = Readout.of_graph(running, graph) if targets is None else Readout.of(running, targets[i])
        generator = torch.Generator().manual_seed(seed)
        sets: list[Mapping[Site, Sequence[int]]] = [own]
        for _ in range(n_random):
            drawn = {}
            for site, some in own.items():
                active = (running.clean.latents[site] > 0).any(0).nonzero().flatten()
                order = torch.randperm(len(active), generator=generator)[: len(some)]
                drawn[site] = active[order.to(active.device)].tolist()
            sets.append(drawn)
        masks = [_everywhere(running, latents) for latents in sets]
        yield Case(running, readout, graph, masks[0], tuple(masks[1:]))


def _everywhere(running: Running, latents: Mapping[Site, Sequence[int]]) -> dict[Site, Tensor]:
    masks = {site: torch.zeros_like(f, dtype=torch.bool) for site, f in running.clean.latents.items()}
    for site, some in latents.items():
        masks[site][:, list(some)] = True
    return masks


def _ranked(prompts: Sequence[Case]) -> dict[Latent, float]:
    """Influence of every latent, over all positions and prompts."""
    worth: dict[Latent, float] = {}
    for case in prompts:
        found = case.graph.influence.tolist()
        for node, influence in zip(case.graph.nodes, found, strict=True):
            if node.kind == "latent" and influence > 0:
                site, index, _ = latent_of(case.running.local, node.name)
                worth[site, index] = worth.get((site, index), 0.0) + influence
    return worth


class _Gates:
    """Runs in which candidates are gated and all other latents ablated."""

    def __init__(
        self,
        prompts: Sequence[Case],
        candidates: Sequence[Latent],
        means: Mapping[Site, Tensor],
        mode: str,
        errors: str,
    ) -> None:
        self.prompts, self.candidates, self.mode = prompts, candidates, mode
        like = prompts[0].running.local.values[prompts[0].running.local.final]
        self.like = like
        self.carried = {site: values.to(like) for site, values in means.items()}
        # As for a circuit: of nothing and of the circuit, the second row is what is wanted.
        factors = [kept_errors(case.running, case.graph, errors, 3) for case in prompts]
        self.factors = [None if f is None else f[1:2] for f in factors]
        with torch.no_grad():
            nothing = torch.zeros(len(candidates))
            falls = [float(self.moved(i, nothing).abs()) for i in range(len(prompts))]
        self.gap = max(sum(falls) / len(falls), 1e-9)

    def moved(self, i: int, z: Float[Tensor, " candidate"]) -> Float[Tensor, ""]:
        """How far the metric of one prompt moved from the model's."""
        case, keep = self.prompts[i], {}
        for site, coder in case.running.coders.items():
            here = [k for k, (place, _) in enumerate(self.candidates) if place == site]
            index = torch.tensor([self.candidates[k][1] for k in here], dtype=torch.long, device=self.like.device)
            gates = self.like.new_zeros(coder.n_latents).index_put((index,), z[here].to(self.like))
            keep[site] = gates[None, None]
        changes = Gated(1, self.factors[i], keep, self.carried)
        passed = case.running.run(changes, self.mode, watch=case.readout.sites)
        return case.readout.moved(passed, self.mode)[0]


def _learned(
    gates: _Gates, logits: Float[Tensor, " candidate"], size: int, steps: int, lr: float, seed: int
) -> tuple[Float[Tensor, " candidate"], tuple[float, ...]]:
    logits = logits.clone().requires_grad_()
    multipliers = torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([logits], lr)
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    for _ in range(steps):
        some = torch.randperm(len(gates.prompts), generator=generator)[:TOGETHER].tolist()
        with torch.enable_grad():
            z = hard_concrete(logits, uniform_noise((len(logits),), generator))
            loss = torch.stack([(gates.moved(i, z) / gates.gap).square() for i in some]).mean().cpu().float()
            objective = loss + lagrangian(chance_open(logits).sum(), size, multipliers)
            slopes = torch.autograd.grad(objective, [logits, multipliers])
        logits.grad = slopes[0]
        adam.step()
        multipliers.data += CLIMB * slopes[1]
        losses.append(float(loss.detach()))
    return logits.detach(), tuple(losses)
