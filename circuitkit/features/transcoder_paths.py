"""One step of a path search: what a vector that reads the stream at one position is made of, and where it came from.

    v . x[p]  =  sum of   z_i (W_dec[i] . v)                       latents of lower layers at p
                        + A_h[p, q] (norm(x_q) W_V^h) W_O^h . v    heads of lower layers, from each q
                        + tokens, positions, errors, biases at p   exactly; also W_skip of skip transcoders

A step taken to a source leaves a new vector, which reads a lower stream and whose parts are those of the source:

    latent i    (W_dec[i] . v) W_enc[:, i] c                       read by its transcoder at p
    head h, q   A_h[p, q] W_V^h W_O^h v c                          read by the head at q

where c is the norm before that part: its gain, centring and the run's own 1 / sigma. Constants (of encoders, norms,
value maps) go to the bias of the vector that they were read by, so a head's hop has no bias of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Site
from circuitkit.errors import UnsupportedModel
from circuitkit.features.explore import TOLERANCE
from circuitkit.features.frozen import FrozenAttention, FrozenNorm
from circuitkit.features.graph import FeatureNode
from circuitkit.features.local import Component, LocalModel, Nodes, Reads, Stage, same_site
from circuitkit.features.sweep import contract_points

ENDS = {"token": "input", "position": "position"}  # kinds that nothing lies below, and their names


@dataclass(frozen=True)
class Hop:
    """A source that a path steps to.

    Args:
        node: a latent, token or position, or a ``unit``: head h from position q to p is ``a2.h3@7<-4``, the linear
            part of a skip transcoder ``m2.skip@7``.
        source: the position that is read next: q of a head, the node's own otherwise.
    """

    node: FeatureNode
    source: int

    @property
    def ends(self) -> bool:
        """Whether nothing lies below."""
        return self.node.kind in ENDS


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors that read the stream, each at its own height and position.

    Args:
        steps: how many steps of the local model lie below each.
        positions: where each reads.
        vectors: what is multiplied with the stream there.
        constants: what is added: a bias.
        totals: what product and constant come to in the run.
    """

    steps: Int[Tensor, " row"]
    positions: Int[Tensor, " row"]
    vectors: Float[Tensor, "row d"]
    constants: Float[Tensor, " row"]
    totals: Float[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.steps)

    @classmethod
    def cat(cls, parts: Sequence[Vectors]) -> Vectors:
        """Several groups as one."""
        fields = zip(*((p.steps, p.positions, p.vectors, p.constants, p.totals) for p in parts), strict=True)
        return cls(*(torch.cat(part) for part in fields))


@dataclass(frozen=True, eq=False)
class Parts:
    """What each of some vectors is made of; all of it, with the constants, adds up to the totals.

    Args:
        sources: by the local model's column: latents, tokens, positions, errors, biases.
        heads: by layer, head and position that the head reads.
        skips: by layer, through the linear part of its skip transcoder.
        constants: of the vectors themselves.
    """

    sources: Float[Tensor, "row source"]
    heads: Float[Tensor, "row layer head pos"]
    skips: Float[Tensor, "row layer"]
    constants: Float[Tensor, " row"]

    @cached_property
    def flat(self) -> Float[Tensor, "row choice"]:
        """Sources, heads, skips and the constant in one row."""
        return torch.cat((self.sources, self.heads.flatten(1), self.skips, self.constants[:, None]), 1)


class PathSteps:
    """The steps of one local replacement model."""

    def __init__(self, local: LocalModel) -> None:
        self.local = local
        self.at: dict[Site, int] = {}
        self.components: dict[Site, Component] = {}
        for number, step in enumerate(local.steps):
            for component in () if isinstance(step, Stage) else step:
                self.at[component[0].site], self.components[component[0].site] = number, component
        attention = [c[0].before for c in self.components.values() if isinstance(c[0].before, FrozenAttention)]
        self.n_heads = max((len(mix.pattern) for mix in attention), default=0)
        self.n_layers, self.n = local.final.layer, len(local.tokens)
        kinds = torch.cat([torch.full((len(g),), g.kind in (*ENDS, "latent")) for g in local.nodes])
        others = kinds.new_ones(self.n_layers * self.n_heads * self.n + self.n_layers)
        # Which entries of `Parts.flat` a path may step to.
        self.choices = torch.cat((kinds, others, kinds.new_zeros(1))).to(local.tokens.device)
        # The activation of each latent among them, which no contribution through it is to exceed under a cap.
        self.bounds = torch.full_like(self.choices, torch.inf, dtype=local.values[local.final].dtype)
        for nodes in local.nodes:
            if nodes.kind == "latent":
                self.bounds[nodes.first : nodes.first + len(nodes)] = nodes.values

    # ------------------------------------------------------------------------------------------- what a vector reads

    @torch.no_grad()
    def start(self, reads: Reads) -> Vectors:
        """A target as vectors on the stream: of logits or any direction of the stream, or of what an MLP reads."""
        site = same_site(reads.site)
        if site.kind == "resid-pre":
            # Components that stand between two streams count as steps; so does the stage of the stream itself.
            step = next(i for i, s in enumerate(self.local.steps) if isinstance(s, Stage) and s.site == site) + 1
            return Vectors(
                torch.full_like(reads.positions, step), reads.positions, reads.vectors, reads.constants, reads.values
            )
        norm = self.components[site][0].before
        assert isinstance(norm, FrozenNorm)
        offset = norm.bias(self.local.values[site])[reads.positions]
        return Vectors(
            torch.full_like(reads.positions, self.at[site]), reads.positions,
            norm.pull_points(reads.vectors, reads.positions),
            reads.constants + (offset * reads.vectors).sum(1), reads.values,
        )  # fmt: skip

    @torch.no_grad()
    def parts(self, rows: Vectors) -> Parts:
        """What vectors are made of.

        Raises:
            UnsupportedModel: if the parts of one do not add up to its total.
        """
        like, n = rows.vectors, len(rows)
        found = Parts(
            like.new_zeros(n, self.local.n_sources),
            like.new_zeros(n, self.n_layers, self.n_heads, self.n),
            like.new_zeros(n, self.n_layers),
            rows.constants,
        )
        for number, step in enumerate(self.local.steps):
            above = (rows.steps > number).nonzero().flatten()
            if not len(above):
                break
            v, at = rows.vectors[above], rows.positions[above]
            here = like.new_zeros(len(above), self.local.n_sources)
            for component in ((step,),) if isinstance(step, Stage) else step:
                contract_points(component[-1].inner, v, at, here)
                if component[-1].before is None:
                    continue
                layer, behind = component[0].site.layer, component[-1].before.pull_points(v, at, self.n)
                contract_points(component[0].inner, behind, at, here)
                if isinstance(component[0].before, FrozenAttention):
                    found.heads[above, layer] = self._by_head(component, behind, at)
                else:
                    found.skips[above, layer] = (self._normed(component)[at] * behind).sum(1)
            found.sources[above] += here
        self._check(rows, found)
        return found

    def _by_head(self, component: Component, behind: Tensor, at: Tensor) -> Float[Tensor, "row head pos"]:
        mix = component[0].before
        assert isinstance(mix, FrozenAttention)
        x = self.local.values[Site("resid-pre", component[0].site.layer)]
        values = torch.einsum("pd,kde->kpe", mix.norm.push(x[None])[0], mix.value)
        values = values.repeat_interleave(len(mix.pattern) // len(values), 0)
        reached = torch.einsum("rhe,hqe->rhq", behind.unflatten(1, (len(mix.pattern), -1)), values)
        return reached * mix.pattern[:, at].transpose(0, 1)

    def _normed(self, component: Component) -> Float[Tensor, "pos d"]:
        """What an MLP reads, without the norm's own offset."""
        norm, value = component[0].before, self.local.values[component[0].site]
        assert isinstance(norm, FrozenNorm)
        return value - norm.bias(value)

    def _check(self, rows: Vectors, found: Parts) -> None:
        sums, totals = found.flat.double().sum(1), rows.totals.double()
        largest = torch.maximum(totals.abs(), found.flat.abs().amax(1).double())
        gap = (sums - totals).abs() / largest.clamp(min=1e-30)
        if len(gap) and not float(gap.max()) <= TOLERANCE:
            worst = int(gap.argmax())
            raise UnsupportedModel(
                f"what a path reads at position {int(rows.positions[worst])} adds up to {float(sums[worst]):.6g}, and "
                f"it comes to {float(totals[worst]):.6g}: relative gap {float(gap[worst]):.1e}, expected at most "
                f"{TOLERANCE:.0e}; load the model in float32 or float64"
            )

    # ------------------------------------------------------------------------------------------------ where it leads

    def hop(self, choice: int, position: int) -> Hop:
        """The source of one choice, as seen from a position."""
        if choice < self.local.n_sources:
            return self._source(choice)
        site, head, source = self._place(choice)
        if site.kind == "mlp-in":
            name = f"m{site.layer}.skip@{position}"
            return Hop(self._node(name, "unit", site, position, None, 1.0, site), position)
        name, out = f"a{site.layer}.h{head}@{position}<-{source}", Site("attn-out", site.layer)
        return Hop(self._node(name, "unit", out, position, head, 1.0, site), source)

    def _place(self, choice: int) -> tuple[Site, int, int]:
        """What a choice beyond the sources leads through: a skip's site, or a head's with its number and source."""
        place, source = divmod(choice - self.local.n_sources, self.n)
        if place < self.n_layers * self.n_heads:
            layer, head = divmod(place, self.n_heads)
            return Site("z", layer), head, source
        return Site("mlp-in", choice - self.local.n_sources - self.n_layers * self.n_heads * self.n), -1, -1

    def _source(self, choice: int) -> Hop:
        nodes = next(g for g in self.local.nodes if g.first <= choice < g.first + len(g))
        number = choice - nodes.first
        position, index, value = (int(nodes.positions[number]), int(nodes.index[number]), float(nodes.values[number]))
        stem = f"m{nodes.site.layer}.f{index}" if nodes.kind == "latent" else ENDS[nodes.kind]
        below = nodes.site if nodes.kind == "latent" else None
        node = self._node(f"{stem}@{position}", nodes.kind, nodes.site, position, index, value, below)
        return Hop(node, position)

    def _node(
        self, name: str, kind: str, site: Site, position: int, index: int | None, value: float, read: Site | None
    ) -> FeatureNode:
        stage = 0 if read is None else 1 + self.local.ranks[read]
        layer = -1 if kind in ENDS else site.layer
        number = None if index is None or index < 0 else index
        return FeatureNode(name, kind, layer, str(site), position, number, value, stage)

    @torch.no_grad()
    def follow(self, rows: Vectors, row: int, choice: int, contribution: Tensor) -> Vectors:
        """The vector that a step to a latent, a head or a skip leaves.

        Args:
            rows: the vectors that were taken apart.
            row: which of them.
            choice: column of its `Parts.flat`.
            contribution: what is there.
        """
        v, at = rows.vectors[row : row + 1], rows.positions[row : row + 1]
        if choice < self.local.n_sources:
            return self._to_latent(choice, contribution)
        site, head, source = self._place(choice)
        first, last = self.components[site]
        assert first.before is not None and last.before is not None
        behind = last.before.pull_points(v, at, self.n)
        if isinstance(first.before, FrozenAttention):
            mix, to = first.before, torch.full_like(at, source)
            value = mix.value[head * len(mix.value) // len(mix.pattern)]
            read = behind.unflatten(1, (len(mix.pattern), -1))[:, head] @ value.T
            left = mix.norm.pull_points(mix.pattern[head, at, source][:, None] * read, to)
        else:
            to, left = at, first.before.pull_points(behind, at, self.n)
        return Vectors(torch.full_like(at, self.at[site]), to, left, v.new_zeros(1), contribution[None])

    def _to_latent(self, choice: int, contribution: Tensor) -> Vectors:
        active = next(a for a in self.local.active if a.nodes.first <= choice < a.nodes.first + len(a.nodes))
        number = torch.tensor([choice - active.nodes.first], device=contribution.device)
        scale = contribution / active.nodes.values[number]
        one = self.start(active.reads.take(number))
        return Vectors(one.steps, one.positions, one.vectors * scale, one.constants * scale, one.totals * scale)


def columns_of(nodes: Sequence[Nodes], kind: str) -> Int[Tensor, " source"]:
    """The columns of one kind of sources."""
    parts = [torch.arange(g.first, g.first + len(g), device=g.positions.device) for g in nodes if g.kind == kind]
    return torch.cat(parts)
