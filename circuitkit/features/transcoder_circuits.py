"""Transcoder circuits: the paths, through latents and attention heads, along which one output got its value.

    contribution of i to j        z_i(x) (W_dec[i] . W_enc[:, j]) c            an activation times a constant of weights
    through head h from q to p    A_h[p, q] z_i(x_q) (W_dec[i] c W_V^h W_O^h . W_enc[:, j]) c'

A latent of a transcoder is affine in what was written before it once attention patterns and norm scales (c) are held
at the run's. So a path search needs no gradients: a target's vector is multiplied with everything that was written
below it, the largest products are followed, each with the vector that it leaves, and so on down. At every step the
list adds up to what there was to explain, biases and errors included: relative gap at most 1e-4, tested.

Wrong where attention moves: nothing goes through queries and keys. Wrong where transcoders reconstruct badly: see
``error.`` nodes. A beam may miss a strong path that begins with a weak step: see ``pruned.`` nodes.
Cost: one forward pass, then ``depth`` times ``beam`` products with what was written; no backward pass.
What does not depend on the prompt: `circuitkit.features.weight_graph`, `circuitkit.features.deembedding`.
Reference: Dunefsky, Chlenski, Nanda 2024, "Transcoders Find Interpretable LLM Feature Circuits", arXiv:2406.11944.
Deviations: contributions are ranked by magnitude, the first position is treated like any other, the gain and centring
of norms are exact instead of one ratio per vector, and constants of attention are biases instead of parts of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError
from circuitkit.features.attribution import with_texts
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.local import LocalModel, Reads
from circuitkit.features.methods import feature_method
from circuitkit.features.path_graph import path_graph
from circuitkit.features.path_search import Keep, Path, search
from circuitkit.features.replace import local_model
from circuitkit.features.targets import Direction, Latent, final_targets
from circuitkit.features.texts import Text
from circuitkit.features.transcoder_paths import PathSteps
from circuitkit.models.hooked import Model

PathTarget = int | tuple[int, int] | Direction | Latent


@dataclass(frozen=True, eq=False)
class TranscoderCircuit:
    """Paths of one target.

    Args:
        target: what they explain; its ``value`` is a logit's probability, or what the target came to.
        paths: all that were kept, round by round, best first in each.
        graph: their union; effects are flows in units of the target.
    """

    target: FeatureNode
    paths: tuple[Path, ...]
    graph: FeatureGraph

    def __repr__(self) -> str:
        return f"TranscoderCircuit({self.target.name}: {len(self.paths)} paths, {len(self.graph)} nodes)"

    def ended(self) -> tuple[Path, ...]:
        """The paths that reach a token or a position, largest contribution first."""
        found = (path for path in self.paths if path.hops[-1].ends)
        return tuple(sorted(found, key=lambda path: -abs(path.contribution)))


@feature_method("transcoder-circuits")
def transcoder_circuits(
    model: Model,
    dictionaries: Sequence[Dictionary],
    tokens: Int[Tensor, " pos"] | str,
    *,
    target: PathTarget | None = None,
    depth: int = 2,
    beam: int = 5,
    cap: bool = False,
    keep: Keep | None = None,
) -> TranscoderCircuit:
    """The largest paths into one target of one prompt.

    Args:
        model: a transformer whose attention patterns can be reached; in float32 if it is narrower.
        dictionaries: transcoders, skip transcoders or CLTs. An MLP without one is an error.
        tokens: the prompt, as token ids or as a text for the model's tokenizer.
        target: a token id (its logit at the last position, less the mean), two (difference of their logits), a
            `Latent`, or a `Direction` of the stream or of what an MLP reads; None for the likeliest token.
        depth: how many steps a path may have.
        beam: how many paths are kept in each round.
        cap: rank a path by no more than the smallest activation of a latent on it, as an ablation of that latent
            could not take away more of the next one's activation than this.
        keep: which hops may be on a path, such as ``lambda hop: hop.node.kind != "unit" or hop.source > 0``; None for
            all. What is left out counts as pruned.

    Raises:
        OptionError: if dictionaries, tokens, target or options do not fit, or for a text without a tokenizer.
        TaskError: for an empty text.
        UnsupportedModel: if the model cannot be taken apart, or a list does not add up.

    >>> from circuitkit.testing import tiny_model
    >>> from circuitkit.dictionaries.base import Dictionary, Site
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> coder = SparseCoder(8, 16, 8).double()
    >>> _ = [torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0)) for p in coder.parameters()]
    >>> transcoder = Dictionary(coder, Site("mlp-in", 0), (Site("mlp-out", 0),))
    >>> found = transcoder_circuits(tiny_model(), [transcoder], torch.arange(5), target=3)
    >>> len(found.paths), bool(found.graph.remainder.abs().max() < 1e-9)
    (10, True)
    """
    for name, value in (("depth", depth), ("beam", beam)):
        if value < 1:
            raise OptionError(f"got {name} = {value}, expected at least 1")
    check_transcoders(dictionaries)
    text = Text.of(model, tokens)
    local = local_model(model, dictionaries, text.tokens)
    steps = PathSteps(local)
    node, reads = path_target(model, local, target)
    latent = node.kind == "latent"
    paths, opened = search(steps, reads, latent=latent, depth=depth, beam=beam, cap=cap, keep=keep)
    graph = path_graph(node, float(reads.values[0]), paths, opened, local.tokens, model.name)
    return TranscoderCircuit(node, paths, with_texts(graph, text))


def check_transcoders(dictionaries: Sequence[Dictionary]) -> None:
    """Whether all dictionaries lead from what an MLP reads to what MLPs write. Raises OptionError for any other."""
    for dictionary in dictionaries:
        if dictionary.read.kind != "mlp-in" or any(site.kind != "mlp-out" for site in dictionary.writes):
            raise OptionError(
                f"got a dictionary ({dictionary.kind}) from {dictionary.read} to "
                f"{', '.join(map(str, dictionary.writes))}, expected transcoders from mlp-in to mlp-out; "
                "for sparse autoencoders use 'attribution-graph'"
            )


@torch.no_grad()
def path_target(model: Model, local: LocalModel, target: PathTarget | None) -> tuple[FeatureNode, Reads]:
    """A target as a node and as the vector that it reads with.

    Raises:
        OptionError: for a token, site, position or latent that is not there, or a site that paths cannot begin at.
    """
    if target is None:
        target = int(local.logits[-1].argmax())
    last = 1 + len(local.ranks)
    if isinstance(target, tuple):
        if len(target) != 2 or target[0] == target[1]:
            raise OptionError(f"got {target} as a target, expected one token id, or two that differ")
        right, wrong = (final.reads for final in final_targets(model, local, target))
        parts = ((getattr(right, k) - getattr(wrong, k)) for k in ("vectors", "constants", "values"))
        reads = Reads(right.site, right.positions, *parts)
        name, kind, index, value = f"logits.{target[0]}-{target[1]}", "direction", None, float(reads.values[0])
    else:
        final = final_targets(model, local, [target])[0]
        reads = final.reads
        name = {"logit": f"logits.{final.label}", "latent": f"m{reads.site.layer}.f{final.label}"}.get(
            final.kind, final.label
        )
        kind, index = final.kind, None if final.index < 0 else final.index
        value = final.weight if final.kind == "logit" else float(reads.values[0])
    if reads.site.kind not in ("resid-pre", "mlp-in"):
        raise OptionError(f"got a target at {reads.site}, expected one at the stream or at what an MLP reads (mlp-in)")
    position = int(reads.positions[0])
    stage = 1 + local.ranks[reads.site] if kind == "latent" else 1 + last
    name = f"{name}@{position}"
    return FeatureNode(name, kind, reads.site.layer, str(reads.site), position, index, value, stage), reads
