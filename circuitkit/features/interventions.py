"""Interventions on nodes of attribution graphs, whatever their dictionaries: what they write is set, scaled, added to.

The prompt runs through its local replacement model (`circuitkit.features.running`), many interventions side by side.
Unlike a spliced model, this takes every dictionary that an attribution graph takes: cross-layer transcoders, SAEs of
the stream and of heads' z too. Errors are held at the clean run's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.errors import GraphError, OptionError
from circuitkit.features.attribution import STEMS
from circuitkit.features.local import LocalModel, Nodes, owner, same_site
from circuitkit.features.passing import Passed
from circuitkit.features.places import attention_sites
from circuitkit.features.replace import local_model
from circuitkit.features.running import MODES, Running
from circuitkit.models.hooked import Model
from circuitkit.models.interventions import HOW, Positions

BUDGET = 2**29  # bytes of the runs that go side by side, where none are given
LATENT = re.compile(r"(?P<place>.+)\.f(?P<index>\d+)")
COMPONENT = re.compile(r"(?P<letter>[am])(?P<layer>\d+)(\.h(?P<head>\d+))?")


@dataclass(frozen=True, eq=False)
class FeatureIntervention:
    """One change of what one node writes.

    Args:
        node: as in a `FeatureGraph`: ``m3.f17@5``, ``a1.error@2``, ``input@0``, ``m2.bias``; or a component: ``m2``,
            ``a1``, ``a1.h3``. Without ``@5`` it is all positions, or those in ``positions``.
        value: of a latent: its activation. Of tokens, positions, errors and biases: a factor, 1 in the clean run. Of a
            component: a number or a vector as wide as what it writes (of a head: its z).
        how: ``set``, ``scale`` or ``add``.
        positions: None for all, a position, several, or a slice; negative ones count from the end.

    Raises:
        OptionError: for an unknown ``how``, positions given twice, or a value that is not finite.
    """

    node: str
    value: float | Tensor
    how: str = "set"
    positions: Positions = None

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise OptionError(f"got how = {self.how!r}, expected one of {', '.join(HOW)}")
        if not torch.as_tensor(self.value).isfinite().all():
            raise OptionError(f"got a value for {self.node} that is NaN or infinite; expected finite numbers")
        if "@" in self.node and self.positions is not None:
            raise OptionError(f"got positions = {self.positions} and a node {self.node!r} that names its own")


@dataclass(frozen=True, eq=False)
class FeatureRun:
    """What came of some interventions, one row for each.

    Args:
        logits: at every position.
        reads: what each dictionary read, by its site.
        latents: of each dictionary, interventions included.
        running: what ran.
    """

    logits: Float[Tensor, "row pos vocab"]
    reads: Mapping[Site, Float[Tensor, "row pos _"]]
    latents: Mapping[Site, Float[Tensor, "row pos latent"]]
    running: Running

    def activation(self, node: str) -> Float[Tensor, " *row"]:
        """A latent's activation, ``[row]`` for ``m3.f17@5`` and ``[row, pos]`` for ``m3.f17``."""
        site, index, at = latent_of(self.running.local, node)
        return self.latents[site][:, at, index]

    def pre_activation(self, node: str) -> Float[Tensor, " *row"]:
        """What a latent's nonlinearity is applied to (of a gated coder: the gate), shaped as ``activation``."""
        site, index, at = latent_of(self.running.local, node)
        return self.running.coders[site].pre_activation(self.reads[site][:, at])[..., index]


@torch.no_grad()
def intervene(
    model: Model,
    dictionaries: Sequence[Dictionary],
    tokens: Int[Tensor, " pos"],
    interventions: Sequence[Sequence[FeatureIntervention]],
    *,
    mode: str = "free",
    held: Collection[int] | None = None,
    budget: int | str | None = None,
) -> FeatureRun:
    """Run one prompt under interventions; each entry of ``interventions`` is one run, an empty one changes nothing.

    Args:
        model: the model itself, nothing spliced into it.
        dictionaries: as for an attribution graph.
        tokens: the prompt.
        interventions: for each run, what is changed, in this order.
        mode: ``free``: everything behind is computed anew; ``frozen``: but attention patterns and norm scales are those
            of the clean run; ``constrained``: and in the held layers latents and MLPs stay what they were.
        held: layers, for ``constrained``; all of them if None.
        budget: memory of runs side by side, in bytes or as text such as ``"4GiB"``; 512 MiB if None.

    Raises:
        GraphError: for a node that is not there.
        OptionError: for a position, layer or mode that is not there, or a bias where anything is computed anew.

    >>> from circuitkit.testing import tiny_model
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> coder = SparseCoder(8, 16, 8).double()
    >>> _ = [torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0)) for p in coder.parameters()]
    >>> transcoder = Dictionary(coder, Site("mlp-in", 0), (Site("mlp-out", 0),))
    >>> run = intervene(tiny_model(), [transcoder], torch.arange(5), [[], [FeatureIntervention("m0.f3@2", 4.0)]])
    >>> run.logits.shape[:2], run.activation("m0.f3@2")[1].item()
    (torch.Size([2, 5]), 4.0)
    """
    from circuitkit.methods.plan import parse_bytes

    if not interventions:
        raise OptionError("got no interventions, expected a list for each run; an empty one for the clean run")
    running = Running(model, local_model(model, dictionaries, tokens))
    everywhere = torch.arange(len(tokens), device=model.device)
    parts = list(passes(running, interventions, mode, held=held, budget=parse_bytes(budget)))
    clean = (running.own if mode == "free" else running.clean).values
    return FeatureRun(
        torch.cat([running.logits(part.stream, everywhere, mode) for part in parts]),
        {site: clean[site] + torch.cat([part.changes[site] for part in parts]) for site in running.coders},
        {site: torch.cat([part.latents[site] for part in parts]) for site in running.coders},
        running,
    )


def passes(
    running: Running,
    interventions: Sequence[Sequence[FeatureIntervention]],
    mode: str,
    *,
    held: Collection[int] | None = None,
    watch: Collection[Site] = (),
    budget: int | None = None,
) -> Iterator[Passed]:
    """Runs under interventions, as many side by side as fit the budget."""
    if mode not in MODES:
        raise OptionError(f"got mode = {mode!r}, expected one of {', '.join(MODES)}")
    n = len(running.model.wiring.blocks)
    if held is not None and (mode != "constrained" or not set(held) <= set(range(n))):
        raise OptionError(f"got held = {sorted(held)} in mode {mode!r}; expected layers from 0 to {n - 1}, constrained")
    layers = set(range(n)) if mode == "constrained" and held is None else set(held or ())
    at_once = max(1, (budget or BUDGET) // running.bytes_per_row(mode))
    for start in range(0, len(interventions), at_once):
        changes = Listed.of(running, interventions[start : start + at_once])
        if changes.biases and len(layers) < n:
            raise OptionError(f"got a change of {changes.biases}; biases can be changed only with all layers held")
        yield running.run(changes, mode, held=layers, watch=watch)


@dataclass(frozen=True, eq=False)
class _Change:
    """What happens to some entries of one run's tensor."""

    row: int
    at: Int[Tensor, " some"]
    where: int | slice
    one: FeatureIntervention

    def __call__(self, y: Tensor) -> None:
        old = y[self.row, self.at, self.where]
        y[self.row, self.at, self.where] = HOW[self.one.how](
            old, torch.as_tensor(self.one.value, dtype=old.dtype, device=old.device)
        )


@dataclass(frozen=True, eq=False)
class Listed:
    """Interventions on single nodes, as `circuitkit.features.running.Changes`."""

    rows: int
    factors: Float[Tensor, "row source"] | None
    by_site: Mapping[Site, list[_Change]] = field(default_factory=dict)
    by_tensor: Mapping[Site, list[_Change]] = field(default_factory=dict)
    biases: str = ""

    @classmethod
    def of(cls, running: Running, interventions: Sequence[Sequence[FeatureIntervention]]) -> Listed:
        """Names looked up. Raises GraphError and OptionError for those that are not there."""
        local = running.local
        latents: dict[Site, list[_Change]] = {}
        tensors: dict[Site, list[_Change]] = {}
        like = local.values[local.final]
        factors, biases = like.new_ones(len(interventions), local.n_sources), ""
        leaves = _leaves(local)
        for row, several in enumerate(interventions):
            for one in several:
                stem, at = _split(one, len(local.tokens), like.device)
                if stem in leaves:
                    nodes = leaves[stem]
                    columns = nodes.first + (at * 0 if nodes.kind == "bias" else at)
                    biases = stem if nodes.kind == "bias" else biases
                    _Change(row, columns.unique(), slice(None), one)(factors[..., None])
                elif COMPONENT.fullmatch(stem):
                    site, where = _component(running.model, stem)
                    tensors.setdefault(site, []).append(_Change(row, at, where, one))
                else:
                    site, index, _ = latent_of(local, stem)
                    latents.setdefault(site, []).append(_Change(row, at, index, one))
        changed = bool((factors != 1).any())
        return cls(len(interventions), factors - 1 if changed else None, latents, tensors, biases)

    def latents(self, site: Site, f: Float[Tensor, "row pos latent"]) -> Float[Tensor, "row pos latent"]:
        """The latents of the dictionary that reads a site, changed."""
        return _changed(self.by_site.get(site, []), f)

    def tensor(self, site: Site, y: Float[Tensor, "row pos _"]) -> Float[Tensor, "row pos _"]:
        """What components write at a site, changed."""
        return _changed(self.by_tensor.get(site, []), y)

    def tensors(self) -> Collection[Site]:
        """The sites where components are changed."""
        return self.by_tensor.keys()


def _changed(changes: Sequence[_Change], y: Tensor) -> Tensor:
    if changes:
        y = y.clone()
        for change in changes:
            change(y)
    return y


def _split(one: FeatureIntervention, length: int, device: torch.device) -> tuple[str, Int[Tensor, " some"]]:
    """A node's name without its position, and the positions."""
    stem, named, position = one.node.partition("@")
    if named and not position.isdigit():
        raise GraphError(f"no node {one.node!r}: behind @ there is no position")
    chosen = int(position) if named else one.positions
    several = [chosen] if isinstance(chosen, int) else chosen
    if not isinstance(several, slice | None) and any(not -length <= p < length for p in several):
        raise OptionError(f"got {one.node!r} at positions {several}, and the prompt has {length} tokens")
    return stem, torch.arange(length, device=device)[slice(None) if several is None else several]


def _leaves(local: LocalModel) -> dict[str, Nodes]:
    """Sources that are no latents, by their names without position."""
    found = {}
    for nodes in local.nodes:
        site = same_site(nodes.site)
        part = STEMS[owner(site).kind].format(site.layer).removesuffix(".out")
        name = STEMS[site.kind].format(site.layer)
        if nodes.kind == "error":
            found[f"{part if site.kind == 'mlp-out' else name}.error"] = nodes
        elif nodes.kind != "latent":
            found[{"token": "input", "bias": f"{part}.bias"}.get(nodes.kind, nodes.kind)] = nodes
    return found


def latent_of(local: LocalModel, node: str) -> tuple[Site, int, int | slice]:
    """The site that a latent's dictionary reads, its number and its position. Raises GraphError if it is not there."""
    stem, _, position = node.partition("@")
    match = LATENT.fullmatch(stem)
    places = {STEMS[site.kind].format(site.layer): a for a in local.active for site in [same_site(a.dictionary.read)]}
    active = places.get(match["place"]) if match else None
    if match is None or active is None:
        raise GraphError(f"no node {node!r}: latents are those of {', '.join(f'{p}.f0@0' for p in places)} and so on")
    if int(match["index"]) >= active.dictionary.coder.n_latents:
        raise GraphError(f"no latent {stem!r}: that dictionary has {active.dictionary.coder.n_latents}")
    if position and int(position) >= len(local.tokens):
        raise GraphError(f"no node {node!r}: the prompt has {len(local.tokens)} tokens")
    return same_site(active.dictionary.read), int(match["index"]), int(position) if position else slice(None)


def _component(model: Model, stem: str) -> tuple[Site, slice]:
    """Where a component writes, and which part of the tensor is its own. Raises GraphError if it is not there."""
    match = COMPONENT.fullmatch(stem)
    assert match is not None
    layer = int(match["layer"])
    heads = attention_sites(model.wiring, layer) if layer < len(model.wiring.blocks) else None
    kind = "mlp-out" if match["letter"] == "m" else "z" if match["head"] else "attn-out"
    head = int(match["head"] or 0)
    missing = kind != "mlp-out" and (heads is None or head >= heads[1].n)
    if layer >= len(model.wiring.blocks) or missing or (kind == "mlp-out" and match["head"]):
        raise GraphError(
            f"no component {stem!r} in {model.name}; its writers are {', '.join(model.graph.sources[:8])}, ..."
        )
    if kind != "z":
        return Site(kind, layer), slice(None)
    assert heads is not None and heads[1].weight is not None
    width = heads[1].weight.shape[1]
    return Site(kind, layer), slice(head * width, (head + 1) * width)
