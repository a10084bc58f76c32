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
FINALS = ("logit", "direction", "score")
_BEYOND = 10**9  # ids of directions and scores, beyond every vocabulary
_UNITS = 2**25  # numbers of units, beyond every dictionary; paired with a layer they are still whole in JavaScript


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
    def inner(self) -> list[FeatureNode]:
        """What stands between tokens and targets; biases only where there is nothing else."""
        inner = [node for node in self.graph.nodes if node.kind in ("latent", "error", "unit")]
        return inner or [node for node in self.graph.nodes if node.kind == "bias"]

    @cached_property
    def first(self) -> int:
        """Number of the lowest row: 1 where the highest would be 0."""
        return int(max((self.row_of(node) for node in self.inner), default=0) == 0)

    @cached_property
    def finals(self) -> list[int]:
        """Logits, directions and scores, as numbers of nodes."""
        return [i for i, node in enumerate(self.graph.nodes) if node.kind in FINALS]

    @cached_property
    def top(self) -> int:
        """The row of final targets, above all others."""
        others = [self.row_of(n) for n in self.graph.nodes if n.kind in ("latent", "error", "unit", "bias")]
        layers = [self.graph.nodes[i].layer * len(self.parts) for i in self.finals]
        return max(others + layers, default=0) + self.first + 1

    @cached_property
    def repeats(self) -> dict[str, int]:
        """By name, how many nodes of other names come before one in what would be its id, positions left aside.

        Several writes of a recurrent layer, inputs of several channels and errors of several kinds share a row.
        """
        found, seen = dict[str, int](), dict[object, dict[str, int]]()
        for node in self.graph.nodes:
            which = node.index if node.kind in ("token", "latent") else _part(node)
            same = seen.setdefault((node.kind, which, self.row_of(node)), {})
            found[node.name] = same.setdefault(base(node), len(same))
        return found

    @cached_property
    def numbers(self) -> dict[tuple[int, str], int]:
        """A number for each unit, and each latent whose own is taken in its row; the same at every position."""
        asked = [n for n in self.graph.nodes if n.kind == "unit" or (n.kind == "latent" and self.repeats[n.name])]
        return {key: _UNITS + i for i, key in enumerate(dict.fromkeys((self.row_of(n), base(n)) for n in asked))}

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
        weights, counts = self.graph.weights.tolist(), None if self.graph.counts is None else self.graph.counts.tolist()
        strongest = max(self.finals, key=lambda i: weights[i], default=-1)
        out = []
        for i, node in enumerate(self.graph.nodes):
            label = self.view.labels.get(node.name)
            if node.kind not in _PLACES:
                raise FormatError(
                    f"node {visible(node.name)[:80]} is of kind {visible(node.kind)[:40]!r}, and a graph file holds "
                    f"{', '.join(_PLACES)}; rename the kind or leave the node out"
                )
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
                    # What is printed as a probability is the logit's, however much it counts as a target.
                    "clerp": self._clerp(node, node.value if node.kind == "logit" else weights[i], label),
                    "influence": None if i in self.finals else self.shares[i],
                    "activation": node.value if node.kind in ("latent", "unit") else None,
                    "token_prob": weights[i],
                    "is_target_logit": i == strongest,
                    "circuitkit": _own(node, row, total, label, None if counts is None else counts[i]),
                }
            )
        return out

    def token(self, node: FeatureNode) -> str | None:
        """The text of the token at a node, None for a node of no position, as most are in merged graphs."""
        at = node.position
        return self.tokens[at] if at is not None and at < len(self.tokens) else None

    def _clerp(self, node: FeatureNode, said: float, label: str | None) -> str:
        token = self.token(node)
        if node.kind in FINALS:
            name = base(node).removeprefix("logits.")
            ids = [int(part) for part in name.split("-") if part.isdecimal()]
            known = ids and all(i in self.targets for i in ids) and base(node).startswith("logits.")
            name = " - ".join(self.targets[i] for i in ids) if known else name
            # The first "(p=" of the text is where viewers read the probability.
            text = visible(f'Output "{name}"' if label is None else label).replace("(p=", "( p=")
            return f"{text} (p={said:.3f})"
        if label is not None:
            return visible(label)
        return {
            "token": f'Emb: "{base(node) if token is None else token}"',
            "position": "Position" if node.position is None else f"Position {node.position}",
            "error": f"Err: {_part(node)}" + ("" if token is None else f' "{token}"'),
            "unit": visible(base(node)),
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


def _own(
    node: FeatureNode, row: int | None, total: float | None, label: str | None, count: int | None
) -> dict[str, Any]:
    own: dict[str, Any] = {k: getattr(node, k) for k in ("name", "kind", "layer", "site", "index", "value", "stage")}
    own |= {} if row is None else {"row": row, "total": total}
    own |= {"anywhere": True} if node.position is None and node.kind != "bias" else {}
    own |= {} if count is None else {"count": count}
    return own | ({} if label is None else {"label": visible(label)})


def base(node: FeatureNode) -> str:
    """A node's name without its position; ``a4.h2<-9`` of ``a4.h2@23<-9``, a head that moves something."""
    stem, _, rest = node.name.rpartition("@")
    return stem + "".join(rest.partition("<-")[1:]) if stem else node.name


def _again(repeat: int) -> str:
    return f".{repeat}" if repeat else ""


Place = tuple[str, dict[str, Any]]


def _token(draft: Draft, node: FeatureNode, i: int) -> Place:
    repeat = draft.repeats[node.name]
    feature = -1 - repeat if repeat else node.position or 0
    return f"E_{node.index}{_again(repeat)}", {"layer": "E", "feature": feature, "feature_type": "embedding"}


def _position(draft: Draft, node: FeatureNode, i: int) -> Place:
    return "E_position", {"layer": "E", "feature": -1, "feature_type": "embedding"}


def _latent(draft: Draft, node: FeatureNode, i: int) -> Place:
    row = draft.row_of(node) + draft.first
    index = draft.numbers.get((draft.row_of(node), base(node)), node.index or 0)
    kind = "lorsa" if _part(node) in ("z", "attn") else "cross layer transcoder"
    return f"{row}_{index}", {"layer": str(row), "feature": paired(row, index), "feature_type": kind}


def _unit(draft: Draft, node: FeatureNode, i: int) -> Place:
    row, number = draft.row_of(node) + draft.first, draft.numbers[draft.row_of(node), base(node)]
    kind = "cross layer transcoder"
    return f"{row}_{number}", {"layer": str(row), "feature": paired(row, number), "feature_type": kind}


def _error(draft: Draft, node: FeatureNode, i: int) -> Place:
    row, part, repeat = draft.row_of(node) + draft.first, _part(node), draft.repeats[node.name]
    kind = "lorsa error" if part in ("z", "attn") else "mlp reconstruction error"
    feature = ORDER.index(part) - len(ORDER) * (1 + 2 * repeat)
    return f"{row}_error_{part}{_again(repeat)}", {"layer": str(row), "feature": feature, "feature_type": kind}


def _bias(draft: Draft, node: FeatureNode, i: int) -> Place:
    row, part, repeat = draft.row_of(node) + draft.first, _part(node), draft.repeats[node.name]
    # Viewers merge nodes of one row, feature and position.
    feature = ORDER.index(part) - len(ORDER) * (2 + 2 * repeat)
    return f"{row}_bias_{part}{_again(repeat)}", {"layer": str(row), "feature": feature, "feature_type": "bias"}


def _final(draft: Draft, node: FeatureNode, i: int) -> Place:
    feature = node.index if node.kind == "logit" and node.index is not None else _BEYOND + draft.finals.index(i)
    return f"{draft.top}_{feature}", {"layer": str(draft.top), "feature": feature, "feature_type": "logit"}


_PLACES: dict[str, Callable[[Draft, FeatureNode, int], Place]] = {
    "token": _token,
    "position": _position,
    "latent": _latent,
    "unit": _unit,
    "error": _error,
    "bias": _bias,
    "logit": _final,
    "direction": _final,
    "score": _final,
}
