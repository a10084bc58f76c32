"""The graph of a recurrent network: which numbers make up a node, and how time is cut.

    collapsed   one edge u -> v for all steps: the graph has cycles and self-loops
    windows     one edge u@s -> v@w for the steps of window w that read what u wrote in window s
    expanded    windows of one step each

A node is a unit, a gate, a layer, a direction, or a subspace of what a write holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import GraphError, TaskError
from circuitkit.functional.select import prune_dangling
from circuitkit.graph import Graph
from circuitkit.models.recurrent.parts import Block, Link, Network, Slot, Stage

Windows = tuple[tuple[int, int], ...]
Time = Literal["collapsed", "expanded"] | Sequence[tuple[int, int]]
MOST_ENTRIES = 400_000_000  # of the edge matrix, which grows with the square of the number of windows


@dataclass(frozen=True, eq=False)
class View:
    """A network with its nodes and windows.

    Args:
        network: whose nodes these are.
        base: the graph of one window, without time.
        writer_of: for each write the number of the writer that each of its numbers belongs to.
        reader_of: for each slot the number of the reader that each of its numbers belongs to.
        bases: for writes whose writers are subspaces, the orthonormal basis; its columns are what is counted.
        windows: first step and last step + 1 of each window; None if all steps share their edges.
        read_at: windows in which answers are read; None for all.
    """

    network: Network
    base: Graph
    writer_of: Mapping[str, Int[Tensor, " _"]]
    reader_of: Mapping[Slot, Int[Tensor, " _"]]
    bases: Mapping[str, Float[Tensor, "_ _"]]
    windows: Windows | None = None
    read_at: tuple[int, ...] | None = None

    @property
    def n_windows(self) -> int:
        """How many windows; 1 if time is collapsed."""
        return 1 if self.windows is None else len(self.windows)

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an edge matrix: windows, writers, windows, readers."""
        return self.n_windows, len(self.base.sources), self.n_windows, len(self.base.destinations)

    def window_of(self, n_steps: int) -> Int[Tensor, " step"]:
        """Number of the window of each step. Raises TaskError where inputs are longer than the windows."""
        if self.windows is None:
            return torch.zeros(n_steps, dtype=torch.long)
        if n_steps > self.windows[-1][1]:
            raise TaskError(
                f"inputs have {n_steps} steps, the graph's windows end at {self.windows[-1][1]}; "
                "make the graph for as many steps, or use time='collapsed'"
            )
        out = torch.empty(self.windows[-1][1], dtype=torch.long)
        for number, (first, stop) in enumerate(self.windows):
            out[first:stop] = number
        return out[:n_steps]

    def check_answers(self, positions: Int[Tensor, "batch answer"]) -> None:
        """Refuse answers at steps from which no edge leads to the logits. Raises TaskError."""
        if self.windows is None or self.read_at is None:
            return
        steps = positions.flatten().cpu()
        window = self.window_of(self.windows[-1][1])[steps.clamp(max=self.windows[-1][1] - 1)]
        missed = steps[~torch.isin(window, torch.tensor(self.read_at))].unique().tolist()
        if missed:
            raise TaskError(
                f"answers are read at step {missed[0]}, and the graph was made for answers in the windows "
                f"{[self.windows[i] for i in self.read_at]}; make it with read_at={sorted(set(steps.tolist()))}, or "
                "leave read_at out"
            )

    def pairs(self, n_steps: int, lag: int, *, reverse: bool) -> list[tuple[int, int, Int[Tensor, " step"]]]:
        """For a link: window of the writer, window of the reader, and the steps at which such edges carry something."""
        window = self.window_of(n_steps)
        steps = torch.arange(n_steps)
        back = steps + lag if reverse else steps - lag
        real = (back >= 0) & (back < n_steps)
        if self.windows is None:
            return [(0, 0, steps)]
        steps, back = steps[real], back[real]
        codes = window[back] * self.n_windows + window[steps]
        return [(int(c) // self.n_windows, int(c) % self.n_windows, steps[codes == c]) for c in codes.unique()]

    @cached_property
    def graph(self) -> Graph:
        """The graph of all windows; its rows and columns are those of `shape`."""
        if self.windows is None:
            return self.base
        n = self.n_windows
        if n * n * self.base.mask.numel() > MOST_ENTRIES:
            raise GraphError(
                f"{n} windows of {len(self.base.sources)} writers make an edge matrix of "
                f"{n * n * self.base.mask.numel():,} entries, at most {MOST_ENTRIES:,} are held; "
                "use fewer and longer windows, larger groups, or time='collapsed'"
            )
        mask = torch.zeros(self.shape, dtype=torch.bool)
        for block, stage, link in links_of(self.network):
            allowed = self.link_mask(stage, link)
            for ws, wd, _ in self.pairs(self.windows[-1][1], link.lag, reverse=block.reverse):
                mask[ws, :, wd] |= allowed
        logits = [i for i, node in enumerate(self.base.destination_nodes) if node.kind == "logits"]
        for w in set(range(n)) - set(range(n) if self.read_at is None else self.read_at):
            mask[:, :, w, logits] = False
        feeds = torch.zeros(n, len(self.base.destinations), n, len(self.base.sources), dtype=torch.bool)
        for s, d in (torch.ones(n, n).nonzero() if self._across else torch.arange(n)[:, None].expand(-1, 2)).tolist():
            feeds[s, :, d] = self.base.feeds if s == d else self._across_feeds
        names = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in self.windows]
        feeds = feeds.flatten(2).flatten(0, 1)
        writers = tuple(_copy(node, name, w) for w, name in enumerate(names) for node in self.base.source_nodes)
        readers = tuple(_copy(node, name, w) for w, name in enumerate(names) for node in self.base.destination_nodes)
        return Graph(writers, readers, prune_dangling(mask.flatten(2).flatten(0, 1), feeds), feeds)

    @cached_property
    def _across(self) -> bool:
        return any(block.across for block in self.network.blocks)

    @cached_property
    def _across_feeds(self) -> Tensor:
        """Which readers feed which writers of other windows: those of stages that see all steps at once."""
        rows = torch.zeros(len(self.base.destinations), dtype=torch.bool)
        for block in self.network.blocks:
            for slot in (slot for stage in block.stages for slot in stage.slots if block.across):
                rows[self.reader_of[slot]] = True
        return self.base.feeds & rows[:, None]

    def link_mask(self, stage: Stage, link: Link) -> Tensor:
        """Which edges of the base graph a link may carry."""
        return _link_mask(self.base.mask, stage, link, self.writer_of, self.reader_of, self.bases)

    def rows(self, name: str) -> Int[Tensor, " writer"]:
        """Rows of a write's writers in the base graph."""
        return self.writer_of[name].unique()


def _copy(node, name: str, window: int):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(node, name=f"{node.name}@{name}", span=name, stage=window * 1000 + node.stage)


def links_of(network: Network) -> list[tuple[Block, Stage, Link]]:
    """All links, the read-out's last."""
    return [(block, stage, link) for block, stage in network.stages for link in stage.links]


def _link_mask(
    like: Tensor,
    stage: Stage,
    link: Link,
    writer_of: Mapping[str, Tensor],
    reader_of: Mapping[Slot, Tensor],
    bases: Mapping[str, Tensor],
) -> Tensor:
    mask = torch.zeros_like(like)
    writers = writer_of[link.source]
    readers = torch.cat([reader_of[stage.slot(name)] for name in link.slots])
    if link.weight is None and link.source not in bases:
        mask[writers, readers] = True
    else:
        mask[writers.unique()[:, None], readers.unique()[None, :]] = True
    return mask


def base_mask(
    n_writers: int,
    n_readers: int,
    network: Network,
    writer_of: Mapping[str, Tensor],
    reader_of: Mapping[Slot, Tensor],
    bases: Mapping[str, Tensor],
) -> Tensor:
    """The possible edges of the graph without time."""
    mask = torch.zeros(n_writers, n_readers, dtype=torch.bool)
    for _, stage, link in links_of(network):
        mask |= _link_mask(mask, stage, link, writer_of, reader_of, bases)
    return mask


def windows_of(time: Time, n_steps: int | None) -> Windows | None:
    """Windows from what a user says.

    Raises:
        GraphError: if they do not tile the steps from 0 on, or ``"expanded"`` is asked for without a number of steps.

    >>> windows_of("expanded", 2), windows_of([(0, 4), (4, 6)], None), windows_of("collapsed", 9)
    (((0, 1), (1, 2)), ((0, 4), (4, 6)), None)
    """
    if isinstance(time, str):
        if time == "collapsed":
            return None
        if time != "expanded":
            raise GraphError(
                f"got time = {time!r}, expected 'collapsed', 'expanded' or windows such as [(0, 4), (4, 12)]"
            )
        if n_steps is None or n_steps < 1:
            raise GraphError("time = 'expanded' needs steps = how many steps the inputs have")
        return tuple((t, t + 1) for t in range(n_steps))
    windows = tuple((int(a), int(b)) for a, b in time)
    ends = [0, *(b for _, b in windows)]
    if not windows or any(a != end or b <= a for (a, b), end in zip(windows, ends[:-1], strict=True)):
        raise GraphError(f"got windows {list(time)}, expected them to tile the steps: [(0, 4), (4, 12)]")
    if n_steps is not None and n_steps != ends[-1]:
        raise GraphError(f"the windows end at step {ends[-1]}, and steps = {n_steps}; let them agree, or leave one out")
    return windows


def read_windows(windows: Windows | None, read_at: Sequence[int]) -> tuple[int, ...]:
    """Numbers of the windows in which answers are read.

    Raises:
        GraphError: if time is not cut, or a step is beyond the last window.

    >>> read_windows(((0, 4), (4, 6)), [-1])
    (1,)
    """
    if windows is None:
        raise GraphError(
            "read_at says which steps keep a read-out, and with time='collapsed' there is one for all steps"
        )
    n = windows[-1][1]
    if outside := [t for t in read_at if not -n <= t < n]:
        raise GraphError(f"got read_at = {list(read_at)}, expected steps below {n}; {outside[0]} is none of them")
    return tuple(i for i, (a, b) in enumerate(windows) if any(a <= t % n < b for t in read_at))
