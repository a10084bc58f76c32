"""How much of a behaviour is left when only the latents of a feature circuit work, and how much without them.

    faithfulness(C) = (M(C) - M(nothing)) / (M(model) - M(nothing))        M(C): all latents outside C ablated
    completeness(C) = the same of the complement: the latents in C ablated, all others left

M is what the graph explains, read off the running model; ratios are of means over prompts. A faithful and complete
circuit has the first near 1 and the second near 0. Latents inside a circuit are computed anew from what they now read.
Latents that wake up outside it are ablated too; they belong to the complement. What no dictionary writes (attention,
MLPs without one) always stays. Controls are random circuits of as many active latents of each dictionary.
After Marks et al. 2024, arXiv:2403.19647; random circuits next to it are ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sites import activations
from circuitkit.errors import OptionError
from circuitkit.evaluation.faithfulness import N_RANDOM
from circuitkit.evaluation.feature_graphs import running_of
from circuitkit.evaluation.feature_shares import FeatureFaithfulness
from circuitkit.features.graph import FeatureGraph
from circuitkit.features.interventions import BUDGET, latent_of
from circuitkit.features.local import same_site
from circuitkit.features.readout import Readout
from circuitkit.features.running import MODES, Running
from circuitkit.features.targets import Target
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model

ERRORS = ("graph", "kept", "removed")
Points = Mapping[Site, tuple[Int[Tensor, " latent"], Int[Tensor, " latent"]]]


Masks = Mapping[Site, Bool[Tensor, "pos latent"]]


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt with the sets of latents that are measured on it.

    Args:
        running: the prompt's local replacement model.
        readout: what is measured.
        graph: whose errors count as the circuit's.
        own: the circuit.
        random: other circuits of its size.
    """

    running: Running
    readout: Readout
    graph: FeatureGraph
    own: Masks
    random: tuple[Masks, ...]


@dataclass(frozen=True, eq=False)
class Gated:
    """Latents as a mix of what was computed and what ablated ones carry, as `circuitkit.features.running.Changes`.

    Args:
        rows: how many runs.
        factors: of errors.
        keep: share of each latent that stays.
        carried: what ablated latents carry.
    """

    rows: int
    factors: Float[Tensor, "row source"] | None
    keep: Mapping[Site, Float[Tensor, "row #pos latent"]]
    carried: Mapping[Site, Float[Tensor, " latent"]]

    def latents(self, site: Site, f: Float[Tensor, "row pos latent"]) -> Float[Tensor, "row pos latent"]:
        """The mix at one site."""
        return self.carried[site] + self.keep[site] * (f - self.carried[site])

    def tensor(self, site: Site, y: Float[Tensor, "row pos _"]) -> Float[Tensor, "row pos _"]:
        """Components stay as they are."""
        return y

    def tensors(self) -> Collection[Site]:
        """None."""
        return ()


@torch.no_grad()
def circuit_faithfulness(
    model: Model,
    dictionaries: Sequence[Dictionary],
    graphs: FeatureGraph | Sequence[FeatureGraph],
    *,
    targets: Sequence[Target | tuple[int, int]] | None = None,
    mode: str = "free",
    errors: str = "graph",
    baseline: Sequence[Int[Tensor, " _"]] = (),
    n_random: int = N_RANDOM,
    frozen_mlps: bool = False,
    budget: int | str | None = None,
    seed: int = 0,
) -> FeatureFaithfulness:
    """Measure the circuits that pruned graphs are, one of each prompt.

    Args:
        model: the graphs' model.
        dictionaries: the graphs' dictionaries.
        graphs: pruned; their latents and errors are the circuit.
        targets: for each graph what is measured: a token's logit, two tokens for the difference of their logits, a
            `Direction` or a `Latent`; None for what each graph explains.
        mode: ``free`` or ``frozen``: whether attention patterns and norm scales are computed anew.
        errors: ``graph``: errors in the graph stay, others are removed with the latents; ``kept``: all stay;
            ``removed``: none.
        baseline: prompts over whose positions ablated latents carry their mean; none for zero.
        n_random: how many random circuits.
        frozen_mlps: as given to the graphs.
        budget: memory of runs side by side.
        seed: of the random circuits.

    Raises:
        OptionError: for options that are not there, or graphs of another model or other dictionaries.
    """
    several = [graphs] if isinstance(graphs, FeatureGraph) else list(graphs)
    check(several, targets, mode, errors, n_random)
    generator = torch.Generator().manual_seed(seed)

    def cases() -> Iterator[Case]:
        for i, graph in enumerate(several):
            running = running_of(model, dictionaries, graph, frozen_mlps=frozen_mlps)
            readout = Readout.of_graph(running, graph) if targets is None else Readout.of(running, targets[i])
            own = _points(running, graph)
            masks = [_masks(running, points) for points in (own, *_random_points(running, own, n_random, generator))]
            yield Case(running, readout, graph, masks[0], tuple(masks[1:]))

    means = mean_latents(model, dictionaries, baseline)
    ablated = "mean" if len(baseline) else "zero"
    return judged(cases(), means, mode=mode, errors=errors, ablated=ablated, budget=budget, seed=seed)


def judged(
    cases: Iterable[Case],
    means: Mapping[Site, Float[Tensor, " latent"]],
    *,
    mode: str,
    errors: str,
    ablated: str,
    budget: int | str | None,
    seed: int,
) -> FeatureFaithfulness:
    """Measure sets of latents, one of each prompt, next to other sets.

    Args:
        cases: prompts with their sets.
        means: what ablated latents carry.
        ablated: how that is called.
    """
    from circuitkit.methods.plan import parse_bytes

    found, graphs, others = list[tuple[list[float], int, int]](), list[FeatureGraph](), False
    for case in cases:
        running, own = case.running, case.own
        active = {site: latents > 0 for site, latents in running.clean.latents.items()}
        nothing = {site: torch.zeros_like(mask) for site, mask in own.items()}
        masks = [nothing, own, {site: ~mask for site, mask in own.items()}, *case.random]
        factors = kept_errors(running, case.graph, errors, len(masks))
        values = _measured(running, case.readout, masks, factors, means, mode, parse_bytes(budget))
        inside = sum(int((mask & active[site]).sum()) for site, mask in own.items())
        found.append(([case.readout.clean, *values], inside, sum(int(a.sum()) for a in active.values())))
        graphs.append(case.graph)
        others |= any(not torch.equal(masks[site], mask) for masks in case.random for site, mask in own.items())
    clean, nothing_, circuit, complement, *random = zip(*(values for values, _, _ in found), strict=True)
    return FeatureFaithfulness(
        clean, nothing_, circuit, complement, tuple(random) if others else (),
        tuple(n for _, n, _ in found), tuple(n for _, _, n in found),
        sum(graph.replacement_score for graph in graphs) / len(graphs),
        sum(graph.completeness_score for graph in graphs) / len(graphs),
        mode, errors, ablated, seed,
    )  # fmt: skip


def mean_latents(
    model: Model, dictionaries: Sequence[Dictionary], prompts: Sequence[Int[Tensor, " _"]]
) -> dict[Site, Float[Tensor, " latent"]]:
    """Mean activation of every latent over all positions of some prompts; zero without prompts."""
    found = {}
    for d in dictionaries:
        x = [at_least_float32(activations(model, d.read, prompt[None])[0]) for prompt in prompts]
        every = [d.coder.encode(values.to(d.coder.W_enc)) for values in x] or [torch.zeros_like(d.coder.b_enc)[None]]
        found[same_site(d.read)] = torch.cat(every).mean(0).detach()
    return found


def check(graphs: Sequence[FeatureGraph], targets: object, mode: str, errors: str, n_random: int) -> None:
    """Refuse options that do not fit. Raises OptionError."""
    if not graphs:
        raise OptionError("got no graphs, expected one or several")
    if targets is not None and len(targets) != len(graphs):  # type: ignore[arg-type]
        raise OptionError(f"got {len(targets)} targets for {len(graphs)} graphs, expected one for each")  # type: ignore[arg-type]
    if mode not in MODES[:2] or errors not in ERRORS or n_random < 0:
        raise OptionError(
            f"got mode = {mode!r}, errors = {errors!r}, n_random = {n_random}; expected "
            f"{' or '.join(MODES[:2])}, one of {', '.join(ERRORS)}, and 0 or more"
        )


def _points(running: Running, graph: FeatureGraph) -> Points:
    """Positions and numbers of a graph's latents, by site."""
    found: dict[Site, list[tuple[int, int]]] = {}
    for node in graph.nodes:
        if node.kind == "latent" and node.position is not None:
            site, index, _ = latent_of(running.local, node.name)
            found.setdefault(site, []).append((node.position, index))
    device = running.local.tokens.device
    parts = {site: torch.tensor(pairs, device=device).unbind(1) for site, pairs in found.items()}
    return {site: (at, index) for site, (at, index) in parts.items()}


def _random_points(running: Running, own: Points, n: int, generator: torch.Generator) -> list[Points]:
    """As many active latents of each dictionary."""
    nodes = {a.reads.site: a.nodes for a in running.local.active}
    out: list[Points] = []
    for _ in range(n):
        drawn = {}
        for site, points in own.items():
            some = torch.randperm(len(nodes[site]), generator=generator)[: len(points[0])].to(points[0].device)
            drawn[site] = nodes[site].positions[some], nodes[site].index[some]
        out.append(drawn)
    return out


def _masks(running: Running, points: Points) -> dict[Site, Tensor]:
    masks = {site: torch.zeros_like(f, dtype=torch.bool) for site, f in running.clean.latents.items()}
    for site, (at, index) in points.items():
        masks[site][at, index] = True
    return masks


def kept_errors(running: Running, graph: FeatureGraph, errors: str, rows: int) -> Float[Tensor, "row source"] | None:
    """Factors less 1 of the errors of dictionaries: of nothing, the circuit, its complement, random circuits."""
    if errors == "kept":
        return None
    local = running.local
    out = local.values[local.final].new_zeros(rows, local.n_sources)
    own = {(node.site, node.position) for node in graph.nodes if node.kind == "error"}
    for nodes in local.nodes:
        if nodes.kind != "error" or same_site(nodes.site) not in running.writers:
            continue
        columns = torch.arange(nodes.first, nodes.first + len(nodes), device=out.device)
        out[:, columns] = -1
        if errors == "graph":
            inside = torch.tensor([(str(nodes.site), p) in own for p in nodes.positions.tolist()], device=out.device)
            out[1:, columns[inside]] = 0
            out[2, columns] = -inside.to(out)
    return out


def _measured(
    running: Running,
    readout: Readout,
    masks: Sequence[Mapping[Site, Tensor]],
    factors: Tensor | None,
    carried: Mapping[Site, Tensor],
    mode: str,
    budget: int | None,
) -> list[float]:
    """The metric of each circuit, as many side by side as fit."""
    at_once, found = max(1, (budget or BUDGET) // (2 * running.bytes_per_row(mode))), list[float]()
    like = running.local.values[running.local.final]
    carried = {site: values.to(like) for site, values in carried.items()}
    for start in range(0, len(masks), at_once):
        some = masks[start : start + at_once]
        keep = {site: torch.stack([m[site] for m in some]).to(like) for site in running.coders}
        part = None if factors is None else factors[start : start + at_once]
        passed = running.run(Gated(len(some), part, keep, carried), mode, watch=readout.sites)
        found += (readout.clean + readout.moved(passed, mode)).tolist()
    return found
