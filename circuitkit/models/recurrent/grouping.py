"""Nodes of a recurrent network: single units, whole gates, layers, directions, or subspaces of a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import GraphError
from circuitkit.graph import Graph, Node
from circuitkit.models.recurrent.parts import FEATURES, Block, Network, Slot, Stage, Write
from circuitkit.models.recurrent.view import View, Windows, base_mask

Group = Literal["unit", "gate", "layer", "direction"]
Subspaces = Mapping[str, Float[Tensor, "number direction"]]


class _Nodes:
    """Nodes in order, by name."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._number: dict[str, int] = {}

    def add(self, node: Node) -> int:
        """Number of the node of that name, added if it is new."""
        if node.name not in self._number:
            self._number[node.name] = len(self.nodes)
            self.nodes.append(node)
        return self._number[node.name]


def make_view(
    network: Network,
    group: Group = "unit",
    subspaces: Subspaces | None = None,
    windows: Windows | None = None,
    read_at: tuple[int, ...] | None = None,
) -> View:
    """A network with nodes of a kind.

    Args:
        group: ``unit`` (what the cell calls one), ``gate`` (all units of a slot or a write), ``layer``, ``direction``.
        subspaces: for some writes, orthonormal directions; each is a writer, what is left another.
        windows: how time is cut; None for collapsed.
        read_at: windows in which answers are read; None for all.

    Raises:
        GraphError: for an unknown group or write, or directions that are not orthonormal.
    """
    if group not in ("unit", "gate", "layer", "direction"):
        raise GraphError(f"got group = {group!r}, expected 'unit', 'gate', 'layer' or 'direction'")
    bases = {name: _basis(network, name, u) for name, u in (subspaces or {}).items()}
    writers, readers = _Nodes(), _Nodes()
    sizes = {name: u.shape[1] for name, u in (subspaces or {}).items()}
    entry = network.input
    writer_of = {entry.name: _writers(entry, -1, 0, "", writers, "unit", sizes.get(entry.name))}
    reader_of: dict[Slot, Tensor] = {}
    for number, (block, stage) in enumerate(network.stages, 1):
        for slot in stage.slots:
            reader_of[slot] = _readers(slot, block, stage, number, readers, group)
        for write in stage.writes:
            if write.name != FEATURES:
                k, stem = sizes.get(write.name), _stem(block, group)
                writer_of[write.name] = _writers(write, block.layer, number, stem, writers, group, k)
    sources, destinations = tuple(writers.nodes), tuple(readers.nodes)
    mask = base_mask(len(sources), len(destinations), network, writer_of, reader_of, bases)
    feeds = torch.zeros(len(destinations), len(sources), dtype=torch.bool)
    for _, stage in network.stages:
        for slot in stage.slots:
            for name in slot.feeds:
                _feed(feeds, reader_of[slot], writer_of[name], name in bases, network.write(name), slot)
            for name in slot.feeds_all:
                feeds[reader_of[slot].unique()[:, None], writer_of[name].unique()[None, :]] = True
    return View(network, Graph(sources, destinations, mask, feeds), writer_of, reader_of, bases, windows, read_at)


def _stem(block: Block, group: str) -> str:
    return ("backward" if block.reverse else "forward") if group == "direction" else f"l{block.layer}"


def _writers(
    write: Write, layer: int, stage: int, stem: str, nodes: _Nodes, group: str, directions: int | None
) -> Tensor:
    """Numbers of the writers that each number of a write belongs to."""
    if directions is not None:
        names = [f"{write.name}:{i}" for i in range(directions)]
        names += [f"{write.name}:rest"] * (write.size - directions)
        kind = "subspace" if stage else write.kind
        return torch.tensor([nodes.add(Node(name, kind, layer, stage, i)) for i, name in enumerate(names)])
    if group == "unit" or stage == 0:
        single = write.n == 1
        each = [
            nodes.add(
                Node(write.name if single else f"{write.name}{i}", write.kind, layer, stage, None if single else i)
            )
            for i in range(write.n)
        ]
        return torch.tensor(each).repeat_interleave(write.width)
    name = write.name if group == "gate" else stem
    return torch.full((write.size,), nodes.add(Node(name, "layer" if group != "gate" else write.kind, layer, stage)))


def _readers(slot: Slot, block: Block, stage: Stage, number: int, nodes: _Nodes, group: str) -> Tensor:
    """Numbers of the readers that each number of a slot belongs to."""
    if stage.writes[0].name == FEATURES:
        return torch.full((slot.size,), nodes.add(Node(FEATURES, "logits", block.layer, number)))
    owner = (slot.feeds or slot.feeds_all or (stage.writes[0].name,))[0]
    mark = f"<{slot.name}>" if slot.name else ""
    if group == "unit":
        names = [f"{owner}{i}{mark}" if slot.n > 1 else f"{owner}{mark}" for i in range(slot.n)]
        each = [
            nodes.add(Node(name, "gate", block.layer, number, i if slot.n > 1 else None, slot.name or None))
            for i, name in enumerate(names)
        ]
        return torch.tensor(each).repeat_interleave(slot.width)
    if group == "gate":
        node = Node(f"{owner}{mark}", "gate", block.layer, number, None, slot.name or None)
    else:
        node = Node(_stem(block, group), "layer", block.layer, number)
    return torch.full((slot.size,), nodes.add(node))


def _feed(feeds: Tensor, readers: Tensor, writers: Tensor, rotated: bool, write: Write, slot: Slot) -> None:
    """Set which readers feed which writers of a write: the i-th the i-th, or all where writers are subspaces."""
    if rotated or slot.n != write.n:
        feeds[readers.unique()[:, None], writers.unique()[None, :]] = True
        return
    first = torch.arange(write.n)
    feeds[readers[first * slot.width], writers[first * write.width]] = True


def _basis(network: Network, name: str, directions: Tensor) -> Float[Tensor, "number number"]:
    """An orthonormal basis that begins with the given directions."""
    names = [write.name for write in network.writes]
    if name not in names:
        raise GraphError(f"no write {name!r} in this network; it has {', '.join(names)}")
    size = network.write(name).size
    if directions.dim() != 2 or directions.shape[0] != size or directions.shape[1] > size:
        raise GraphError(f"got directions {tuple(directions.shape)} for {name!r}, expected [{size}, at most {size}]")
    u = directions.detach().double().cpu()
    gap = float((u.T @ u - torch.eye(u.shape[1], dtype=u.dtype)).abs().max())
    if gap > 1e-4:
        raise GraphError(
            f"the directions for {name!r} are not orthonormal (off by {gap:.2g}); orthonormalise them, "
            "for example torch.linalg.qr(directions)[0]"
        )
    u = torch.linalg.qr(u)[0]  # of directions that were orthonormal up to rounding
    u = u * (u * directions.double().cpu()).sum(0).sign()
    rest = torch.eye(size, dtype=u.dtype) - u @ u.T
    left, _, _ = torch.linalg.svd(rest)
    return torch.cat((u, left[:, : size - u.shape[1]]), 1)
