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
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.std import tqdm

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError
from circuitkit.features.contrast import Contrast, all_finals, contrasted, plain
from circuitkit.features.explore import Explored, column_stages, exploration
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.hierarchical import total_effects
from circuitkit.features.local import LocalModel, Nodes, Reads, owner, same_site
from circuitkit.features.methods import feature_method
from circuitkit.features.replace import local_models
from circuitkit.features.sweep import in_order
from circuitkit.features.targets import AttentionScore, Final, Target, with_places
from circuitkit.features.texts import Text
from circuitkit.features.together import Exploration, buckets, explore_together
from circuitkit.models.hooked import Model

STEMS = {"mlp-in": "m{}", "mlp-out": "m{}.out", "attn-out": "a{}", "z": "a{}.z", "resid-pre": "r{}"}


@feature_method("attribution-graph")
def attribution_graph(
    model: Model,
    dictionaries: Sequence[Dictionary],
    tokens: Int[Tensor, " pos"] | Float[Tensor, "step size"] | str,
    *,
    targets: Sequence[Target | Contrast | str] | None = None,
    max_features: int | None = None,
    hierarchical: bool = False,
    tau: float = 0.01,
    frozen_mlps: bool = False,
    budget: int | str | None = None,
) -> FeatureGraph:
    """The attribution graph of one prompt.

    Args:
        model: a transformer whose attention patterns can be reached, attributed in float32 if it is narrower; or a
            recurrent network.
        dictionaries: transcoders, skip transcoders, CLTs, or SAEs on attention outputs, MLP outputs or the stream.
        tokens: the prompt, as token ids or as a text for the model's tokenizer; numbers, if a recurrent network reads
            such (`circuitkit.features.recurrent`).
        targets: token ids or texts of one token (logits at the last position), `Contrast`s of two of these,
            `Direction`s, `Latent`s or `AttentionScore`s; None for the top logits.
        max_features: how many latents get a row, those of most influence first; None for all.
        hierarchical: keep only latents whose attribution through all paths is at least ``tau``, lower ones being
            scored through the higher ones that stay.
        tau: that threshold, in the units of the targets.
        frozen_mlps: let MLPs without a dictionary pass on what they read, with the ratio of each neuron's output to
            its pre-activation held fixed; without it such an MLP's output is an error node.
        budget: memory that one sweep may take, in bytes or as text such as ``"4GiB"``; 512 MiB if None.

    Raises:
        OptionError: if dictionaries, tokens, targets or options do not fit, or for texts without a tokenizer.
        TaskError: for an empty text.
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
    if model.family == "recurrent":
        from circuitkit.features.recurrent import recurrent_attribution_graph

        if hierarchical or frozen_mlps:
            raise OptionError("hierarchical and frozen_mlps are for transformers; leave them out")
        asked: Any = {"targets": targets, "max_features": max_features, "budget": budget}
        return recurrent_attribution_graph(cast(Any, model), dictionaries, cast(Tensor, tokens), **asked)
    return attribution_graphs(
        model, dictionaries, [tokens], targets=None if targets is None else [targets], max_features=max_features,
        hierarchical=hierarchical, tau=tau, frozen_mlps=frozen_mlps, budget=budget, progress=False,
    )[0]  # fmt: skip


def attribution_graphs(
    model: Model,
    dictionaries: Sequence[Dictionary],
    prompts: Sequence[Int[Tensor, " _"] | str],
    *,
    targets: Sequence[Sequence[Target | Contrast | str] | None] | None = None,
    max_features: int | None = None,
    hierarchical: bool = False,
    tau: float = 0.01,
    frozen_mlps: bool = False,
    budget: int | str | None = None,
    progress: bool = True,
) -> list[FeatureGraph]:
    """The attribution graphs of several prompts, short ones swept together (`circuitkit.features.pack`).

    Args:
        model: as in `attribution_graph`, like all that is not named here.
        dictionaries: the same for all prompts.
        prompts: of any lengths.
        targets: those of each prompt, in order; None for the top logits of every prompt.
        max_features: of each graph.
        hierarchical: see there.
        tau: see there.
        frozen_mlps: see there.
        budget: see there.
        progress: show a bar over two seconds.

    Raises:
        OptionError: as `attribution_graph`, or if there are not as many lists of targets as prompts.
        TaskError: for an empty text.
        UnsupportedModel: if the model cannot be taken apart, or a row does not add up to its target.
    """
    from circuitkit.methods.plan import parse_bytes

    if max_features is not None and (type(max_features) is not int or max_features < 1):
        raise OptionError(f"got max_features = {max_features}, expected at least 1, or None for all")
    if not tau >= 0:
        raise OptionError(f"got tau = {tau}, expected 0 or more")
    if targets is not None and len(targets) != len(prompts):
        raise OptionError(f"got targets of {len(targets)} prompts and {len(prompts)} prompts, expected as many")
    texts = [Text.of(model, prompt) for prompt in prompts]
    wanted = [None] * len(texts) if targets is None else [t.targets(own) for t, own in zip(texts, targets, strict=True)]
    found: dict[int, FeatureGraph] = {}
    with tqdm(total=len(texts), desc="attribution graphs", disable=not progress, delay=2, leave=False) as bar:
        for some in buckets([len(text.tokens) for text in texts], [_score_layers(own) for own in wanted]):
            made = local_models(model, dictionaries, [texts[i].tokens for i in some], frozen_mlps=frozen_mlps)
            locals_ = [with_places(local, plain(wanted[i])) for i, local in zip(some, made, strict=True)]
            asked = [_Question.of(model, x, wanted[i], hierarchical, tau) for i, x in zip(some, locals_, strict=True)]
            rows = explore_together(locals_, [q.exploration(max_features) for q in asked], parse_bytes(budget))
            for i, question, explored in zip(some, asked, rows, strict=True):
                found[i] = with_texts(question.graph(model.name, explored), texts[i])
            bar.update(len(some))
    return [found[i] for i in range(len(texts))]


def with_texts(graph: FeatureGraph, text: Text) -> FeatureGraph:
    """The graph with the texts of its prompt's tokens, and of those that are explained."""
    ids = {node.index for node in graph.nodes if node.kind == "logit" and node.index is not None}
    ids |= {i for node in graph.nodes for i in contrasted(node.name.partition("@")[0]) or ()}
    return replace(graph, texts=text.of_each, target_tokens=text.of_ids(sorted(ids)))


def _score_layers(targets: Sequence[Target | Contrast] | None) -> tuple[int, ...]:
    return tuple(sorted({target.layer for target in targets or () if isinstance(target, AttentionScore)}))


@dataclass(frozen=True, eq=False)
class _Question:
    """A prompt, what is to be explained of it, and which node each of that is."""

    local: LocalModel
    finals: Sequence[Final]
    numbers: Sequence[int]
    only: Bool[Tensor, " source"] | None

    @classmethod
    def of(
        cls,
        model: Model,
        local: LocalModel,
        targets: Sequence[Target | Contrast] | None,
        hierarchical: bool,
        tau: float,
    ) -> _Question:
        finals = all_finals(model, local, targets)
        return cls(local, finals, _numbers(local, finals), _survivors(local, finals, tau) if hierarchical else None)

    def exploration(self, most: int | None) -> Exploration:
        weights = torch.tensor([final.weight for final in self.finals], dtype=torch.float64)
        reads = [final.reads for final in self.finals]
        return exploration(self.local, reads, self.numbers, weights, most=most, only=self.only)

    def graph(self, model: str, found: Explored) -> FeatureGraph:
        return _graph(model, self.local, self.finals, self.numbers, found)


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
    names = [
        f"{final.kind} {final.label}@{int(final.reads.positions[0])}" for final in finals if final.kind != "latent"
    ]
    twice = [name for name in names if names.count(name) > 1]
    if len(set(found)) < len(found) or twice:
        what = twice[0] if twice else "the same latent"
        raise OptionError(f"got {what} twice as a target; name each once, and give each Direction a label of its own")
    return found


def _survivors(local: LocalModel, finals: Sequence[Final], tau: float) -> Bool[Tensor, " source"]:
    kept = torch.zeros(local.n_sources, dtype=torch.bool, device=local.tokens.device)
    for final in finals:
        kept |= (total_effects(local, in_order(local, [final.reads]), tau).abs() >= tau).any(0)
    return kept


def _graph(
    model: str, local: LocalModel, finals: Sequence[Final], numbers: Sequence[int], found: Explored
) -> FeatureGraph:
    extra = [f for f, number in zip(finals, numbers, strict=True) if number >= local.n_sources]
    stages = column_stages(local, len(extra)).tolist()
    nodes = [node for group in local.nodes for node in named(group, stages)]
    nodes += [final_node(local, final, stages[-1]) for final in extra]
    weights = found.effects.new_zeros(len(nodes), dtype=torch.float64)
    weights[torch.tensor(list(numbers), device=weights.device)] = torch.tensor(
        [final.weight for final in finals], dtype=torch.float64, device=weights.device
    )
    graph = FeatureGraph(tuple(nodes), found.numbers, found.effects, found.totals, weights, local.tokens, model)
    # A latent without a row of its own would be an end that nothing explains.
    kept = ~graph.kind("latent")
    kept[found.numbers] = True
    return graph if bool(kept.all()) else graph.part(kept)


def named(group: Nodes, stages: Sequence[int]) -> list[FeatureNode]:
    """Nodes of one group of sources."""
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


def final_node(local: LocalModel, final: Final, stage: int) -> FeatureNode:
    """The node of what is explained."""
    reads: Reads = final.reads
    position, name = int(reads.positions[0]), "logits." if final.kind == "logit" else ""
    value = final.weight if final.kind == "logit" else float(reads.values[0])
    return FeatureNode(
        f"{name}{final.label}@{position}", final.kind, reads.site.layer, str(reads.site), position,
        final.index if final.kind == "logit" else None, value, stage,
    )  # fmt: skip
