"""A recurrent network as data: who writes, who reads, by which weights and how many steps later.

    r(t) = b + sum over links of  W a(t - lag)          every reader's pre-activation is a sum over writers
    a(t) = step(r(t))                                   what a stage makes of its readers; nonlinear, local in time

The same bilinear fact as in a transformer: an edge u -> v carries ``W[v, u] a_u(t - lag)``, and the graph may have
cycles. A gate times a value is two readers of one product, as q, k and v are three readers of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import UnsupportedModel

See = Callable[[str, Tensor], Tensor]
Step = Callable[[Mapping[str, Tensor], See], Mapping[str, Tensor]]
FEATURES = "logits"  # what the read-out reads, and the reader's name
Getter = Callable[[], Tensor]  # tensors are fetched when a run begins, so the user's weights stay the only copy


@dataclass(frozen=True, eq=False)
class Write:
    """A vector that one stage computes at every step and others read: ``n`` writers of ``width`` numbers each.

    Args:
        name: unique in the network; writers are called ``name0``, ``name1``, ... (just ``name`` if there is one).
        n: how many writers.
        width: numbers per writer (2 for a complex unit, many for an embedding).
        start: the vector before the first step; zeros if None.
        kind: kind of the nodes, as in `circuitkit.graph.Node`.
    """

    name: str
    n: int
    width: int = 1
    start: Getter | None = None
    kind: str = "unit"

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return self.n * self.width


@dataclass(frozen=True, eq=False)
class Slot:
    """A vector of pre-activations: ``n`` readers of ``width`` numbers each.

    Args:
        name: unique in its stage; the gate's name, or "" if the stage has one slot only.
        n: how many readers.
        width: numbers per reader.
        feeds: names of the writes whose i-th writer the i-th reader is an input of.
        feeds_all: names of the writes all of whose writers every reader is an input of.
        bias: added to the sum over links, or None.
    """

    name: str
    n: int
    width: int = 1
    feeds: tuple[str, ...] = ()
    feeds_all: tuple[str, ...] = ()
    bias: Getter | None = None

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return self.n * self.width


@dataclass(frozen=True, eq=False)
class Link:
    """Edges from one write to some slots of a stage, by one matrix.

    Args:
        source: name of the write.
        slots: names of the slots, in the order of the matrix's rows.
        weight: ``[numbers in the slots, numbers in the write]``; None where each number reads its own.
        lag: how many steps earlier the write was made (later, in a layer that runs backward).
    """

    source: str
    slots: tuple[str, ...]
    weight: Getter | None = None
    lag: int = 0


@dataclass(frozen=True, eq=False)
class Stage:
    """What is computed together at one step: slots are read, ``step`` makes writes of them.

    Args:
        slots: in the order of the graph's columns.
        writes: in the order of the graph's rows.
        links: all edges into the slots.
        step: ``(slots by name, see) -> writes by name``, elementwise over leading axes. It passes every value
            that a user may want to look at or change through ``see(name, value)``.
        sites: the names that ``step`` shows.
    """

    slots: tuple[Slot, ...]
    writes: tuple[Write, ...]
    links: tuple[Link, ...]
    step: Step
    sites: tuple[str, ...] = ()

    def slot(self, name: str) -> Slot:
        """The slot of that name."""
        return next(slot for slot in self.slots if slot.name == name)


@dataclass(frozen=True, eq=False)
class Block:
    """Stages that pass through time together; blocks run one after the other, each over all steps.

    Args:
        layer: 0-based layer, for names and pictures.
        stages: in order of computation within a step.
        reverse: whether time runs backward.
        across: whether the only stage sees all steps at once (pooling over time).
        stem: what its sites are called by: ``l0``.
    """

    layer: int
    stages: tuple[Stage, ...]
    reverse: bool = False
    across: bool = False
    stem: str = ""

    @cached_property
    def writes(self) -> tuple[Write, ...]:
        """All writes of the stages."""
        return tuple(write for stage in self.stages for write in stage.writes)

    @cached_property
    def own(self) -> frozenset[str]:
        """Names of the writes made here."""
        return frozenset(write.name for write in self.writes)

    @cached_property
    def recurrent(self) -> bool:
        """Whether a stage reads what this block writes."""
        return any(link.source in self.own for stage in self.stages for link in stage.links)

    @cached_property
    def memory(self) -> int:
        """How many earlier steps are read."""
        return max((x.lag for s in self.stages for x in s.links if x.source in self.own), default=0)


@dataclass(frozen=True, eq=False)
class Network:
    """All of a recurrent network between its input vectors and the features that its read-out reads.

    Args:
        input: the first write; nothing feeds it.
        blocks: in order of computation.
        features: names of the writes that the read-out reads, joined in this order at every step.
    """

    input: Write
    blocks: tuple[Block, ...]
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        known = {self.input.name}
        for block in self.blocks:
            names = [write.name for write in block.writes]
            if known & set(names) or len(set(names)) < len(names):
                raise UnsupportedModel(f"two writes of the network have the name {(known & set(names)) or names}")
            known |= set(names)
            _check_links(block, known)
        if missing := set(self.features) - known:
            raise UnsupportedModel(f"the read-out reads {sorted(missing)}, which nothing writes")

    @cached_property
    def writes(self) -> tuple[Write, ...]:
        """The input and all writes, in order of computation."""
        return (self.input, *(write for block in self.blocks for write in block.writes))

    @cached_property
    def readout(self) -> Block:
        """The read of what the network gives: one slot for each feature, all of them one reader, ``logits``."""
        slots, links = [], []
        for name in self.features:
            slots.append(Slot(name, 1, self.write(name).size))
            links.append(Link(name, (name,)))
        width = sum(slot.size for slot in slots)
        stage = Stage(tuple(slots), (Write(FEATURES, 1, width, kind="logits"),), tuple(links), _joined)
        return Block(max((block.layer for block in self.blocks), default=-1) + 1, (stage,), stem=FEATURES)

    @cached_property
    def stages(self) -> tuple[tuple[Block, Stage], ...]:
        """All stages, the read-out's last, in order of computation."""
        return tuple((block, stage) for block in (*self.blocks, self.readout) for stage in block.stages)

    @cached_property
    def causal(self) -> bool:
        """Whether no step depends on a later one."""
        return not any(block.reverse or block.across for block in self.blocks)

    def write(self, name: str) -> Write:
        """The write of that name."""
        return next(write for write in self.writes if write.name == name)


@dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a network as one run uses them, fetched once.

    Args:
        links: for each link its matrix transposed ``[source, rows]``, or None for one that is the identity.
        biases: for each slot its bias, or None.
        starts: for each write its vector before the first step.
    """

    links: Mapping[Link, Float[Tensor, "_ _"] | None]
    biases: Mapping[Slot, Float[Tensor, " _"] | None]
    starts: Mapping[str, Float[Tensor, " _"]]

    @classmethod
    def of(cls, network: Network, like: Tensor) -> Weights:
        """The current weights, in the dtype and on the device of a tensor."""
        links: dict[Link, Tensor | None] = {}
        biases: dict[Slot, Tensor | None] = {}
        for _, stage in network.stages:
            links |= {link: None if link.weight is None else link.weight().detach().T.to(like) for link in stage.links}
            biases |= {slot: None if slot.bias is None else slot.bias().detach().to(like) for slot in stage.slots}
        starts = {
            write.name: like.new_zeros(write.size) if write.start is None else write.start().detach().to(like).flatten()
            for write in network.writes
        }
        return cls(links, biases, starts)


def _joined(slots: Mapping[str, Tensor], _see: See) -> dict[str, Tensor]:
    parts = list(slots.values())
    return {FEATURES: parts[0] if len(parts) == 1 else torch.cat(parts, -1)}


def _check_links(block: Block, known: set[str]) -> None:
    done = known - block.own
    for stage in block.stages:
        for link in stage.links:
            if link.source not in known:
                raise UnsupportedModel(f"layer {block.layer} reads {link.source!r}, which nothing before it writes")
            if link.lag == 0 and link.source not in done:
                raise UnsupportedModel(f"layer {block.layer} reads {link.source!r} of the same step before it is made")
            if block.across and link.source in block.own:
                raise UnsupportedModel(f"layer {block.layer} sees all steps at once and cannot read itself")
        done |= {write.name for write in stage.writes}
    if not block.recurrent and len(block.stages) > 1:
        raise UnsupportedModel(f"layer {block.layer} has no recurrence: give each of its stages a block of its own")
