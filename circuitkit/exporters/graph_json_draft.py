"""Ids, rows and links of an attribution graph, as viewers want them; see `circuitkit.exporters.graph_json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any

from circuitkit.errors import FormatError, OptionError
from circuitkit.exporters.graph_json_schema import MOST_PINNED, paired
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.functional.text import visible

PARTS = {"resid-pre": "resid", "resid-post": "resid", "z": "z", "attn-out": "attn", "mlp-in": "mlp", "mlp-out": "mlp"}
ORDER = ("resid", "z", "attn", "mlp")
_BEYOND = 10**9  # ids of directions, beyond every vocabulary


@dataclass(frozen=True)
class View:
    """What a reader did to the picture; nodes go by their names in the graph.

    Args:
        pins: nodes that are drawn in the subgraph; at most 200.
        supernodes: groups of nodes, each with its label.
        labels: what single nodes are called.
        clicked: the selected node, or "".
        places: where pinned nodes stand, as the viewer wrote it.
    """

    pins: tuple[str, ...] = ()
    supernodes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    clicked: str = ""
    places: str = ""


@dataclass(frozen=True, eq=False)
class Draft:
    """Ids, rows and links of one graph."""

    graph: FeatureGraph
    tokens: tuple[str, ...]
    targets: Mapping[int, str]
    view: View

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Parts of a layer that need rows of their own; one stands for all where no layer has features of two."""
        latents = {(node.layer, _part(node)) for node in self.graph.nodes if node.kind == "latent"}
        alone = len({layer for layer, _ in latents}) == len(latents)
        found = {_part(node) for node in self.graph.nodes if node.kind in ("latent", "error")}
        return ("all",) if alone else tuple(part for part in ORDER if part in found)

    def row_of(self, node: FeatureNode) -> int:
        """Row before numbering is moved up."""
        place = ORDER.index(_part(node))
        before = sum(ORDER.index(part) < place for part in self.parts if part != "all")
        return node.layer * len(self.parts) + min(before, len(self.parts) - 1)

    @cached_property
    def first(self) -> int:
        """Number of the lowest row: 1 where the highest would be 0."""
        inner = [node for node in self.graph.nodes if node.kind in ("latent", "error")]
        inner = inner or [node for node in self.graph.nodes if node.kind == "bias"]
        if not inner:
            raise FormatError("the graph has tokens and targets only, and viewers refuse that; keep more when pruning")
        return int(max(self.row_of(node) for node in inner) == 0)

    @cached_property
    def finals(self) -> list[int]:
        """Logits and directions, as numbers of nodes."""
        return [i for i, node in enumerate(self.graph.nodes) if node.kind in ("logit", "direction")]

    @cached_property
    def top(self) -> int:
        """The row of logits and directions, above all others."""
        others = [self.row_of(n) for n in self.graph.nodes if n.kind in ("latent", "error", "bias")]
        layers = [self.graph.nodes[i].layer * len(self.parts) for i in self.finals]
        return max(others + layers) + self.first + 1

    @cached_property
    def ids(self) -> dict[str, str]:
        """Node id of each name."""
        found = {node.name: row["node_id"] for node, row in zip(self.graph.nodes, self.rows, strict=True)}
        if len(set(found.values())) < len(self.graph.nodes):
            raise FormatError("two nodes of the graph have one name or one place; make their names and places unique")
        return found

    @cached_property
    def shares(self) -> list[float]:
        """Cumulative share of influence at which each node enters."""
        found = self.graph.influence.double()
        order = found.argsort(descending=True, stable=True)
        running = found[order].cumsum(0)
        total = running[-1] if float(running[-1]) > 0 else running.new_ones(())
        out = found.clone()
        out[order] = (running / total).clamp(max=1)
        return out.tolist()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Nodes as the file has them."""
        totals = self.graph.totals.tolist()
        row_of = {node: row for row, node in enumerate(self.graph.targets.tolist())}
        weights = self.graph.weights.tolist()
        strongest = max(self.finals, key=lambda i: weights[i], default=-1)
        out = []
        for i, node in enumerate(self.graph.nodes):
            label = self.view.labels.get(node.name)
            row, total = row_of.get(i), totals[row_of[i]] if i in row_of else None
            if not all(isfinite(x) for x in (node.value, weights[i], 0.0 if total is None else total)):
                raise FormatError(f"a number of node {node.name} is not finite, and JSON has none such")
            stem, place = _PLACES[node.kind](self, node, i)
            node_id = f"{stem}_{node.position or 0}"
            out.append(
                {
                    "node_id": node_id,
                    "jsNodeId": node_id,
                    **place,
                    "ctx_idx": node.position or 0,
                    "clerp": self._clerp(node, weights[i], label),
                    "influence": None if i in self.finals else self.shares[i],
                    "activation": node.value if node.kind == "latent" else None,
                    "token_prob": weights[i],
                    "is_target_logit": i == strongest,
                    "circuitkit": _own(node, row, total, label),
                }
            )
        return out

    def _clerp(self, node: FeatureNode, weight: float, label: str | None) -> str:
        token = self.tokens[node.position or 0]
        if node.kind in ("logit", "direction"):
            name = node.name.rpartition("@")[0].removeprefix("logits.")
            name = name if node.index is None else self.targets.get(node.index, name)
            # The first "(p=" of the text is where viewers read the probability.
            text = visible(f'Output "{name}"' if label is None else label).replace("(p=", "( p=")
            return f"{text} (p={weight:.3f})"
        if label is not None:
            return visible(label)
        return {
            "token": f'Emb: "{token}"',
            "position": f"Position {node.position}",
            "error": f'Err: {_part(node)} "{token}"',
            "bias": f"Bias: {_part(node)}",
        }.get(node.kind, "")

    def links(self) -> Iterator[dict[str, Any]]:
        """Edges as the file has them."""
        effects, nodes = self.graph.effects, self.graph.nodes
        if not bool(effects.isfinite().all()):
            raise FormatError("an effect is not finite, and JSON has no number for it; attribute again")
        rows, columns = effects.nonzero(as_tuple=True)
        ends = self.graph.targets[rows].tolist()
        for end, start, weight in zip(ends, columns.tolist(), effects[rows, columns].tolist(), strict=True):
            yield {"source": self.ids[nodes[start].name], "target": self.ids[nodes[end].name], "weight": weight}

    def view_state(self) -> dict[str, Any]:
        """``qParams``. Raises OptionError for more pins than viewers draw, or for a node that is not there."""
        view = self.view
        if len(view.pins) > MOST_PINNED:
            raise OptionError(f"got {len(view.pins)} pins, and viewers draw at most {MOST_PINNED}; pin fewer nodes")
        named = [*view.pins, *view.labels, *(name for _, members in view.supernodes for name in members)]
        for name in [*named, *([view.clicked] if view.clicked else [])]:
            self.graph.node(name)
        at = {node.name: row for node, row in zip(self.graph.nodes, self.rows, strict=True)}
        return {
            "pinnedIds": [self.ids[name] for name in view.pins],
            "supernodes": [[visible(label), *(self.ids[n] for n in members)] for label, members in view.supernodes],
            "linkType": "both",
            "clickedId": self.ids[view.clicked] if view.clicked else "",
            "sg_pos": view.places,
            "clerps": [
                [f"{at[name]['layer']}_{at[name]['feature']}_{at[name]['ctx_idx']}", visible(label)]
                for name, label in view.labels.items()
            ],
        }


def _part(node: FeatureNode) -> str:
    return PARTS.get(node.site.partition(".")[0], "resid")


def _own(node: FeatureNode, row: int | None, total: float | None, label: str | None) -> dict[str, Any]:
    own: dict[str, Any] = {k: getattr(node, k) for k in ("name", "kind", "layer", "site", "index", "value", "stage")}
    own |= {} if row is None else {"row": row, "total": total}
    return own | ({} if label is None else {"label": visible(label)})


Place = tuple[str, dict[str, Any]]


def _token(draft: Draft, node: FeatureNode, i: int) -> Place:
    return f"E_{node.index}", {"layer": "E", "feature": node.position, "feature_type": "embedding"}


def _position(draft: Draft, node: FeatureNode, i: int) -> Place:
    return "E_position", {"layer": "E", "feature": -1, "feature_type": "embedding"}


def _latent(draft: Draft, node: FeatureNode, i: int) -> Place:
    row, index = draft.row_of(node) + draft.first, node.index or 0
    kind = "lorsa" if _part(node) in ("z", "attn") else "cross layer transcoder"
    return f"{row}_{index}", {"layer": str(row), "feature": paired(row, index), "feature_type": kind}


def _error(draft: Draft, node: FeatureNode, i: int) -> Place:
    row, part = draft.row_of(node) + draft.first, _part(node)
    kind = "lorsa error" if part in ("z", "attn") else "mlp reconstruction error"
    return f"{row}_error_{part}", {"layer": str(row), "feature": ORDER.index(part) - len(ORDER), "feature_type": kind}


def _bias(draft: Draft, node: FeatureNode, i: int) -> Place:
    row, part = draft.row_of(node) + draft.first, _part(node)
    # Viewers merge nodes of one row, feature and position.
    feature = ORDER.index(part) - 2 * len(ORDER)
    return f"{row}_bias_{part}", {"layer": str(row), "feature": feature, "feature_type": "bias"}


def _final(draft: Draft, node: FeatureNode, i: int) -> Place:
    feature = _BEYOND + draft.finals.index(i) if node.index is None else node.index
    return f"{draft.top}_{feature}", {"layer": str(draft.top), "feature": feature, "feature_type": "logit"}


_PLACES: dict[str, Callable[[Draft, FeatureNode, int], Place]] = {
    "token": _token,
    "position": _position,
    "latent": _latent,
    "error": _error,
    "bias": _bias,
    "logit": _final,
    "direction": _final,
}
