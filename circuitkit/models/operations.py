"""What methods ask of a model, answered from a transformer's wiring.

A recurrent network (`circuitkit.models.recurrent.model`) answers the same calls in its own way, so that a method that
asks for nothing else works on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.attribution import edge_scores
from circuitkit.graph import Graph
from circuitkit.models.wiring import Wiring
from circuitkit.shapes import Logits, Tokens

if TYPE_CHECKING:
    from circuitkit.models.circuits import Keep
    from circuitkit.models.hooked import Model, Run
    from circuitkit.models.removals import Removals
    from circuitkit.models.sweep import Sweep


class EdgeOperations:
    """Circuits, patched edges, slopes and removals of a model with a `Wiring`."""

    family = "transformer"
    numbers: int | None = None  # how many numbers are read at each position, where these are not token ids
    wiring: Wiring

    @property
    def graph(self) -> Graph:
        """Names of writers and readers, and the possible edges."""
        return self.wiring.graph

    @property
    def _model(self) -> Model:
        return cast("Model", self)

    @property
    def width(self) -> int:
        """Width of the stream."""
        return self.wiring.width

    def check_answers(self, positions: Int[Tensor, "batch answer"]) -> None:
        """Refuse answers where this model's graph has no read-out; a transformer's has one everywhere."""

    def run_circuits(
        self,
        run: Run,
        corrupt: tuple[Tensor, ...],
        keep: Keep,
        positions: Int[Tensor, "batch answer"],
        *,
        start: int = 0,
        each: Int[Tensor, "circuit example"] | None = None,
    ) -> Float[Tensor, "circuit example answer vocab"]:
        """Logits of several circuits at once; see `circuitkit.models.circuits.run_circuits`."""
        from circuitkit.models.circuits import run_circuits

        return run_circuits(self._model, run, corrupt, keep, positions, start=start, each=each)

    def patched_edges(
        self, run: Run, corrupt: tuple[Tensor, ...], positions: Int[Tensor, "batch answer"], rows: int
    ) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "edge batch answer vocab"], Bool[Tensor, "edge batch"]]]:
        """Logits with one edge corrupt at a time, for all edges, and where the edit changed anything at all.

        Args:
            rows: how many edges times examples are run together.
        """
        from circuitkit.models.edits import edge_chunks, patch_edges

        delta = self.wiring.expand_difference(run.writes, corrupt)
        for site in self.wiring.read_sites:
            for edges in edge_chunks(self._model, site, max(1, rows // run.batch)):
                yield edges, *patch_edges(self._model, run, delta, site, edges, positions)

    def edge_slopes(
        self,
        run: Run,
        x: Float[Tensor, "step batch pos d"],
        positions: Int[Tensor, "batch answer"],
        objective: Callable[[Logits], Tensor],
    ) -> tuple[tuple[Tensor, ...], Any]:
        """The writes of a run at the last of some inputs, and gradients at every reader summed over these inputs."""
        from circuitkit.models.edits import reader_gradients

        return reader_gradients(self._model, run, x, positions, objective)

    def write_difference(self, clean: tuple[Tensor, ...], corrupt: tuple[Tensor, ...]) -> Any:
        """What all writers wrote in one run minus what they wrote in another, as `add_scores` takes it."""
        return self.wiring.expand_difference(clean, corrupt)

    def add_scores(self, scores: Float[Tensor, "batch src dst"], delta: Any, slopes: Any) -> None:
        """Add the first-order score of every edge, from a difference of writes and what `edge_slopes` gave."""
        for columns, gradient in slopes:
            n = int(self.graph.mask[:, columns].any(1).nonzero().max()) + 1
            scores[:, :n, columns] += edge_scores(delta[:n], gradient)

    def differs(self, writes: tuple[Tensor, ...], corrupt: tuple[Tensor, ...]) -> Bool[Tensor, " src"]:
        """Writers whose corrupt value is not, on every example, exactly what they wrote."""
        out = torch.zeros(len(self.graph.sources), dtype=torch.bool)
        for site, a, b in zip(self.wiring.write_sites, writes, corrupt, strict=True):
            out[site.rows] = (a != b).movedim(2, 0).flatten(1).any(1).cpu()
        return out

    def removals(
        self, tokens: Tokens, positions: Int[Tensor, "batch answer"], corrupt_of: Callable[[Any], tuple[Tensor, ...]]
    ) -> Removals:
        """A clean run from which edges are removed one after the other; see `circuitkit.models.removals`."""
        from circuitkit.models.removals import Removals

        return Removals(self._model, tokens, positions, corrupt_of)

    def sweep(self, tokens: Tokens, corrupt_of: Callable[[Any], tuple[Tensor, ...]]) -> Sweep:
        """A clean run of which many circuits are computed; see `circuitkit.models.sweep`."""
        from circuitkit.models.sweep import record_streams, start_sweep

        run, streams = record_streams(self._model, tokens)
        return start_sweep(self._model, run, streams, corrupt_of(run))

    def run_bytes(self, length: int) -> float:
        """Bytes per example of a recorded run: the stream at each block and all writes."""
        return 4.0 * length * self.width * 4 * (len(self.wiring.blocks) + 1)

    def matrix_bytes(self, length: int) -> float:
        """Bytes per example of the writes of all components in full width, and of one block's readers."""
        readers = 3 * max(site.n for site in self.wiring.read_sites)
        return 4.0 * length * self.width * (len(self.graph.sources) + 1.5 * readers)

    def backward_bytes(self, length: int) -> float:
        """Bytes per example that a backward pass keeps: a rough count over blocks.

        For GPT-2 small at 16 tokens it says 18.3 MB; 18.5 MB were measured.
        """
        nodes = self.graph.destination_nodes
        heads = max(site.n for site in self.wiring.read_sites if nodes[site.first].kind != "neuron")
        return 4.0 * len(self.wiring.blocks) * length * (30 * self.width + 4 * heads * length)

    def step_bytes(self, length: int) -> float:
        """Bytes per example of a masked run and its backward pass, which keeps every reader's stream and its norm.

        For stories260k at 24 tokens it says 2.9 MB; what the backward pass keeps was measured as 1.6 MB.
        """
        streams = 4.0 * length * self.width * len(self.graph.destinations)
        return 2 * streams + self.matrix_bytes(length) + self.backward_bytes(length)
