"""A finer wiring: the MLPs of chosen layers as groups of neurons, each with readers and a write of its own.

    write of group n     hidden_n W_out_n                       summed over groups, with b_out, the MLP's write
    readers of group n   gate_n = norm(x) W_gate_n and up_n = norm(x) W_in_n, or one reader without a gate

Only the wiring changes: the module, its hooks and everything that works through sites stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.graph import Graph, Node
from circuitkit.models.hooked import Model
from circuitkit.models.laws import check_mlps
from circuitkit.models.wiring import MlpParts, ReadSite, Wiring, WriteSite


def split_mlps(model: Model, group: int = 1, layers: Sequence[int] | None = None, *, check: bool = True) -> Model:
    """The same module with the MLPs of some layers (default: all) wired as groups of neurons.

    Args:
        group: neurons per node; it must divide the number of neurons of the layer.
        layers: which layers, counted from 0.
        check: whether to test by experiment that the MLPs are made of the parts that the wiring names, and all laws of
            the finer wiring.

    Raises:
        OptionError: for a group that does not divide a layer, a layer that is not there or is already split.
        UnsupportedModel: if the model has no MLPs, or their inside is not known or not as described.

    >>> import circuitkit as ck
    >>> model = ck.load("stories260k")
    >>> split_mlps(model, group=43, layers=[4]).graph.sources[-5:]
    ('a4.h7', 'm4.n0-42', 'm4.n43-85', 'm4.n86-128', 'm4.n129-171')
    """
    wiring = model.wiring
    parts = {p.block: p for p in wiring.mlps}
    if not any(node.kind in ("mlp", "neuron") for node in wiring.graph.source_nodes):
        raise UnsupportedModel(f"{model.name} has no MLPs to split into neurons")
    if not parts:
        raise UnsupportedModel(
            f"the inside of the MLPs of {model.name} is not known (a mixture of experts, or a norm inside), so they "
            "cannot be split into neurons; its graph with whole MLPs works"
        )
    chosen = _chosen_layers(model, layers)
    sizes = {block: _groups(parts[block], group) for block in chosen}
    if check:
        check_mlps(model, [parts[block] for block in chosen])
    split = copy.copy(model)
    split.wiring = _finer(wiring, sizes)
    if check:
        split.check()
    return split


def group_size(graph: Graph) -> int | None:
    """Neurons per node of a graph whose MLPs are split, or None."""
    name = next((node.name for node in graph.source_nodes if node.kind == "neuron"), None)
    if name is None:
        return None
    first, _, last = name.partition(".n")[2].partition("-")
    return int(last or first) - int(first) + 1


def split_like(model: Model, graph: Graph) -> Model:
    """The model with its MLPs split as in a graph; the model itself if the graph has whole MLPs."""
    size = group_size(graph)
    if size is None:
        return model
    return split_mlps(model, size, sorted({node.layer for node in graph.source_nodes if node.kind == "neuron"}))


def _chosen_layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    nodes = model.graph.source_nodes
    whole = {node.layer for node in nodes if node.kind == "mlp"}
    if layers is None:
        if not whole:
            raise OptionError(f"the MLPs of {model.name} are already split into neurons; split the model as loaded")
        return sorted(whole)
    chosen = sorted(set(layers))
    wrong = [layer for layer in chosen if layer not in whole]
    if wrong or not chosen:
        raise OptionError(
            f"got layers = {chosen}, expected some of {', '.join(map(str, sorted(whole)))}: the layers of {model.name} "
            "whose MLPs are whole"
        )
    return chosen


def _groups(parts: MlpParts, group: int) -> int:
    n = len(parts.w_out)
    if type(group) is not int or group < 1 or n % group:
        fits = [k for k in range(1, n + 1) if n % k == 0]
        raise OptionError(f"got groups of {group!r} neurons, expected a divisor of {n}: {', '.join(map(str, fits))}")
    return n // group


def open_mlps(wiring: Wiring) -> Wiring:
    """The wiring with each whole MLP whose inside is known as one group of neurons: its linear maps become visible."""
    return _finer(wiring, {parts.block: 1 for parts in wiring.mlps})


def _finer(wiring: Wiring, sizes: dict[int, int]) -> Wiring:
    """The wiring with every whole MLP of ``sizes`` in that many groups."""
    graph, parts = wiring.graph, {p.block: p for p in wiring.mlps}
    rows, columns = list[tuple[int, int]](), list[tuple[int, int]]()  # (row or column of before, group; -1 for all)
    sources, destinations = list[Node](), list[Node]()
    writes, reads = list[WriteSite](), list[ReadSite]()
    for write in wiring.write_sites:
        n = _n_groups(graph.source_nodes[write.first], sizes)
        if n is None:
            writes.append(replace(write, first=len(rows)))
            rows += [(row, -1) for row in range(write.first, write.rows.stop)]
            sources += graph.source_nodes[write.rows]
        else:
            writes.append(_write_site(len(rows), n, parts[write.block]))
            rows += [(write.first, g) for g in range(n)]
            sources += _nodes(graph.source_nodes[write.first], n, parts[write.block])
    for read in wiring.read_sites:
        n = _n_groups(graph.destination_nodes[read.first], sizes)
        if n is None:
            reads.append(replace(read, first=len(columns)))
            columns += [(column, -1) for column in range(read.first, read.columns.stop)]
            destinations += graph.destination_nodes[read.columns]
            continue
        for slot, site in _read_sites(read, n, parts[read.block]):
            reads.append(replace(site, first=len(columns)))
            columns += [(read.first, g) for g in range(n)]
            destinations += _nodes(graph.destination_nodes[read.first], n, parts[read.block], slot)
    (old_row, row_group), (old_column, column_group) = torch.tensor(rows).T, torch.tensor(columns).T
    mask = graph.mask[old_row][:, old_column]
    # Neuron by neuron: what a group reads feeds what it writes and no other group.
    feeds = graph.feeds[old_column][:, old_row] & (column_group[:, None] == row_group)
    finer = Graph(tuple(sources), tuple(destinations), mask, feeds)
    return replace(wiring, graph=finer, write_sites=tuple(writes), read_sites=tuple(reads))


def _n_groups(node: Node, sizes: dict[int, int]) -> int | None:
    return sizes.get(node.layer) if node.kind == "mlp" else None


def _nodes(mlp: Node, n: int, parts: MlpParts, slot: str | None = None) -> list[Node]:
    width = len(parts.w_out) // n
    spans = [str(g * width) if width == 1 else f"{g * width}-{(g + 1) * width - 1}" for g in range(n)]
    suffix = f"<{slot}>" if slot else ""
    return [
        Node(f"{mlp.name}.n{span}{suffix}", "neuron", mlp.layer, mlp.stage, g, slot) for g, span in enumerate(spans)
    ]


def _write_site(first: int, n: int, parts: MlpParts) -> WriteSite:
    weight = parts.w_out.unflatten(0, (n, -1))
    return WriteSite(first, n, parts.block, parts.hidden, weight, parts.b_out, parts.post_norm)


def _read_sites(mlp: ReadSite, n: int, parts: MlpParts) -> list[tuple[str | None, ReadSite]]:
    def site(port, weight: Tensor, bias: Tensor | None) -> ReadSite:  # type: ignore[no-untyped-def]
        per_group = weight.unflatten(1, (n, -1)).transpose(0, 1)
        return replace(mlp, n=n, port=port, weight=per_group, bias=None if bias is None else bias.unflatten(0, (n, -1)))

    up = site(parts.pre, parts.w_in, parts.b_in)
    if parts.gate is None or parts.w_gate is None:
        return [(None, up)]
    return [("gate", site(parts.gate, parts.w_gate, parts.b_gate)), ("up", up)]
