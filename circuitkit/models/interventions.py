"""Interventions: what some writers write is set, scaled or added to at chosen positions, and the model runs on.

    free          everything behind it is computed anew
    frozen        attention patterns and the scales of all norms stay those of the untouched run on the same tokens
    constrained   frozen; and in the given layers MLPs, neurons, latents and errors write what they wrote in that run

Constrained in all layers, only attention's values and the stream carry the change on: logits, and whatever readers make
of the stream before their nonlinearity, change by a linear function of it, the direct effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import GraphError, OptionError
from circuitkit.functional.norms import Norm, at_least_float32
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import Hook, hooked, keeper
from circuitkit.models.patterns import check_patterns
from circuitkit.models.wiring import Port, ReadSite, WriteSite
from circuitkit.shapes import Tokens

Positions = int | slice | Sequence[int] | None
HOW = {
    "set": lambda old, value: value.expand_as(old),
    "scale": lambda old, value: old * value,
    "add": lambda old, value: old + value,
}


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change of what one writer writes.

    Args:
        node: a writer's name: ``m2.f17`` (of a spliced model), ``m2``, ``a1.h3``, ``input``.
        value: a number, or a tensor that fits ``[batch, pos, width]``. A latent has width 1; a head's value is its
            ``z``, before the output map; all others write vectors of the stream.
        how: ``set``, ``scale`` or ``add``.
        positions: None for all, a position, several, or a slice; negative ones count from the end. A slice with an open
            end goes on over tokens that are generated.

    Raises:
        OptionError: for an unknown ``how``, or a value that is not finite.
    """

    node: str
    value: float | Tensor
    how: str = "set"
    positions: Positions = None

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise OptionError(f"got how = {self.how!r}, expected one of {', '.join(HOW)}")
        known = self.positions is None or isinstance(self.positions, int | slice | Sequence)
        if not known or isinstance(self.positions, str | bool):
            raise OptionError(f"got positions = {self.positions!r}, expected None, a whole number, several, or a slice")
        if not torch.as_tensor(self.value).isfinite().all():
            raise OptionError(f"got a value for {self.node} that is NaN or infinite; expected finite numbers")


@dataclass(frozen=True, eq=False)
class Intervened:
    """A run under interventions.

    Args:
        model: which ran.
        logits: at every position.
        writes: what each write site held, interventions included.
        reads: what each site's readers made of the stream.
    """

    model: Model
    logits: Float[Tensor, "batch pos vocab"]
    writes: Mapping[WriteSite, Tensor]
    reads: Mapping[ReadSite, Tensor]

    def written(self, node: str) -> Float[Tensor, "batch pos width"]:
        """What a writer's site held for it: a latent's activation, a head's z. Raises GraphError for no writer."""
        site, i = _site_of(self.model, node)
        y = self.writes[site]
        return y.reshape(*y.shape[:2], site.n, -1)[:, :, i]

    def read(self, node: str) -> Float[Tensor, "batch pos width"]:
        """What a reader made of the stream: a latent's pre-activation, a query. Raises GraphError for no reader."""
        names = self.model.graph.destinations
        if node not in names:
            raise GraphError(f"no reader {node!r} in {self.model.name}; readers are {', '.join(names[:8])}, ...")
        column = names.index(node)
        site = next(s for s in self.model.wiring.read_sites if s.first <= column < s.columns.stop)
        y = self.reads[site]
        return y.reshape(*y.shape[:2], site.n, -1)[:, :, column - site.first]


def intervene(
    model: Model,
    interventions: Sequence[Intervention],
    tokens: Tokens,
    *,
    frozen: bool = False,
    constrained: Sequence[int] = (),
) -> Intervened:
    """Run a model under interventions.

    Args:
        frozen: hold attention patterns and norm scales.
        constrained: layers in which everything but attention heads keeps what it wrote; implies ``frozen``.

    Raises:
        GraphError: for a node that is no writer of the model.
        OptionError: for a position or layer that is not there, or a model in which these cannot be held.

    >>> import circuitkit as ck
    >>> model = ck.load("induction/trained")
    >>> tokens = torch.tensor([[0, 1, 2, 1]])
    >>> cut = intervene(model, [Intervention("a1.h0", 0.0)], tokens)
    >>> bool((cut.written("a1.h0") == 0).all())
    True
    """
    for one in interventions:
        _check_positions(one, tokens.shape[1])
    layers = range(len(model.wiring.blocks))
    if any(layer not in layers for layer in constrained):
        raise OptionError(f"got constrained = {list(constrained)}, expected layers from 0 to {len(layers) - 1}")
    norms, held = _holding(model, tokens, constrained) if frozen or constrained else ([], [])
    wiring = model.wiring
    writes: dict[WriteSite, Tensor] = {}
    reads: dict[ReadSite, Tensor] = {}
    watch: list[Hook] = [(site.port, keeper(writes, site)) for site in wiring.write_sites]
    watch += [(site.port, keeper(reads, site)) for site in wiring.read_sites]
    # A norm behind a writer is held before a dictionary there, attached by `quiet`, sees what it gives.
    with torch.no_grad(), hooked(norms), model.quiet(), hooked([*held, *_edits(model, interventions), *watch]):
        logits = _logits(model, tokens)
    return Intervened(model, logits, writes, reads)


@contextmanager
def intervening(model: Model, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Inside, every run of the user's module is under the interventions, free downstream; as found afterwards."""
    with model.quiet(), hooked(_edits(model, interventions)):
        yield


def generate(
    model: Model,
    tokens: Tokens,
    n: int,
    interventions: Sequence[Intervention] = (),
    *,
    frozen: bool = False,
    constrained: Sequence[int] = (),
) -> Tokens:
    """Inputs with ``n`` tokens more, each the likeliest, under interventions; every step runs the whole input again.

    Positions that do not exist yet are left alone until they do.

    Raises:
        OptionError: if the input would grow longer than the model reads; as `intervene` besides.
    """
    if tokens.shape[1] + n > model.n_ctx:
        raise OptionError(f"got {tokens.shape[1]} tokens and n = {n}, and {model.name} reads at most {model.n_ctx}")
    for _ in range(n):
        there = [one for one in interventions if _exists(one.positions, tokens.shape[1])]
        run = intervene(model, there, tokens, frozen=frozen, constrained=constrained)
        tokens = torch.cat([tokens, run.logits[:, -1].argmax(-1, keepdim=True).to(tokens)], 1)
    return tokens


def _logits(model: Model, tokens: Tokens) -> Float[Tensor, "batch pos vocab"]:
    out = model.module(tokens.to(model.device))
    return at_least_float32(out if isinstance(out, Tensor) else out.logits)


def _site_of(model: Model, node: str) -> tuple[WriteSite, int]:
    """A writer's site and its number there. Raises GraphError for no writer."""
    names = model.graph.sources
    if node not in names:
        raise GraphError(
            f"no writer {node!r} in {model.name}; writers are {', '.join(names[:8])}, ... Latents are writers of a "
            "model that they are spliced into"
        )
    row = names.index(node)
    site = next(s for s in model.wiring.write_sites if s.first <= row < s.rows.stop)
    return site, row - site.first


def _exists(positions: Positions, length: int) -> bool:
    if positions is None or isinstance(positions, slice):
        return True
    several = [positions] if isinstance(positions, int) else positions
    return all(-length <= p < length for p in several)


def _check_positions(one: Intervention, length: int) -> None:
    if not _exists(one.positions, length):
        raise OptionError(f"got positions = {one.positions} for {one.node}, and the input has {length} tokens")


def _edits(model: Model, interventions: Sequence[Intervention]) -> list[Hook]:
    """One hook per site that something is done to, in the order given."""
    by_site: dict[WriteSite, list[tuple[int, Intervention]]] = {}
    for one in interventions:
        site, i = _site_of(model, one.node)
        by_site.setdefault(site, []).append((i, one))
    return [(site.port, partial(_edited, site, changes)) for site, changes in by_site.items()]


def _edited(site: WriteSite, changes: list[tuple[int, Intervention]], y: Tensor) -> Tensor:
    nodes = y.reshape(*y.shape[:2], site.n, -1).clone()
    for i, one in changes:
        several = [one.positions] if isinstance(one.positions, int) else one.positions
        at = torch.arange(y.shape[1])[slice(None) if several is None else several].to(y.device)
        old = nodes[:, at, i]
        nodes[:, at, i] = HOW[one.how](old, torch.as_tensor(one.value, dtype=old.dtype, device=old.device))
    return nodes.reshape(y.shape)


def _holding(model: Model, tokens: Tokens, constrained: Sequence[int]) -> tuple[list[Hook], list[Hook]]:
    """Hooks that hold norms between reading and writing, and patterns, readers' norms and constrained writers.

    What is held is taken from an untouched run on the same tokens.
    """
    wiring, nodes = model.wiring, model.graph.source_nodes
    heads = any(node.kind == "head" for node in nodes) or any(s.slot for s in model.graph.destination_nodes)
    if heads and len(wiring.patterns) < len(wiring.blocks):
        raise OptionError(f"the attention patterns of {model.name} cannot be reached, so they cannot be held")
    if model._is_quiet and wiring.inner_norms:
        raise OptionError(f"the norms of {model.name} cannot be held from inside model.quiet(); call intervene outside")
    known = [*wiring.inner_norms, *([] if wiring.normed is None else [(wiring.final_norm, wiring.normed)])]
    outer = [port for _, port in known]
    # Inside a bridge's norm, where its writers are found too, the last port is this.
    known = [(norm, Port(getattr(port.module, "hook_out", port.module))) for norm, port in known]
    seen: dict[Port, Tensor] = {}
    reads = [site for site in wiring.read_sites if site.norm is not None]
    held = [s for s in wiring.write_sites if s.block in constrained and nodes[s.first].kind != "head"]
    inputs = [Port(port.module, "in") for port in outer]
    ports = {*wiring.patterns, *(s.stream for s in reads), *(s.port for s in held), *(port for _, port in known)}
    with torch.no_grad(), model.quiet(), hooked([(port, keeper(seen, port)) for port in [*ports, *inputs]]):
        _logits(model, tokens)
    check_patterns(model)
    now: dict[Port, Tensor] = {}
    norms = list[Hook]()
    hooks: list[Hook] = [(port, partial(_same, seen[port])) for port in wiring.patterns]
    for site in reads:
        assert site.norm is not None
        hooks += [(site.stream, keeper(now, site.stream))]
        hooks += [(site.port, partial(_read_held, site, site.norm.statistics(seen[site.stream])[1], now))]
    for (norm, port), into in zip(known, inputs, strict=True):
        if norm is None:
            if torch.equal(seen[into], seen[port]):  # a model without a norm has an identity in its place
                continue
            raise OptionError(f"a norm of {model.name} is of no known form, so its scale cannot be held")
        norms += [
            (into, keeper(now, into)),
            (port, partial(_norm_held, norm, norm.statistics(seen[into])[1], now, into)),
        ]
    return norms, [*hooks, *((site.port, partial(_same, seen[site.port])) for site in held)]


def _same(value: Tensor, _now: Tensor) -> Tensor:
    return value


def _held(norm: Norm, inverse_sigma: Tensor, x: Tensor) -> Tensor:
    y = norm.part(at_least_float32(x) * inverse_sigma)
    return y if norm.bias is None else y + norm.bias.to(y.dtype)


def _norm_held(norm: Norm, inverse_sigma: Tensor, now: dict[Port, Tensor], into: Port, y: Tensor) -> Tensor:
    return _held(norm, inverse_sigma, now[into]).to(y.dtype)


def _read_held(site: ReadSite, inverse_sigma: Tensor, now: dict[Port, Tensor], y: Tensor) -> Tensor:
    assert site.norm is not None
    normed = _held(site.norm, inverse_sigma, now[site.stream])
    if site.weight is not None:
        normed = torch.einsum("bpd,ndw->bpnw", normed, site.weight.to(normed.dtype))
        normed = normed if site.bias is None else normed + site.bias.to(normed.dtype)
    return normed.reshape(y.shape).to(y.dtype)
