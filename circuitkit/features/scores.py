"""Attention scores as bilinear forms of what a query's and a key's position of the stream hold.

    score = q^T F k + offset          q = Q x_query + c          k = K x_key + c'

x is the stream before the block. Q and K hold the norm's scale of this run, the head's projection and, where there is
one, the norm of queries or keys with its own scale of this run. F is what the model does between there and its softmax
(rotary positions, the factor 1 / sqrt(d_head)); it is found by experiment: the block is run again with a query of zeros
and keys of one 1 each, and the gradient of the score at the query is a column of F. At a query of zeros a soft cap has
slope 1, so F is what comes before the cap. The offset is what is added whatever query and key are (ALiBi).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Site
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.local import LocalModel, Reads, Stage, Step
from circuitkit.features.replace import ROUNDING
from circuitkit.features.score_probe import End, Probe
from circuitkit.models.attention import Attention, attentions

if TYPE_CHECKING:
    from circuitkit.models.hooked import Model

MASKED = -1e8  # added to scores that do not count


@dataclass(frozen=True, eq=False)
class FrozenRead:
    """A head's query or key at one position, as an affine function of the stream there.

    Args:
        position: which.
        weight: the map, one row for each number of the query or key.
        constant: what biases add.
        value: what it comes to in the run, rotary positions not applied.
    """

    position: int
    weight: Float[Tensor, "d_head d"]
    constant: Float[Tensor, " d_head"]
    value: Float[Tensor, " d_head"]

    def reads(self, site: Site, vectors: Float[Tensor, "row d_head"]) -> Reads:
        """Products of the query or key with some vectors, as targets at a site that holds the stream."""
        positions = torch.full((len(vectors),), self.position, device=vectors.device)
        return Reads(site, positions, vectors @ self.weight, vectors @ self.constant, vectors @ self.value)


@dataclass(frozen=True, eq=False)
class FrozenScore:
    """One score of a run; see the module's text.

    Args:
        layer: of the head.
        head: query head.
        query: what reads at the query's position.
        key: what reads at the key's position.
        form: F.
        offset: what is added whatever query and key are.
        attention: the pattern at query and key.
        soft_cap: the bound that scores are squeezed under before the softmax, or None.
    """

    layer: int
    head: int
    query: FrozenRead
    key: FrozenRead
    form: Float[Tensor, "d_head d_head"]
    offset: float
    attention: float
    soft_cap: float | None

    @property
    def product(self) -> float:
        """q^T F k, before a soft cap."""
        return float(self.query.value @ self.form @ self.key.value)

    @property
    def site(self) -> Site:
        """Where `with_score_sites` puts the stream as this layer's attention reads it."""
        return score_site(self.layer)


def score_site(layer: int) -> Site:
    """The stream as one layer's attention reads it, behind whatever a dictionary writes there."""
    # Of attention's kind, so that constants of queries and keys are among the biases of that component.
    return Site("attn-out", layer, f"{layer}.scores")


def with_score_sites(local: LocalModel, layers: Iterable[int]) -> LocalModel:
    """The local model with a place for targets at the stream that attention reads, in some layers.

    >>> from circuitkit.features.scores import score_site
    >>> str(score_site(2))
    'attn-out.2.scores'
    """
    wanted = {Site("resid-pre", layer): score_site(layer) for layer in layers}
    steps, values = list[Step](), dict(local.values)
    for step in local.steps:
        steps.append(step)
        if isinstance(step, Stage) and step.site in wanted:
            site = wanted[step.site]
            steps.append(Stage(site, None))
            values[site] = values[step.site]
    return replace(local, steps=tuple(steps), values=values)


@torch.no_grad()
def frozen_score(
    model: Model, local: LocalModel, layer: int, head: int, query: int = -1, key: int | None = None
) -> FrozenScore:
    """One attention score of a prompt, taken apart.

    Args:
        model: the model that the local one was made from.
        local: its local replacement model of the prompt.
        layer: of the head.
        head: number of the query head.
        query: position; negative counts from the end.
        key: position; None for the most attended one.

    Raises:
        OptionError: for a layer, head or position that is not there, or a key that the query does not see.
        UnsupportedModel: if the score is not a product of a query and a key as the wiring has them.
    """
    attention = _attention(model, layer, head)
    n = len(local.tokens)
    query = _position(query, n, "query")
    probe = Probe(model, local, attention, head)
    key = int(probe.pattern[query].argmax()) if key is None else _position(key, n, "key")
    ends, heads = probe.ends, probe.heads
    reads = _read(ends["q"], heads["q"], query), _read(ends["k"], heads["k"], key)
    form, offset = probe.form(query, key)
    if not offset > MASKED:
        raise OptionError(f"the query at position {query} does not see the key at {key} in layer {layer}; choose a "
                          "key that it can attend to")  # fmt: skip
    cap = attention_cap(model)
    found = FrozenScore(layer, head, *reads, form, offset, float(probe.pattern[query, key]), cap)
    _check(model, found, float(probe.scores[query, key]))
    return found


def _read(end: End, head: int, position: int) -> FrozenRead:
    return FrozenRead(position, *end.read(head, position), end.values[position, head])


def _attention(model: Model, layer: int, head: int) -> Attention:
    attention = next((a for a in attentions(model) if a.block == layer), None)
    if attention is None:
        raise OptionError(f"got layer = {layer}, and {model.name} has layers 0 to {len(model.wiring.blocks) - 1}")
    if not 0 <= head < attention.heads.n:
        raise OptionError(f"got head = {head}, and layer {layer} of {model.name} has {attention.heads.n} heads from 0")
    return attention


def _position(position: int, n: int, what: str) -> int:
    if not -n <= position < n:
        raise OptionError(f"got {what} = {position} in a prompt of {n} tokens, expected {-n} to {n - 1}")
    return position % n


def attention_cap(model: Model) -> float | None:
    """The bound that attention scores are squeezed under, or None."""
    module: Any = model.module
    config = getattr(getattr(module, "original_model", None), "config", None)
    cap = getattr(config, "attn_logit_softcapping", None) or getattr(
        getattr(module, "cfg", None), "attn_scores_soft_cap", None
    )
    return float(cap) if cap and cap > 0 else None


def _check(model: Model, found: FrozenScore, theirs: float) -> None:
    """Whether the product is what the model's softmax is given."""
    own = found.product
    own = own if found.soft_cap is None else found.soft_cap * float(torch.tanh(torch.tensor(own / found.soft_cap)))
    own += found.offset
    parts = found.query.value * (found.form @ found.key.value)
    gap = abs(own - theirs) / max(abs(theirs), float(parts.abs().max()), 1e-6)
    allowed = ROUNDING.get(next(model.module.parameters()).dtype, 1e-3)
    if not gap <= allowed:
        raise UnsupportedModel(
            f"the attention score of {model.name}, layer {found.layer}, head {found.head}, is {theirs:.6g} and the "
            f"product of its query and key {own:.6g}: relative gap {gap:.1e}, expected at most {allowed:.0e}; its "
            "attention does something that the wiring does not say"
        )
