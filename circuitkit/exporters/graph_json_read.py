"""Attribution graphs from the JSON of circuitkit, circuit-tracer and Neuronpedia."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from circuitkit.errors import FormatError
from circuitkit.exporters.graph_json_draft import View
from circuitkit.exporters.graph_json_schema import (
    ERRORS,
    LATENTS,
    GraphJson,
    Node,
    Own,
    check_graph_json,
    text_of,
    unpaired,
)
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.schema import check_schema, parse_json

_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_KINDS = ("token", "position", "bias", "latent", "unit", "error", "logit", "direction", "score")


@dataclass(frozen=True, eq=False)
class GraphFile:
    """What a graph file holds.

    Args:
        graph: nodes and effects.
        slug: name of the graph.
        scan: what viewers know the model by.
        prompt: as text.
        prompt_tokens: the text of each token.
        view: pins, groups and labels; those of nodes that the file lacks are left out.
        ids: the file's id of each node's name.
        node_threshold: where viewers' slider starts, or None.
    """

    graph: FeatureGraph
    slug: str
    scan: str
    prompt: str
    prompt_tokens: tuple[str, ...]
    view: View
    ids: Mapping[str, str]
    node_threshold: float | None


def read_graph_json(path: str | Path) -> GraphFile:
    """The graph that `write_graph_json` wrote, number for number, or one of circuit-tracer or Neuronpedia.

    Files of others do not say everything: a feature is taken to be of an MLP's transcoder (``lorsa``: of attention),
    its activation as what its row adds up to (the sum of its links if there is none), stages follow from the links,
    effects are float32, and a token whose id is not in its node's is -1.

    Raises:
        FormatError: if the file is missing, truncated, breaks a rule of the format, or its links run in a circle.
    """
    return graph_from_json(text_of(path), str(path))


def graph_from_json(text: str, where: str = "the text") -> GraphFile:
    """What `read_graph_json` reads from a file. Raises FormatError likewise; ``where`` names the file in messages."""
    file = check_graph_json(parse_json(text, where), where)
    own = file.metadata.circuitkit
    if own is not None:
        check_schema(own.get("schema"), "feature-graph", where)
    order, nodes = _nodes(file, where)
    graph = replace(
        _graph(file, order, nodes, own or {}, where), target_tokens=_target_tokens(file, order, nodes, own or {}, where)
    )
    names = {file.nodes[i].node_id: node.name for i, node in zip(order, nodes, strict=True)}
    return GraphFile(
        graph=graph,
        slug=file.metadata.slug,
        scan=file.metadata.scan,
        prompt=file.metadata.prompt,
        prompt_tokens=tuple(file.metadata.prompt_tokens) if len(graph.tokens) else (),
        view=_view(file, names),
        ids={name: node_id for node_id, name in names.items()},
        node_threshold=file.metadata.node_threshold,
    )


def _nodes(file: GraphJson, where: str) -> tuple[list[int], list[FeatureNode]]:
    """Where each node stands in the file, and the nodes; in our own files' order, else by stage."""
    stages = _stages(file, where)
    found, taken = list[FeatureNode](), set[str]()
    highest = max((_layer(node, where) for node in file.nodes if node.feature_type != "logit"), default=0)
    for node in file.nodes:
        made = (
            _foreign(node, file, highest, stages[node.node_id], where)
            if node.circuitkit is None
            else _restored(node, node.circuitkit, where)
        )
        if made.name in taken:
            raise FormatError(f"{where} has two nodes that stand for {made.name[:80]}; keep one of them")
        taken.add(made.name)
        found.append(made)
    order = list(range(len(found)))
    if file.metadata.circuitkit is None:
        order.sort(key=lambda i: (found[i].kind == "logit", found[i].stage))
    return order, [found[i] for i in order]


def _stages(file: GraphJson, where: str) -> dict[str, int]:
    """Length of the longest way to each node."""
    network = nx.DiGraph((link.source, link.target) for link in file.links)
    network.add_nodes_from(node.node_id for node in file.nodes)
    try:
        return {name: stage for stage, level in enumerate(nx.topological_generations(network)) for name in level}
    except nx.NetworkXUnfeasible as error:
        raise FormatError(f"the links of {where} run in a circle, and effects never do; write it again") from error


def _restored(node: Node, own: Own, where: str) -> FeatureNode:
    if own.kind not in _KINDS:
        raise FormatError(f"{where}: node {own.name[:80]!r} is of kind {own.kind[:40]!r}, expected {', '.join(_KINDS)}")
    position = None if own.kind == "bias" or own.anywhere else node.ctx_idx
    return FeatureNode(own.name, own.kind, own.layer, own.site, position, own.index, own.value, own.stage)


def _foreign(node: Node, file: GraphJson, highest: int, stage: int, where: str) -> FeatureNode:
    layer, position, type_ = _layer(node, where), node.ctx_idx, node.feature_type
    middle = re.fullmatch(r"[^_]+_(\d{1,15})_\d+", node.node_id)
    number = int(middle[1]) if middle else None
    if type_ == "embedding":
        return FeatureNode(f"input@{position}", "token", -1, "resid-pre.0", position, number, 1.0, stage)
    if type_ == "logit":
        index = node.feature if number is None else number
        name = f"logits.{node.node_id if index is None else index}@{position}"
        site = f"resid-pre.{highest + 1}"
        return FeatureNode(name, "logit", highest + 1, site, position, index, _probability(node), stage)
    part, mlp = ("a", False) if type_.startswith("lorsa") else ("m", True)
    if type_ in ERRORS:
        site = f"{'mlp-out' if mlp else 'attn-out'}.{layer}"
        return FeatureNode(f"{part}{layer}.error@{position}", "error", layer, site, position, None, 1.0, stage)
    if type_ == "bias":
        return FeatureNode(f"bias.{node.node_id}", "bias", layer, f"resid-pre.{layer}", None, None, 1.0, stage)
    if type_ not in LATENTS:
        raise FormatError(f"{where}: node {node.node_id[:80]!r} is a {type_[:40]!r}, which is not known here")
    if number is None and node.feature is not None and node.feature >= 0:
        number = unpaired(node.feature)[1] if file.metadata.schema_version == 1 else node.feature
    site = f"{'mlp-in' if mlp else 'attn-out'}.{layer}"
    name = f"{part}{layer}.f{number}@{position}" if number is not None else f"{node.node_id}@{position}"
    return FeatureNode(name, "latent", layer, site, position, number, node.activation or 0.0, stage)


def _layer(node: Node, where: str) -> int:
    text = str(node.layer)
    if re.fullmatch(r"-?\d{1,9}", text):
        return int(text)
    if text.startswith("E"):
        return -1
    raise FormatError(f"{where}: node {node.node_id[:80]!r} is in layer {text[:40]!r}, expected a number or 'E'")


def _probability(node: Node) -> float:
    """Of a logit: the field, or the label's ``(p=0.123)``."""
    if node.token_prob:
        return node.token_prob
    found = re.search(r"\(p=([0-9.]+)\)$", node.clerp)
    return float(found[1]) if found and found[1].count(".") < 2 and found[1] != "." else 0.0


def _graph(
    file: GraphJson, order: list[int], nodes: list[FeatureNode], own: Mapping[str, Any], where: str
) -> FeatureGraph:
    ordered = [file.nodes[i] for i in order]
    at = {node.node_id: i for i, node in enumerate(ordered)}
    weights = [
        made.value if node.circuitkit is None and made.kind == "logit" else node.token_prob or 0.0
        for node, made in zip(ordered, nodes, strict=True)
    ]
    ends = {at[link.target] for link in file.links} | {i for i, weight in enumerate(weights) if weight > 0}
    ends |= {i for i, node in enumerate(ordered) if node.circuitkit is not None and node.circuitkit.row is not None}
    rows = [node.circuitkit.row if node.circuitkit is not None else None for node in ordered]
    targets = sorted(ends, key=lambda i: (i if rows[i] is None else rows[i] or 0, i))
    row_of = {node: row for row, node in enumerate(targets)}
    effects = torch.zeros(len(targets), len(nodes), dtype=_DTYPES.get(str(own.get("dtype", "float32")), torch.float32))
    if file.links:
        pairs = torch.tensor([(row_of[at[link.target]], at[link.source]) for link in file.links])
        effects[pairs[:, 0], pairs[:, 1]] = torch.tensor([link.weight for link in file.links], dtype=effects.dtype)
    for link in file.links:
        if not nodes[at[link.source]].stage < nodes[at[link.target]].stage:
            raise FormatError(f"{where}: link {link.source[:80]} -> {link.target[:80]} leads back; write it again")
    return FeatureGraph(
        nodes=tuple(nodes),
        targets=torch.tensor(targets, dtype=torch.long),
        effects=effects,
        totals=_totals(ordered, targets, effects),
        weights=torch.tensor(weights, dtype=torch.float64),
        tokens=_tokens(file, nodes, own, where),
        model=str(own.get("model", file.metadata.scan)),
        texts=_texts(file, own, where),
        counts=_counts(ordered),
    )


def _texts(file: GraphJson, own: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Of the tokens; a file of another tool has them as the prompt's."""
    texts = own.get("texts", [] if own else file.metadata.prompt_tokens)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FormatError(f"{where} has texts of tokens that are no texts; write it again")
    return tuple(texts) if len(texts) == len(file.metadata.prompt_tokens) else ()


def _counts(ordered: list[Node]) -> Tensor | None:
    found = [None if node.circuitkit is None else node.circuitkit.count for node in ordered]
    known = [count for count in found if count is not None]
    return torch.tensor(known, dtype=torch.long) if known and len(known) == len(found) else None


def _totals(ordered: list[Node], targets: list[int], effects: Tensor) -> Tensor:
    sums, found = effects.double().sum(1).tolist(), []
    for i, total in zip(targets, sums, strict=True):
        node = ordered[i]
        known = node.activation if node.circuitkit is None else node.circuitkit.total
        found.append(total if known is None else known)
    return torch.tensor(found, dtype=effects.dtype)


def _tokens(file: GraphJson, nodes: list[FeatureNode], own: Mapping[str, Any], where: str) -> Tensor:
    n = len(file.metadata.prompt_tokens)
    known = own.get("tokens")
    if known == []:  # a graph of no one prompt; viewers want a token all the same
        return torch.zeros(0, dtype=torch.long)
    if known is not None:
        if not isinstance(known, list) or len(known) != n or not all(type(t) is int and abs(t) < 2**53 for t in known):
            raise FormatError(f"{where} has {n} tokens, and ids that do not fit them; write it again")
        return torch.tensor(known, dtype=torch.long)
    tokens = torch.full((n,), -1)
    for node in nodes:
        if node.kind == "token" and node.index is not None and node.position is not None:
            tokens[node.position] = node.index
    return tokens


def _target_tokens(
    file: GraphJson, order: list[int], nodes: list[FeatureNode], own: Mapping[str, Any], where: str
) -> dict[int, str]:
    """As the graph had them; from labels such as ``Output "tok" (p=0.123)`` where it says nothing."""
    said = ((node, re.match(r'Output "(.*)" \(p=', file.nodes[i].clerp)) for i, node in zip(order, nodes, strict=True))
    found = {node.index: text[1] for node, text in said if node.kind == "logit" and node.index is not None and text}
    kept = own.get("target_tokens", {})
    if not isinstance(kept, dict) or not all(i.isdecimal() and isinstance(text, str) for i, text in kept.items()):
        raise FormatError(f"{where} has texts of explained tokens that are no texts; write it again")
    return found | {int(i): text for i, text in kept.items()}


def _view(file: GraphJson, names: Mapping[str, str]) -> View:
    state = file.qParams
    by_feature = {n.feature_id: names[n.node_id] for n in file.nodes if n.feature_type in (*LATENTS, "logit")}
    labels = {}
    for node in file.nodes:
        label = node.clerp if node.circuitkit is None and node.feature_type in LATENTS else None
        label = label or (None if node.circuitkit is None else node.circuitkit.label)
        if label is not None:
            labels[names[node.node_id]] = label
    for entry in state.clerps:
        name = by_feature.get(entry[0], names.get(entry[0])) if len(entry) == 2 else None
        if name is not None:
            labels[name] = entry[1]
    groups = ((group[0], tuple(names[i] for i in group[1:] if i in names)) for group in state.supernodes if group)
    return View(
        pins=tuple(names[i] for i in state.pinnedIds if i in names),
        supernodes=tuple((label, members) for label, members in groups if members),
        labels=labels,
        clicked=names.get(state.clickedId or "", ""),
        places=state.sg_pos or "",
    )
