"""Which heads an effect passes: every edge of an attribution graph split by the attention on its way.

    effect(s -> t) = direct + sum over heads h of only_h + remainder
    only_h(s -> t) = sum over positions written p of  A_h[p_t, p] * (d_s M W_V^h) . (W_O^h M' e_t)

``direct`` passes no head. ``only_h`` passes head h and no other: what s wrote at p, brought by M to the head's values,
and the target's vector pulled back by M' to what the head gathered; M and M' are the frozen maps that stay at one
position (the stream, norms, skip connections, frozen MLPs). ``remainder`` passes two heads or more. What a bias of
attention writes where it is gathered is direct.

Wrong as the graph is: patterns are held, so this says which heads carried an effect, not why they looked there (that
is `circuitkit.features.qk`). Cost: one pull and one push of single positions, and one product for each head.
Reference: Ameisen et al. 2025, "Circuit tracing" (transformer-circuits.pub), for the graphs; the split is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.errors import OptionError
from circuitkit.features.attribution import final_node, named
from circuitkit.features.contrast import Contrast, all_finals, plain
from circuitkit.features.explore import Table, column_stages
from circuitkit.features.frozen import FrozenAttention
from circuitkit.features.graph import FeatureGraph
from circuitkit.features.local import LocalModel, Reads, Stage, Writes
from circuitkit.features.replace import local_model
from circuitkit.features.targets import Final, Target, with_places
from circuitkit.features.texts import Text
from circuitkit.models.hooked import Model

if TYPE_CHECKING:
    import pandas

SAME = 1e-3  # relative, between an activation in the graph and in the model


@dataclass(frozen=True, eq=False)
class HeadLoadings:
    """Edges split by heads.

    Args:
        sources: name of each edge's source.
        targets: name of each edge's target.
        heads: names, ``a0.h3``.
        effects: of each edge, in the units of its target.
        direct: the part that passes no head.
        only: the part that passes one head and no other.
        remainder: the part that passes several.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    heads: tuple[str, ...]
    effects: Float[Tensor, " edge"]
    direct: Float[Tensor, " edge"]
    only: Float[Tensor, "edge head"]
    remainder: Float[Tensor, " edge"]

    def __len__(self) -> int:
        return len(self.sources)

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each edge, strongest first: source, target, effect, direct, every head, remainder."""
        import pandas

        columns = {"source": self.sources, "target": self.targets, "effect": self.effects.tolist()}
        parts = {"direct": self.direct.tolist()} | dict(zip(self.heads, self.only.T.tolist(), strict=True))
        frame = pandas.DataFrame(columns | parts | {"remainder": self.remainder.tolist()})
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def head_loadings(
    model: Model,
    dictionaries: Sequence[Dictionary],
    graph: FeatureGraph,
    *,
    targets: Sequence[Target | Contrast | str] | None = None,
    frozen_mlps: bool = False,
) -> HeadLoadings:
    """All edges of an attribution graph, split by the heads that they pass.

    Args:
        model: the model that the graph is of.
        dictionaries: those that it was made with.
        graph: the graph, or a part of it (`FeatureGraph.prune`).
        targets: as they were given when it was made.
        frozen_mlps: as it was given when it was made.

    Raises:
        OptionError: if the graph is not of this model, these dictionaries and these targets.

    >>> from circuitkit.features.attribution import attribution_graph
    >>> from circuitkit.testing import tiny_model
    >>> from circuitkit.dictionaries.base import Dictionary, Site
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> coder = SparseCoder(8, 16, 8).double().requires_grad_(False)
    >>> _ = [torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0)) for p in coder.parameters()]
    >>> transcoder = Dictionary(coder, Site("mlp-in", 0), (Site("mlp-out", 0),))
    >>> graph = attribution_graph(tiny_model(), [transcoder], torch.arange(5), targets=[3])
    >>> found = head_loadings(tiny_model(), [transcoder], graph, targets=[3])
    >>> found.heads, bool(torch.allclose(found.direct + found.only.sum(1) + found.remainder, found.effects))
    (('a0.h0', 'a0.h1', 'a1.h0', 'a1.h1'), True)
    """
    if graph.counts is not None:
        raise OptionError("got a graph merged from several prompts, which have no one pattern; take each prompt's own")
    wanted = Text.of(model, graph.tokens).targets(targets)
    local = with_places(local_model(model, dictionaries, graph.tokens, frozen_mlps=frozen_mlps), plain(wanted))
    finals = [final for final in all_finals(model, local, wanted) if final.kind != "latent"]
    number = _numbers(local, finals, graph)
    table = Table.of(local, [final.reads for final in finals])
    table = table.take(torch.isin(table.numbers, number[graph.targets]))
    rows, sources = graph.effects.nonzero(as_tuple=True)
    row_of = torch.full((local.n_sources + len(finals),), -1, device=rows.device)
    row_of[table.numbers] = torch.arange(len(table.numbers), device=rows.device)
    effects = graph.effects[rows, sources]
    direct, only = _Split(local, table, row_of[number[graph.targets[rows]]], number[sources]).parts()
    names = [node.name for node in graph.nodes]
    return HeadLoadings(
        tuple(names[i] for i in sources.tolist()), tuple(names[i] for i in graph.targets[rows].tolist()),
        _head_names(local), effects, direct, only, effects - direct - only.sum(1),
    )  # fmt: skip


def _numbers(local: LocalModel, finals: Sequence[Final], graph: FeatureGraph) -> Int[Tensor, " node"]:
    """Of every node of the graph: a source's column, or a target's number beyond all columns."""
    stages = column_stages(local).tolist()
    nodes = [node for group in local.nodes for node in named(group, stages)]
    nodes += [final_node(local, final, 0) for final in finals]
    known = {node.name: (i, node.value) for i, node in enumerate(nodes)}
    found = [known.get(node.name, (-1, 0.0)) for node in graph.nodes]
    for node, (number, value) in zip(graph.nodes, found, strict=True):
        if number < 0 or abs(node.value - value) > SAME * max(abs(value), abs(node.value)):
            raise OptionError(
                f"the graph has a node {node.name!r} of value {node.value:.6g} that this model with these dictionaries "
                "and targets does not have; pass what the graph was made with"
            )
    return torch.tensor([number for number, _ in found], device=graph.effects.device)


def _head_names(local: LocalModel) -> tuple[str, ...]:
    found = [(s.site.layer, len(s.before.pattern)) for s in local.stages() if isinstance(s.before, FrozenAttention)]
    return tuple(f"a{layer}.h{head}" for layer, n in found for head in range(n))


class _Split:
    """Targets' vectors pulled down and sources' pushed up, each at its own position; heads join the two.

    Pushed sources lie on a grid of rows and positions: a bias has a row of its own, for it writes at all positions;
    others share rows.
    """

    def __init__(
        self, local: LocalModel, table: Table, rows: Int[Tensor, " edge"], columns: Int[Tensor, " edge"]
    ) -> None:
        self.local, self.rows, self.positions = local, rows, table.positions
        self.groups, first = dict[Site, tuple[slice, Reads]](), 0
        for r in table.reads:
            self.groups[r.site] = slice(first, first + len(r)), r
            first += len(r)
        # Columns in use, and the place of each edge's among them.
        self.columns, self.edge_source = columns.unique(return_inverse=True)
        at = torch.cat([nodes.positions for nodes in local.nodes])[self.columns]
        self.is_bias, self.at = at < 0, at.clamp(min=0)
        order = at.argsort(stable=True)
        counts = at[order].unique_consecutive(return_counts=True)[1]
        rank = torch.cat([torch.arange(int(n), device=at.device) for n in counts])
        self.slot = torch.empty_like(at)
        self.slot[order] = rank
        self.slot += int(self.is_bias.sum()) * ~self.is_bias
        self.height = int(self.slot.max()) + 1 if len(at) else 0
        self.place = torch.full((local.n_sources,), -1, device=at.device)
        self.place[self.columns] = torch.arange(len(at), device=at.device)
        like = local.values[local.final]
        self.direct = like.new_zeros(len(rows))
        self.only: list[Tensor] = []

    def parts(self) -> tuple[Float[Tensor, " edge"], Float[Tensor, "edge head"]]:
        """The part of every edge without a head, and with one head."""
        self.gathered = self._pull()
        self._push()
        for rows, reads in self.groups.values():
            mine = (self.rows >= rows.start) & (self.rows < rows.stop)
            own = self.columns[self.edge_source] == self.local.bias_column(reads.site)
            edges = (mine & own).nonzero().flatten()
            self.direct[edges] += reads.constants[self.rows[edges] - rows.start]
        return self.direct, torch.cat(self.only, 1) if self.only else self.direct.new_zeros(len(self.rows), 0)

    def _pull(self) -> dict[Site, Float[Tensor, "target gathered"]]:
        """Targets' vectors at what heads gather in each layer, before any attention is passed."""
        found: dict[Site, Tensor] = {}
        g = self._blank(self.local.final)
        for step in reversed(self.local.steps):
            if isinstance(step, Stage):
                g = self._joined(step, g)
                continue
            added = []
            for component in step:
                h = g
                for i, stage in reversed(list(enumerate(component))):
                    h = self._joined(stage, h)
                    if isinstance(stage.before, FrozenAttention):
                        found[stage.site] = h
                    if stage.before is None or isinstance(stage.before, FrozenAttention):
                        h = self._blank(component[i - 1].site if i else self.local.final)
                    else:
                        h = stage.before.pull_points(h, self.positions, 0)
                added.append(h)
            g = g + torch.stack(added).sum(0)
        return found

    def _blank(self, site: Site) -> Float[Tensor, "target d"]:
        value = self.local.values[site]
        return value.new_zeros(len(self.positions), value.shape[1])

    def _joined(self, stage: Stage, g: Float[Tensor, "target d"]) -> Float[Tensor, "target d"]:
        g = torch.zeros_like(g) if stage.cut else g
        if stage.site in self.groups:
            rows, reads = self.groups[stage.site]
            g = g.clone()
            g[rows] += reads.vectors
        return g

    def _push(self) -> None:
        like = self.local.values[self.local.final]
        x = like.new_zeros(self.height, *like.shape)
        for step in self.local.steps:
            if isinstance(step, Stage):
                x = self._through(step, x)
                continue
            added = []
            for component in step:
                y = x
                for stage in component:
                    if isinstance(stage.before, FrozenAttention):
                        self._heads(stage.before, self.gathered[stage.site], y)
                    if stage.before is None or isinstance(stage.before, FrozenAttention):
                        y = y.new_zeros(*y.shape[:2], self.local.values[stage.site].shape[1])
                    else:
                        y = stage.before.push(y)
                    y = self._through(stage, y)
                added.append(y)
            x = x + torch.stack(added).sum(0)

    def _through(self, stage: Stage, x: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        x = self._written(stage.inner, x)
        if stage.site in self.groups:
            rows, reads = self.groups[stage.site]
            here = reads.vectors @ self._points(x).T * (reads.positions[:, None] == self.at)
            biases = torch.einsum("td,std->ts", reads.vectors, x[: int(self.is_bias.sum())][:, reads.positions])
            here[:, self.is_bias] = biases[:, self.slot[self.is_bias]]
            self.direct += self._at_edges(here, rows)
        return self._written(stage.outer, torch.zeros_like(x)) if stage.cut else x

    def _written(self, writes: Sequence[Writes], x: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        for w in writes:
            x = x.clone()
            columns = w.first + (0 if w.shared else 1) * torch.arange(len(w.positions), device=x.device)
            place = self.place[columns]
            used = place >= 0
            x[self.slot[place[used]], w.positions[used]] += w.vectors[used]
        return x

    def _points(self, x: Float[Tensor, "row pos d"]) -> Float[Tensor, "source d"]:
        return x[self.slot, self.at]

    def _heads(
        self, mix: FrozenAttention, gathered: Float[Tensor, "target gathered"], x: Float[Tensor, "row pos d"]
    ) -> None:
        """What passes each head of a layer from its values to the targets, and no other head."""
        kv, _, width = mix.value.shape
        n_heads, n_bias = len(mix.pattern), int(self.is_bias.sum())
        values = self._points(torch.einsum("spd,kde->spke", mix.norm.push(x), mix.value).flatten(2))
        values = values.unflatten(1, (kv, width)).repeat_interleave(n_heads // kv, 1)
        biases = mix.push(x[:n_bias])[:, self.positions].unflatten(2, (n_heads, width))
        wanted = gathered.unflatten(1, (n_heads, width))
        parts = []
        for head in range(n_heads):
            weight = mix.pattern[head][self.positions][:, self.at]
            here = wanted[:, head] @ values[:, head].T * weight
            here[:, self.is_bias] = torch.einsum("te,ste->ts", wanted[:, head], biases[:, :, head])[
                :, self.slot[self.is_bias]
            ]
            parts.append(self._at_edges(here, slice(0, len(here))))
        self.only.append(torch.stack(parts, 1))

    def _at_edges(self, table: Float[Tensor, "target source"], rows: slice) -> Float[Tensor, " edge"]:
        """Entries of a table of some targets by all sources in use, at the edges; 0 at other targets'."""
        inside = (self.rows >= rows.start) & (self.rows < rows.stop)
        out = table.new_zeros(len(self.rows))
        out[inside] = table[self.rows[inside] - rows.start, self.edge_source[inside]]
        return out
