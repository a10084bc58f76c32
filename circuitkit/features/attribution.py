"""Attribution graphs: which tokens and features caused a model's output on one prompt, through which features.

    effect(s -> t) = value of s * sum over written sites (decoder of s . frozen maps . encoder of t)

Attention patterns, norm scales and the set of active latents are held at the prompt's own run; then every latent is an
affine function of what was written before, and its row of effects, biases and errors included, adds up to its
pre-activation. Each row is tested for that: relative gap at most 1e-4 of the larger of the total and the row's largest
effect.

Wrong where attention moves: effects through queries and keys are not in the graph, so a feature that changes where a
head looks may seem to do nothing. Wrong where errors are large: see ``replacement_score``.
Cost: one forward pass, then one sweep of the layers for each chunk of targets (`circuitkit.features.sweep`).
References: Ameisen et al. 2025, "Circuit tracing" (transformer-circuits.pub); Ge et al. 2024, arXiv:2405.13868
(``hierarchical``); Dunefsky et al. 2024, arXiv:2406.11944 (transcoders). Deviations: biases and positions are nodes,
the first position is treated like any other, and no autograd is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError
from circuitkit.features.explore import Explored, column_stages, explore
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.hierarchical import total_effects
from circuitkit.features.local import LocalModel, Nodes, Reads, owner, same_site
from circuitkit.features.replace import local_model
from circuitkit.features.sweep import in_order
from circuitkit.features.targets import Final, Target, final_targets
from circuitkit.models.hooked import Model

STEMS = {"mlp-in": "m{}", "mlp-out": "m{}.out", "attn-out": "a{}", "z": "a{}.z", "resid-pre": "r{}"}


def attribution_graph(
    model: Model,
    dictionaries: Sequence[Dictionary],
    tokens: Int[Tensor, " pos"],
    *,
    targets: Sequence[Target] | None = None,
    max_features: int | None = None,
    hierarchical: bool = False,
    tau: float = 0.01,
    frozen_mlps: bool = False,
    budget: int | str | None = None,
) -> FeatureGraph:
    """The attribution graph of one prompt.

    Args:
        model: a transformer whose attention patterns can be reached; attributed in float32 if it is narrower.
        dictionaries: transcoders, skip transcoders, CLTs, or SAEs on attention outputs, MLP outputs or the stream.
        tokens: the prompt.
        targets: token ids (logits at the last position), `Direction`s or `Latent`s; None for the top logits.
        max_features: how many latents get a row, those of most influence first; None for all.
        hierarchical: keep only latents whose attribution through all paths is at least ``tau``, lower ones being
            scored through the higher ones that stay.
        tau: that threshold, in the units of the targets.
        frozen_mlps: let MLPs without a dictionary pass on what they read, with the ratio of each neuron's output to
            its pre-activation held fixed; without it such an MLP's output is an error node.
        budget: memory that one sweep may take, in bytes or as text such as ``"4GiB"``; 512 MiB if None.

    Raises:
        OptionError: if dictionaries, tokens, targets or options do not fit.
        UnsupportedModel: if the model cannot be taken apart, or a row does not add up to its target.

    >>> from circuitkit.testing import tiny_model
    >>> from circuitkit.dictionaries.base import Dictionary, Site
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> coder = SparseCoder(8, 16, 8).double()
    >>> _ = [torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0)) for p in coder.parameters()]
    >>> transcoder = Dictionary(coder, Site("mlp-in", 0), (Site("mlp-out", 0),))
    >>> graph = attribution_graph(tiny_model(), [transcoder], torch.arange(5), targets=[3])
    >>> bool(graph.remainder.abs().max() < 1e-9), graph.nodes[-1].name
    (True, 'logits.3@4')
    """
    from circuitkit.methods.plan import parse_bytes

    if max_features is not None and max_features < 1:
        raise OptionError(f"got max_features = {max_features}, expected at least 1, or None for all")
    if tau < 0:
        raise OptionError(f"got tau = {tau}, expected 0 or more")
    local = local_model(model, dictionaries, tokens, frozen_mlps=frozen_mlps)
    finals = final_targets(model, local, targets)
    numbers = _numbers(local, finals)
    weights = torch.tensor([final.weight for final in finals], dtype=torch.float64)
    only = _survivors(local, finals, tau) if hierarchical else None
    found = explore(
        local, [final.reads for final in finals], numbers, weights, most=max_features, only=only,
        budget=parse_bytes(budget),
    )  # fmt: skip
    return _graph(model, local, finals, numbers, found)


def _numbers(local: LocalModel, finals: Sequence[Final]) -> list[int]:
    """The node of each final target: a latent's column, or one beyond all columns."""
    found, beyond = list[int](), local.n_sources
    for final in finals:
        if final.kind == "latent":
            nodes = next(a.nodes for a in local.active if a.reads.site == final.reads.site)
            here = (nodes.positions == final.reads.positions[0]) & (nodes.index == final.index)
            found.append(nodes.first + int(here.nonzero()[0]))
        else:
            found.append(beyond)
            beyond += 1
    if len(set(found)) < len(found):
        raise OptionError("got the same latent twice as a target; name each once")
    return found


def _survivors(local: LocalModel, finals: Sequence[Final], tau: float) -> Bool[Tensor, " source"]:
    kept = torch.zeros(local.n_sources, dtype=torch.bool, device=local.tokens.device)
    for final in finals:
        kept |= (total_effects(local, in_order(local, [final.reads]), tau).abs() >= tau).any(0)
    return kept


def _graph(
    model: Model, local: LocalModel, finals: Sequence[Final], numbers: Sequence[int], found: Explored
) -> FeatureGraph:
    extra = [f for f, number in zip(finals, numbers, strict=True) if number >= local.n_sources]
    stages = column_stages(local, len(extra)).tolist()
    nodes = [node for group in local.nodes for node in _named(group, stages)]
    nodes += [_final_node(local, final, stages[-1]) for final in extra]
    weights = found.effects.new_zeros(len(nodes), dtype=torch.float64)
    weights[torch.tensor(list(numbers), device=weights.device)] = torch.tensor(
        [final.weight for final in finals], dtype=torch.float64, device=weights.device
    )
    graph = FeatureGraph(tuple(nodes), found.numbers, found.effects, found.totals, weights, local.tokens, model.name)
    # A latent without a row of its own would be an end that nothing explains.
    kept = ~graph.kind("latent")
    kept[found.numbers] = True
    return graph if bool(kept.all()) else graph.part(kept)


def _named(group: Nodes, stages: Sequence[int]) -> list[FeatureNode]:
    site = same_site(group.site)
    layer = -1 if group.kind in ("token", "position") else site.layer
    name, part = STEMS[site.kind].format(site.layer), STEMS[owner(site).kind].format(site.layer).removesuffix(".out")
    made = []
    rows = zip(group.positions.tolist(), group.index.tolist(), group.values.tolist(), strict=True)
    for i, (position, index, value) in enumerate(rows):
        stem = {
            "token": "input",
            "position": "position",
            "bias": f"{part}.bias",
            "error": f"{part if site.kind == 'mlp-out' else name}.error",
        }.get(group.kind, f"{name}.f{index}")
        made.append(
            FeatureNode(
                stem if position < 0 else f"{stem}@{position}", group.kind, layer, str(group.site),
                None if position < 0 else position, None if index < 0 else index, value, stages[group.first + i],
            )
        )  # fmt: skip
    return made


def _final_node(local: LocalModel, final: Final, stage: int) -> FeatureNode:
    reads: Reads = final.reads
    position, name = int(reads.positions[0]), "logits." if final.kind == "logit" else ""
    value = final.weight if final.kind == "logit" else float(reads.values[0])
    return FeatureNode(
        f"{name}{final.label}@{position}", final.kind, reads.site.layer, str(reads.site), position,
        final.index if final.kind == "logit" else None, value, stage,
    )  # fmt: skip
