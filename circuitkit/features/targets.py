"""What an attribution graph explains: logits, a direction, a latent or an attention score, as vectors at one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Site
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.frozen import FrozenNorm
from circuitkit.features.inputs import soft_cap, unembedding
from circuitkit.features.local import LocalModel, Reads, Stage, same_site
from circuitkit.features.replace import ROUNDING
from circuitkit.features.scores import frozen_score, with_score_sites
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model

MOST_LOGITS, MASS = 10, 0.95


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the tensor of one site: the target is their product.

    Args:
        site: where; ``Site("resid-pre", n_layers)`` is the stream after the last block.
        position: which; negative counts from the end.
        vector: as wide as the site.
        label: for the graph.
        weight: how much it counts in influence.
    """

    site: Site
    position: int
    vector: Float[Tensor, " d"]
    label: str = "direction"
    weight: float = 1.0


@dataclass(frozen=True)
class Latent:
    """A latent that is active: the target is its activation.

    Args:
        site: what its dictionary reads.
        position: which; negative counts from the end.
        index: number of the latent.
    """

    site: Site
    position: int
    index: int


@dataclass(frozen=True)
class AttentionScore:
    """What a head's query and key at two positions come to before the softmax, as two rows that add up to it.

    One row explains the score by what the query's position holds, the key being that of the run; the other by what the
    key's position holds, the query being that of the run. A soft cap, and what is added whatever query and key are
    (ALiBi), come behind this. Reference: He et al. 2024, arXiv:2402.12201.

    Args:
        layer: of the head.
        head: number of the query head.
        query: position; negative counts from the end.
        key: position; None for the most attended one.
        weight: how much each of the two rows counts in influence.
    """

    layer: int
    head: int
    query: int = -1
    key: int | None = None
    weight: float = 1.0


Target = int | Direction | Latent | AttentionScore


@dataclass(frozen=True, eq=False)
class Final:
    """One target with its row's vector.

    Args:
        kind: ``logit``, ``direction``, ``latent`` or ``score``.
        label: a token id, the direction's own label, or the score's head, positions and side.
        weight: its share of influence.
        reads: the vector, as a group of one.
        index: token id or number of the latent, or -1.
    """

    kind: str
    label: str
    weight: float
    reads: Reads
    index: int


def with_places(local: LocalModel, targets: Sequence[Target] | None) -> LocalModel:
    """The local model with a place for every target: scores read the stream as attention does."""
    layers = {target.layer for target in targets or () if isinstance(target, AttentionScore)}
    return with_score_sites(local, layers) if layers else local


@torch.no_grad()
def final_targets(model: Model, local: LocalModel, targets: Sequence[Target] | None) -> list[Final]:
    """Targets as vectors; the top logits of the last position if none are named.

    Those are the likeliest tokens up to a total probability of 0.95, at most 10; each weighs its probability. Logits
    are taken minus their mean over the vocabulary, and before a soft cap.

    Raises:
        OptionError: for a token, site, position or latent that is not there.
    """
    if targets is None:
        chosen = local.logits[-1].double().softmax(0).sort(descending=True)
        count = min(int((chosen.values.cumsum(0) < MASS).sum()) + 1, MOST_LOGITS, len(chosen.values))
        targets = chosen.indices[:count].tolist()
    if not targets:
        raise OptionError(
            "got no targets, expected token ids, a Direction, a Latent or an AttentionScore, or None for the top logits"
        )
    tokens = [t for t in targets if type(t) is int]
    logits = dict(zip(tokens, _logits(model, local, tokens), strict=True)) if tokens else {}
    found: list[Final] = []
    for t in targets:
        if isinstance(t, AttentionScore):
            found += _score(model, local, t)
        else:
            found.append(logits[t] if type(t) is int else _other(local, t))  # type: ignore[arg-type]
    return found


def _logits(model: Model, local: LocalModel, tokens: Sequence[int]) -> list[Final]:
    last_stage = local.steps[-1]
    if isinstance(last_stage, Stage) and last_stage.cut:
        raise OptionError(
            f"got logits as targets and a dictionary that stands for the last stream, {local.final}: what it writes "
            "reaches logits only, and would not be in the graph; leave it out, or name a Latent of it as target"
        )
    x = local.values[local.final]
    weight, bias = (t.to(x) for t in unembedding(model))
    norm = model.wiring.final_norm
    own = _normed(model, x[-1:]) @ weight + bias
    _check_logits(model, own[0], local.logits[-1])
    frozen, last = FrozenNorm.at(norm, x[-1:]), torch.tensor([len(x) - 1], device=x.device)
    probability, found = local.logits[-1].double().softmax(0), []
    for token in tokens:
        if not 0 <= token < weight.shape[1]:
            raise OptionError(f"got token {token} as a target, expected 0 to {weight.shape[1] - 1}")
        direction = weight[:, token] - weight.mean(1)
        constant = bias[token] - bias.mean()
        if norm is not None and norm.bias is not None:
            constant = constant + norm.bias.to(x) @ direction
        value = own[:, token] - own.mean(1)
        vector = frozen.pull(direction[None, None])[0]
        reads = Reads(local.final, last, vector, constant[None], value)
        found.append(Final("logit", str(token), float(probability[token]), reads, token))
    return found


def _normed(model: Model, x: Float[Tensor, "pos d"]) -> Float[Tensor, "pos d"]:
    return x if model.wiring.final_norm is None else model.wiring.final_norm(x)


def _check_logits(model: Model, own: Tensor, theirs: Tensor) -> None:
    """Whether norm and unembedding, as data, are what the model does."""
    cap = soft_cap(model)
    own = own if cap is None else cap * torch.tanh(own / cap)
    theirs = at_least_float32(theirs).to(own)
    gap = float((own - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    allowed = ROUNDING.get(next(model.module.parameters()).dtype, 1e-3)
    if not gap <= allowed:
        raise UnsupportedModel(
            f"the logits of {model.name} are not its final norm times its unembedding: relative gap {gap:.1e}, "
            f"expected at most {allowed:.0e}; name a Direction at the last stream as target instead"
        )


def _other(local: LocalModel, target: Direction | Latent) -> Final:
    if not isinstance(target, Direction | Latent):
        raise OptionError(
            f"got {target!r} as a target, expected a token id (an int), a text, a Contrast, a Direction, a Latent or "
            "an AttentionScore"
        )
    site = same_site(target.site)
    if site not in local.values:
        raise OptionError(f"got a target at {target.site}, which this model does not have")
    x = local.values[site]
    position = target.position if target.position >= 0 else len(x) + target.position
    if not 0 <= position < len(x):
        raise OptionError(f"got a target at position {target.position} of a prompt of {len(x)} tokens")
    if isinstance(target, Latent):
        return _latent(local, target, position)
    if tuple(target.vector.shape) != (x.shape[1],):
        raise OptionError(f"got a direction of shape {tuple(target.vector.shape)} at {site}, expected ({x.shape[1]},)")
    vector = target.vector.to(x)
    if not bool(vector.any()) or not bool(vector.isfinite().all()):
        raise OptionError(f"got the direction {target.label!r} at {site}, which is zero or not finite")
    reads = Reads(
        site, torch.tensor([position], device=x.device), vector[None], x.new_zeros(1), (x[position] @ vector)[None]
    )
    return Final("direction", target.label, target.weight, reads, -1)


def _score(model: Model, local: LocalModel, target: AttentionScore) -> list[Final]:
    score = frozen_score(model, local, target.layer, target.head, target.query, target.key)
    stem = f"score.a{score.layer}.h{score.head}[{score.query.position},{score.key.position}]"
    sides = (
        (f"{stem}<q>", score.query.reads(score.site, (score.form @ score.key.value)[None])),
        (f"{stem}<k>", score.key.reads(score.site, (score.query.value @ score.form)[None])),
    )
    return [Final("score", label, target.weight, reads, -1) for label, reads in sides]


def _latent(local: LocalModel, target: Latent, position: int) -> Final:
    active = next((a for a in local.active if same_site(a.dictionary.read) == same_site(target.site)), None)
    if active is None:
        raise OptionError(f"got latent {target.index} of {target.site} as a target, and no dictionary reads that site")
    here = (active.nodes.positions == position) & (active.nodes.index == target.index)
    if not bool(here.any()):
        raise OptionError(f"latent {target.index} of {target.site} is not active at position {position}")
    return Final("latent", str(target.index), 1.0, active.reads.take(here.nonzero().flatten()), target.index)
