"""Splicing: a model in which a site is written by a dictionary's latents and what they leave over.

    SAE          y, as it was written,    =  sum_i f_i(y) W_dec[i] + error
    transcoder   MLP(x)                   =  sum_i f_i(x) W_dec[i] + error
    replaced     the same, with the dictionary's own output in place of y or MLP(x)

Every chosen latent is a writer of one number along one direction; the error, one writer more, is what they leave over,
the share of all other latents with it. A transcoder's latents also read: each has its own copy of the stream and its
column of W_enc, and so has the error, whose copy runs the whole MLP. An SAE's latents are made of what its layer
writes, so the readers of that layer (q, k, v, or the MLP) feed all of them. The error depends on what it reads: were it
a constant, the model's answer would not be a function of its input any more.

Only the wiring is new. The module is the user's own: while the model runs, hooks pass values through identities of
ours, and these are what the wiring's ports name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.places import Place, place_of, stem_of
from circuitkit.dictionaries.sites import activations, check_fits
from circuitkit.dictionaries.sparse_coder import ACTIVATIONS, SparseCoder
from circuitkit.errors import OptionError
from circuitkit.functional.norms import at_least_float32
from circuitkit.graph import Graph, Node
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import Hook, hooked
from circuitkit.models.wiring import Port, ReadSite, Wiring, WriteSite
from circuitkit.shapes import Tokens


@dataclass(frozen=True, eq=False)
class Splice:
    """One dictionary in its place in a running model.

    Args:
        dictionary: as it was given.
        chosen: numbers of the latents that are nodes.
        place: where it reads and writes.
        replaces: whether its own output takes the place of what was written.
        coder: the dictionary's coder, its weights frozen, in float32 or better.
        part: the same with the chosen latents only.
    """

    dictionary: Dictionary
    chosen: tuple[int, ...]
    place: Place
    replaces: bool
    coder: SparseCoder
    part: SparseCoder
    pre: nn.Identity = field(default_factory=nn.Identity)
    latents: nn.Identity = field(default_factory=nn.Identity)
    rest_in: nn.Identity = field(default_factory=nn.Identity)
    rest: nn.Identity = field(default_factory=nn.Identity)
    _entered: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self) -> list[Hook]:
        """What makes a run of the module pass through the latents."""
        if self.place.read is None:
            return [(self.place.written, self._rewrite)]
        return [(self.place.read.port, self._enter), (self.place.written, self._leave)]

    def _rewrite(self, y: Tensor) -> Tensor:
        """An SAE: decompose what was written."""
        wide = at_least_float32(y)
        every = self.coder.encode(wide)
        own = every[..., list(self.chosen)]
        target = self.coder(wide)[..., 0, :] if self.replaces else wide
        return self._joined(self.latents(own), target - own @ self.part.W_dec[0], y)

    def _enter(self, x: Tensor) -> Tensor:
        """A transcoder: keep what its latents and its rest read, each a copy that can be edited."""
        pre = self.coder.pre_activation(at_least_float32(x))[..., list(self.chosen)]
        self._entered["pre"], self._entered["rest"] = self.pre(pre), self.rest_in(x)
        return self._entered["rest"]

    def _leave(self, y: Tensor) -> Tensor:
        pre, x = self._entered.pop("pre"), at_least_float32(self._entered.pop("rest"))
        own = self.coder.encode(x)[..., list(self.chosen)] @ self.part.W_dec[0]
        target = self.coder(x)[..., 0, :] if self.replaces else at_least_float32(y)
        return self._joined(self.latents(self._activated(pre, x)), target - own, y)

    def _activated(self, pre: Tensor, x: Tensor) -> Tensor:
        """Chosen latents from pre-activations of their own; which are the k largest is judged by all of ``x``."""
        if self.part.activation != "topk":
            return ACTIVATIONS[self.part.activation](self.part, pre)
        assert self.coder.k is not None
        every = self.coder.pre_activation(x).detach().relu()
        best = every.topk(min(self.coder.k + 1, self.coder.n_latents), -1).values
        # Halfway to the next one, so that rounding of a pre-activation does not decide.
        limit = best[..., -2:].mean(-1, keepdim=True) if self.coder.k < self.coder.n_latents else 0.0
        return pre.relu() * (pre > limit)

    def _joined(self, latents: Tensor, rest: Tensor, like: Tensor) -> Tensor:
        return (latents @ self.part.W_dec[0] + self.rest(rest)).to(like.dtype)


class SplicedModel(Model):
    """A model with dictionaries in it; made by `splice`."""

    splices: tuple[Splice, ...] = ()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode, frozen parameters and the dictionaries inside; as found afterwards."""
        if self._is_quiet:
            yield
            return
        with super().quiet(), hooked([hook for one in self.splices for hook in one.hooks()]):
            try:
                yield
            finally:
                for one in self.splices:
                    one._entered.clear()


def splice(
    model: Model,
    dictionary: Dictionary,
    *,
    latents: Sequence[int] | None = None,
    tokens: Tokens | None = None,
    replace: bool = False,
    check: bool = True,
) -> SplicedModel:
    """The same module with one site written by a dictionary's latents and an error; splice again for further sites.

    Args:
        dictionary: an SAE of ``attn-out`` or ``mlp-out``, or a transcoder from ``mlp-in`` to ``mlp-out``.
        latents: which latents become nodes, counted from 0; all others are part of the error.
        tokens: instead of ``latents``: those that are active on these inputs (padding counts as well).
        replace: whether the dictionary's output replaces what was written; else the output is exactly the model's.
        check: whether to test the laws of the new wiring.

    Raises:
        OptionError: if the dictionary does not fit the model or its place, or no latent is chosen or active.
        UnsupportedModel: if the new wiring fails a law.

    >>> import circuitkit as ck
    >>> from circuitkit.dictionaries.base import Site
    >>> model = ck.load("stories260k")
    >>> coder = SparseCoder(64, 8, 64)
    >>> spliced = splice(model, Dictionary(coder, Site("mlp-out", 4), (Site("mlp-out", 4),)), latents=[2, 5])
    >>> spliced.graph.sources[-3:]
    ('m4.f2', 'm4.f5', 'm4.error')
    """
    if latents is not None and tokens is not None:
        raise OptionError("got latents and tokens, expected one of them: which latents, or inputs that choose them")
    place = place_of(model, dictionary)
    if tokens is not None:
        latents = active_latents(model, dictionary, tokens)
    chosen = _checked(range(dictionary.coder.n_latents) if latents is None else latents, dictionary)
    like = at_least_float32(next(model.module.parameters())[:0])
    coder = _twin(dictionary.coder, like)
    one = Splice(dictionary, chosen, place, replace, coder, _twin(coder, like, chosen))
    spliced = SplicedModel(
        model.module, _rewired(model.wiring, one), forward=model._forward, name=model.name, d_vocab=model.d_vocab,
        n_ctx=model.n_ctx, tokenizer=model.tokenizer, card=model.card,
    )  # fmt: skip
    spliced.causal = model.causal
    spliced.splices = (*getattr(model, "splices", ()), one)
    if check:
        spliced.check()
    return spliced


def active_latents(model: Model, dictionary: Dictionary, tokens: Tokens) -> list[int]:
    """Numbers of the latents that are above 0 anywhere on some inputs.

    Raises:
        OptionError: if the dictionary does not fit, or no latent is active.
    """
    active = (latent_activations(model, dictionary, tokens) > 0).flatten(0, 1).any(0).nonzero().flatten().tolist()
    if not active:
        raise OptionError(
            f"no latent of the dictionary at {dictionary.read} is active on these {len(tokens)} inputs; it may belong "
            "to another site or model, or be dead: look at its reconstruction first"
        )
    return active


@torch.no_grad()
def latent_activations(model: Model, dictionary: Dictionary, tokens: Tokens) -> Float[Tensor, "batch pos latent"]:
    """All latents of a dictionary on some inputs. Raises OptionError if the dictionary does not fit the model."""
    check_fits(dictionary, model)
    coder = _twin(dictionary.coder, at_least_float32(next(model.module.parameters())[:0]))
    return coder.encode(at_least_float32(activations(model, dictionary.read, tokens)))


def _checked(latents: Sequence[int] | range, dictionary: Dictionary) -> tuple[int, ...]:
    n = dictionary.coder.n_latents
    chosen = sorted(set(latents))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n:
        raise OptionError(f"got latents = {list(latents)[:8]}, expected at least one, each from 0 to {n - 1}")
    return tuple(chosen)


def _twin(coder: SparseCoder, like: Tensor, latents: Sequence[int] | None = None) -> SparseCoder:
    """The coder with frozen weights (shared where dtype and device agree), of all or of some latents."""
    twin = copy.copy(coder)
    index = slice(None) if latents is None else list(latents)
    axes = {"W_enc": 1, "W_dec": 1, "b_enc": 0, "threshold": 0, "r_mag": 0, "b_mag": 0}

    def frozen(name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None:
            return None
        data = value.detach().to(like)
        if name in axes:
            data = data[:, index] if axes[name] else data[index]
        return nn.Parameter(data, requires_grad=False)

    twin._parameters = {name: frozen(name, value) for name, value in coder._parameters.items()}
    twin.n_latents = coder.n_latents if latents is None else len(latents)
    twin.training = False
    return twin


def _rewired(wiring: Wiring, one: Splice) -> Wiring:
    """The wiring with the writers of a place, and a transcoder's reader, replaced by latents and error."""
    graph, place = wiring.graph, one.place
    rows, sources, writes = list[int](), list[Node](), list[WriteSite]()
    for write in wiring.write_sites:
        if write is not place.write:
            writes.append(replace(write, first=len(rows)))
            rows += range(write.first, write.rows.stop)
            sources += graph.source_nodes[write.rows]
            continue
        weight = one.part.W_dec.detach()[0][:, None]
        writes.append(WriteSite(len(rows), len(one.chosen), write.block, Port(one.latents), weight))
        writes.append(WriteSite(len(rows) + len(one.chosen), 1, write.block, Port(one.rest)))
        rows += [write.first] * (len(one.chosen) + 1)
        sources += _nodes(graph.source_nodes[write.first], one)
    columns, destinations, reads = list[int](), list[Node](), list[ReadSite]()
    for read in wiring.read_sites:
        if read is not place.read:
            reads.append(replace(read, first=len(columns)))
            columns += range(read.first, read.columns.stop)
            destinations += graph.destination_nodes[read.columns]
            continue
        reads += _read_sites(read, one, len(columns))
        columns += [read.first] * (len(one.chosen) + 1)
        destinations += _nodes(graph.destination_nodes[read.first], one)
    fed = graph.feeds[:, : place.write.rows.stop].clone()
    fed[:, place.write.rows] = fed[:, place.write.rows].any(1, keepdim=True)
    feeds = torch.cat([fed, graph.feeds[:, place.write.rows.stop :]], 1)[columns][:, rows]
    if place.read is not None:
        _feed_own(feeds, columns.index(place.read.first), rows.index(place.write.first), one)
    mask = graph.mask[rows][:, columns]
    return replace(
        wiring,
        graph=Graph(tuple(sources), tuple(destinations), mask, feeds),
        write_sites=tuple(writes),
        read_sites=tuple(reads),
        # What an MLP is made of says nothing of a transcoder's latents.
        mlps=tuple(parts for parts in wiring.mlps if place.read is None or parts.block != place.write.block),
    )


def _feed_own(feeds: Tensor, column: int, row: int, one: Splice) -> None:
    """What a latent reads feeds that latent; only among the k largest does the whole input matter to all."""
    n = len(one.chosen) + 1
    own = torch.eye(n, dtype=torch.bool)
    own[-1] |= one.coder.activation == "topk"
    feeds[column : column + n, row : row + n] = own


def _nodes(whole: Node, one: Splice) -> list[Node]:
    stem = stem_of(one.place.site)
    found = [Node(f"{stem}.f{i}", "latent", whole.layer, whole.stage, i) for i in one.chosen]
    return [*found, Node(f"{stem}.error", "error", whole.layer, whole.stage)]


def _read_sites(mlp: ReadSite, one: Splice, first: int) -> list[ReadSite]:
    weight, bias = one.part.W_enc.detach().T[:, :, None], one.part.b_enc.detach()[:, None]
    n = len(one.chosen)
    latents = replace(mlp, first=first, n=n, port=Port(one.pre), weight=weight, bias=bias)
    return [latents, replace(mlp, first=first + n, port=Port(one.rest_in))]
