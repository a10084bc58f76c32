"""Many circuits of one recurrent batch: for curves and random circuits, and for edges removed one after the other.

A recurrent graph has cycles, so an edit is felt everywhere: each circuit is run whole. They share the clean run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.select import prune_dangling
from circuitkit.shapes import EdgeMask

if TYPE_CHECKING:
    from circuitkit.models.recurrent.model import RecurrentModel, RecurrentRun


class RecurrentSweep:
    """A clean run, and what removed edges carry.

    Args:
        model: the model.
        inputs: clean.
        corrupt_of: from the clean run to what each write carries along a removed edge.
    """

    def __init__(
        self,
        model: RecurrentModel,
        inputs: Tensor,
        corrupt_of: Callable[[RecurrentRun], Sequence[Tensor]],
    ) -> None:
        self.model, self.run = model, model.record(inputs)
        self.corrupt = corrupt_of(self.run)

    def logits(
        self, keep: Bool[Tensor, "circuit src dst"], positions: Int[Tensor, "batch answer"]
    ) -> Float[Tensor, "circuit batch answer vocab"]:
        """Logits of several circuits."""
        with torch.no_grad():
            return self.model.run_circuits(self.run, self.corrupt, keep, positions)


class RecurrentRemovals(RecurrentSweep):
    """The circuit in hand, on one batch: at first the whole model; see `circuitkit.models.removals`."""

    def __init__(
        self,
        model: RecurrentModel,
        inputs: Tensor,
        positions: Int[Tensor, "batch answer"],
        corrupt_of: Callable[[RecurrentRun], Sequence[Tensor]],
    ) -> None:
        super().__init__(model, inputs, corrupt_of)
        self.positions = positions
        self.settle(model.graph.mask, [])

    def settle(self, keep: EdgeMask, _columns: Sequence[int]) -> None:
        """Make another circuit the one in hand."""
        graph = self.model.graph
        self.alive = prune_dangling(keep.cpu(), graph.feeds).any(0)

    def bytes_per_circuit(self, _columns: Sequence[int]) -> float:
        """A rough count of what one circuit takes."""
        length = self.run.inputs[0].shape[1]
        return self.run.batch * self.model.run_bytes(length) + 8.0 * self.model.graph.mask.numel()

    def logits(
        self, keep: Bool[Tensor, "circuit src dst"], _columns: Sequence[int] | Tensor
    ) -> Float[Tensor, "circuit batch answer vocab"]:
        """Logits of circuits."""
        return super().logits(keep, self.positions)


def patched_by_circuits(
    model: RecurrentModel,
    run: RecurrentRun,
    corrupt: Sequence[Tensor],
    positions: Int[Tensor, "batch answer"],
    at_once: int,
) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "edge batch answer vocab"], Bool[Tensor, "edge batch"]]]:
    """Logits with one edge corrupt at a time, each as a circuit of all the others: for nodes of any kind.

    Also says which edges can have changed anything: those whose writer's corrupt value differs.
    """
    differs = model.differs(run.writes, corrupt)
    for some in model.graph.mask.nonzero().split(at_once):
        keep = model.graph.mask.repeat(len(some), 1, 1)
        keep[torch.arange(len(some)), some[:, 0], some[:, 1]] = False
        with torch.no_grad():
            logits = model.run_circuits(run, corrupt, keep, positions)
        edges = [(int(u), int(v)) for u, v in some.tolist()]
        yield edges, logits, differs[some[:, 0]][:, None].expand(logits.shape[:2]).to(logits.device)
