"""`FeatureGraph`: the direct effects among tokens, positions, biases, latents, errors and targets of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.influence import carrying, completeness_score, edge_shares, influence, replacement_score

if TYPE_CHECKING:
    import networkx

ROOTS = ("token", "position", "bias", "error")


@dataclass(frozen=True)
class FeatureNode:
    """One node of a feature graph.

    Args:
        name: unique; ``m3.f17@5`` is latent 17 of the dictionary at layer 3's MLP, at position 5.
        kind: ``token``, ``position``, ``bias``, ``latent``, ``error``, ``unit`` (of a recurrent network, or a head on
            a path); of what is explained ``logit``, ``direction``, ``score`` (of attention).
        layer: 0-based; -1 for tokens and positions, the number of layers for logits.
        site: the tensor that a latent or target reads, or that an error is written to.
        position: which, or None for a bias.
        index: latent or token id, or None.
        value: a latent's activation, a logit's probability, 1 otherwise.
        stage: order of computation: an edge leads to a later stage.
    """

    name: str
    kind: str
    layer: int
    site: str
    position: int | None
    index: int | None
    value: float
    stage: int


@dataclass(frozen=True, eq=False)
class FeatureGraph:
    """An attribution graph.

    Args:
        nodes: sources first, in order of computation; logits and directions last.
        targets: which node each row belongs to: explored latents, and what the graph explains.
        effects: direct effect of each node (column) on each target (row), in the units of the target.
        totals: pre-activation of each target.
        weights: of each node, how much it counts as a final target; zero for all others.
        tokens: the prompt.
        model: name of the model.
        texts: the text of each token of the prompt, if the model has a tokenizer.
        target_tokens: the text of each token id that is explained, if the model has a tokenizer.
        counts: in how many prompts each node is, if prompts have been merged (`circuitkit.features.merge`).
    """

    nodes: tuple[FeatureNode, ...]
    targets: Int[Tensor, " target"]
    effects: Float[Tensor, "target node"]
    totals: Float[Tensor, " target"]
    weights: Float[Tensor, " node"]
    tokens: Int[Tensor, " pos"]
    model: str = ""
    texts: tuple[str, ...] = ()
    counts: Int[Tensor, " node"] | None = None
    target_tokens: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"FeatureGraph({self.model}: {len(self.nodes)} nodes, {self.n_edges} edges, {len(self.tokens)} tokens)"

    @property
    def n_edges(self) -> int:
        """How many effects are not zero."""
        return int(self.effects.count_nonzero())

    @property
    def remainder(self) -> Float[Tensor, " target"]:
        """What each target got from nodes and edges that are not in the graph."""
        return (self.totals.double() - self.effects.double().sum(1)).to(self.totals)

    def kind(self, *kinds: str) -> Bool[Tensor, " node"]:
        """Which nodes are of some kinds."""
        return torch.tensor([node.kind in kinds for node in self.nodes], device=self.effects.device)

    @cached_property
    def stages(self) -> Int[Tensor, " node"]:
        """Order of computation of each node."""
        return torch.tensor([node.stage for node in self.nodes], device=self.effects.device)

    @cached_property
    def influence(self) -> Float[Tensor, " node"]:
        """How much of the final targets goes back to each node; see `circuitkit.functional.influence`."""
        return influence(self.effects, self.targets, self.stages, self.weights)

    @cached_property
    def replacement_score(self) -> float:
        """Influence of tokens as a share of that of tokens and errors together."""
        return replacement_score(self.influence, self.kind("token"), self.kind("error"))

    @cached_property
    def completeness_score(self) -> float:
        """Share of inputs that are not errors, mean over targets by their influence."""
        return completeness_score(self.effects, self.targets, self.influence, self.weights, self.kind("error"))

    def node(self, name: str) -> int:
        """Number of a node. Raises OptionError if there is none of that name."""
        found = self._numbers.get(name)
        if found is None:
            raise OptionError(
                f"this graph has no node {name!r}; its first ones are {', '.join(list(self._numbers)[:6])}"
            )
        return found

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {node.name: i for i, node in enumerate(self.nodes)}

    def label(self, i: int) -> str:
        """What a node is called, with the text of its token where that is known."""
        node = self.nodes[i]
        if node.kind in ("logit", "direction"):
            ids = node.name.partition("@")[0].removeprefix("logits.").split("-")
            texts = [repr(self.target_tokens[int(i)]) for i in ids if i.isdecimal() and int(i) in self.target_tokens]
            return " - ".join(texts) if len(texts) == len(ids) else node.name
        at = node.position
        known = at is not None and at < len(self.texts) and len(self.texts) == len(self.tokens)
        return f"{node.name} {self.texts[at]!r}" if known and at is not None else node.name

    def effect(self, source: str, target: str) -> float:
        """Direct effect of one node on another; 0 where there is no edge or the target has not been explored."""
        row = (self.targets == self.node(target)).nonzero().flatten()
        return float(self.effects[int(row[0]), self.node(source)]) if len(row) else 0.0

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> FeatureGraph:
        """The smallest part that carries a share of the influence.

        Nodes of most influence are kept until they carry ``nodes`` of it all; tokens and final targets always. Effects
        are then shared out anew among what is left, and edges are kept in the same way; at last latents without an
        edge in or out, and errors, biases and positions without an edge out, are dropped until none is left.

        Raises:
            OptionError: for shares that are not above 0 and at most 1.
        """
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not 0 < share <= 1:
                raise OptionError(f"got {name} = {share}, expected a share above 0 and at most 1")
        always = self.kind("token") | (self.weights > 0)
        part = self.part(carrying(self.influence, nodes) | always)
        shares = edge_shares(part.effects, part.targets, part.influence, part.weights)
        part = replace(part, effects=part.effects * carrying(shares, edges))
        always = part.kind("token") | (part.weights > 0)
        return part.part(~part._dangling(always) | always)

    def _dangling(self, always: Bool[Tensor, " node"]) -> Bool[Tensor, " node"]:
        roots, edges = self.kind(*ROOTS), self.effects != 0
        dropped = torch.zeros_like(always)
        while True:
            live = ~dropped
            edges = edges & live & live[self.targets][:, None]
            goes_out = edges.any(0)
            comes_in = torch.zeros_like(goes_out)
            comes_in[self.targets] = edges.any(1)
            more = live & ~always & ~(goes_out & (comes_in | roots))
            if not bool(more.any()):
                return dropped
            dropped = dropped | more

    def part(self, kept: Bool[Tensor, " node"]) -> FeatureGraph:
        """The part on some nodes; totals stay, so that the remainder says what is missing."""
        renumbered, rows = kept.cumsum(0) - 1, kept[self.targets]
        return replace(
            self,
            nodes=tuple(node for node, keep in zip(self.nodes, kept.tolist(), strict=True) if keep),
            targets=renumbered[self.targets[rows]],
            effects=self.effects[rows][:, kept],
            totals=self.totals[rows],
            weights=self.weights[kept],
            counts=None if self.counts is None else self.counts[kept],
        )

    def to_html(self, path: str | Path, **options: Any) -> Path:
        """Write one self-contained page (`circuitkit.viewer.feature_page.feature_page`); returns its path."""
        from circuitkit.viewer.feature_page import write_feature_page

        return write_feature_page(self, path, **options)

    def save(self, path: str | Path) -> Path:
        """Write the file that `load`, Neuronpedia and circuit-tracer read; a view goes with `write_graph_json`."""
        from circuitkit.exporters.feature_graph import save_feature_graph

        return save_feature_graph(self, path)

    @classmethod
    def load(cls, path: str | Path) -> FeatureGraph:
        """Read what `save` wrote, or a graph file of another tool. Raises FormatError for any other file."""
        from circuitkit.exporters.graph_json_read import read_graph_json

        return read_graph_json(path).graph

    def to_networkx(self) -> networkx.DiGraph:
        """The graph with the fields of `FeatureNode` and ``influence`` on nodes, ``weight`` on edges."""
        import networkx

        graph = networkx.DiGraph(model=self.model, tokens=self.tokens.tolist())
        for node, found in zip(self.nodes, self.influence.tolist(), strict=True):
            fields = {k: v for k, v in vars(node).items() if k != "name" and v is not None}
            graph.add_node(node.name, **fields, influence=found)
        rows, columns = self.effects.nonzero(as_tuple=True)
        for row, column, weight in zip(
            self.targets[rows].tolist(), columns.tolist(), self.effects[rows, columns].tolist(), strict=True
        ):
            graph.add_edge(self.nodes[column].name, self.nodes[row].name, weight=weight)
        return graph
