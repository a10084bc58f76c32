"""`RecurrentModel`: a recurrent module with its network. It answers to the same calls as a transformer's `Model`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitkit.functional.norms import at_least_float32
from circuitkit.graph import Graph
from circuitkit.models.hooked import Model
from circuitkit.models.recurrent import edges, first_order, masked
from circuitkit.models.recurrent.ends import Ends, RecurrentRun, check_finite, check_inputs
from circuitkit.models.recurrent.grouping import Group, Subspaces, make_view
from circuitkit.models.recurrent.many import RecurrentRemovals, RecurrentSweep, patched_by_circuits
from circuitkit.models.recurrent.parts import FEATURES, Network
from circuitkit.models.recurrent.stepper import run_network
from circuitkit.models.recurrent.view import Time, View, read_windows, windows_of
from circuitkit.shapes import Logits

SEGMENTED = 1000  # inputs longer than this are differentiated in segments, so that memory stays O(steps x units)


class RecurrentModel(Model):
    """A trained recurrent network, ready to be recorded, stepped and patched.

    Args:
        module: the user's module, whose weights are used by reference.
        network: its layers as data.
        ends: how it is entered and left.
        name: for messages and files.
        d_vocab: number of token ids, or of numbers read at each step.
        n_ctx: longest input.
        tokenizer: a tokenizer or None.
        card: what is known about it, or {}.
        view: nodes and windows; units, and time collapsed, if None.
    """

    family = "recurrent"

    def __init__(
        self,
        module: nn.Module,
        network: Network,
        ends: Ends,
        *,
        name: str,
        d_vocab: int,
        n_ctx: int = 1_000_000,
        tokenizer: Any = None,
        card: dict[str, Any] | None = None,
        view: View | None = None,
    ) -> None:
        self.module, self.network, self.ends = module, network, ends
        self.name, self.d_vocab, self.n_ctx = name, d_vocab, n_ctx
        self.tokenizer, self.card = tokenizer, card or {}
        self.causal = network.causal
        self.numbers = ends.numbers
        self.d_vocab_out: int | None = None
        self.view = make_view(network) if view is None else view
        self._is_quiet = False

    @property
    def graph(self) -> Graph:
        """Names of writers and readers, and the possible edges."""
        return self.view.graph

    @property
    def width(self) -> int:
        """Numbers that all layers write at a step."""
        return sum(write.size for write in self.network.writes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.module.parameters())).device

    def check(self) -> None:
        """Test by experiment that the stepper is the module. Raises UnsupportedModel naming the law and the gap."""
        from circuitkit.models.recurrent.laws import check_laws

        check_laws(self)

    def viewed(
        self,
        time: Time = "collapsed",
        *,
        steps: int | None = None,
        group: Group = "unit",
        subspaces: Subspaces | None = None,
        read_at: Sequence[int] | None = None,
    ) -> RecurrentModel:
        """The same module with other nodes, or with its edges cut in time.

        Args:
            time: ``"collapsed"`` (one edge for all steps), ``"expanded"`` (one for each step), or windows such as
                ``[(0, 4), (4, 12)]``.
            steps: how long inputs are; needed for ``"expanded"``.
            group: what a node is: ``"unit"``, ``"gate"``, ``"layer"`` or ``"direction"``.
            subspaces: for some writes, by name (``"l0.h"``), orthonormal directions ``[number, direction]`` that
                become writers in place of units; what is left of the state is one more.
            read_at: steps at which answers are read, where time is cut; others get no edges to the logits.

        Raises:
            GraphError: if these do not fit the network.
        """
        windows = windows_of(time, steps)
        places = None if read_at is None else read_windows(windows, read_at)
        view = make_view(self.network, group, subspaces, windows, places)
        out = copy.copy(self)  # of the model, not of the module
        out.view = view
        return out

    def check_answers(self, positions: Int[Tensor, "batch answer"]) -> None:
        """Refuse answers at steps that the view has no read-out for. Raises TaskError."""
        self.view.check_answers(positions)

    def vectors(self, inputs: Tensor) -> Float[Tensor, "batch step size"]:
        """The input vectors of the first recurrent layer. Raises TaskError for inputs that it cannot read."""
        check_inputs(inputs, self.numbers, self.d_vocab)
        with torch.no_grad(), self.quiet():
            return self.ends.enter(inputs.to(self.device)).detach()

    def record(self, tokens: Tensor) -> RecurrentRun:
        """Run the network step by step and keep what every layer writes.

        Raises:
            UnsupportedModel: if a value is not finite; names the first step and layer where it is not.
        """
        return self.record_of(self.vectors(tokens))

    def record_of(self, x: Float[Tensor, "batch step size"]) -> RecurrentRun:
        """The same from input vectors."""
        with torch.no_grad(), self.quiet():
            values = run_network(self.network, x)
        check_finite(self.network, values)
        return RecurrentRun(len(x), (), (x, values[FEATURES]), self.counted(values), values)

    def trace(self, inputs: Tensor) -> dict[str, Float[Tensor, "batch step _"]]:
        """Every site of a run by name: pre-activations (``l0.z_pre``), gates (``l0.z``), states (``l0.h``)."""
        seen: dict[str, list[Tensor]] = {}

        def keep(site: str, value: Tensor, _step: int | None) -> Tensor:
            seen.setdefault(site, []).append(value)
            return value

        x = self.vectors(inputs)
        with torch.no_grad(), self.quiet():
            run_network(self.network, x, edit=keep)
        backward = {block.stem for block in self.network.blocks if block.reverse}
        out = {}
        for site, made in seen.items():
            made = made[::-1] if site.rpartition(".")[0] in backward else made
            value = made[0] if made[0].dim() > 2 else torch.stack([v.expand(len(x), -1) for v in made], 1)
            out[site] = value.expand(*x.shape[:2], -1)
        return {"input": x} | {k: v for k, v in out.items() if not k.startswith(f"{FEATURES}.")}

    def counted(self, values: Mapping[str, Tensor]) -> tuple[Float[Tensor, "batch step _ 1"], ...]:
        """Writes in the basis of their writers."""
        bases = self.view.bases
        each = ((write.name, values[write.name]) for write in self.network.writes)
        return tuple((v @ bases[name].to(v) if name in bases else v)[..., None] for name, v in each)

    def _named(self, writes: Sequence[Tensor]) -> dict[str, Tensor]:
        return {write.name: w.flatten(2) for write, w in zip(self.network.writes, writes, strict=True)}

    def start(self, tokens: Tensor) -> Float[Tensor, "batch step size"]:
        """The input vectors, without running any layer."""
        return self.vectors(tokens)

    def read_out(self, features: Float[Tensor, "*row step feature"]) -> Float[Tensor, "*row step vocab"]:
        """Outputs at every step of what the read-out reads."""
        with self.quiet():
            return self.ends.leave(features)

    def logits(self, x: Float[Tensor, "batch step feature"], positions: Int[Tensor, "batch answer"]) -> Logits:
        """Outputs at the answer positions of what the read-out reads, in float32 or better."""
        if self.ends.positional:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
            return at_least_float32(self.read_out(x))
        out = self.read_out(x)
        if out.shape[1] == 1:  # one answer for the whole sequence, wherever it is asked for
            return at_least_float32(out.expand(-1, positions.shape[1], -1))
        return at_least_float32(out.gather(1, positions[..., None].expand(-1, -1, out.shape[-1])))

    def run_circuits(
        self,
        run: RecurrentRun,  # type: ignore[override]
        corrupt: Sequence[Tensor],
        keep: masked.Keep,
        positions: Int[Tensor, "batch answer"],
        *,
        each: Int[Tensor, "circuit example"] | None = None,
        **_: Any,
    ) -> Float[Tensor, "circuit example answer vocab"]:
        """Logits of several circuits at once; see `circuitkit.models.circuits.run_circuits`."""
        x = masked.rows_of_circuits(run.inputs[0], each)
        other = {name: masked.rows_of_circuits(w, each) for name, w in self._named(corrupt).items()}
        where = positions.expand(len(keep), -1, -1) if each is None else positions[each]
        with self.quiet():
            features = masked.run_masked(self.view, x, other, keep.to(x.device))
            features = features.expand(len(keep), *features.shape[1:])
            return self.logits(features.flatten(0, 1), where.flatten(0, 1)).unflatten(0, (len(keep), -1))

    def patched_edges(  # type: ignore[override]
        self,
        run: RecurrentRun,
        corrupt: Sequence[Tensor],
        positions: Int[Tensor, "batch answer"],
        rows: int,
    ) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "edge batch answer vocab"], Bool[Tensor, "edge batch"]]]:
        """Logits with one edge corrupt at a time, for all edges, and where the edit changed anything."""
        at_once = max(1, rows // run.batch)
        if not edges.simple(self.view):
            yield from patched_by_circuits(self, run, corrupt, positions, at_once)
            return
        other = self._named(corrupt)
        stop = int(positions.max()) + 1 if self.ends.positional else run.inputs[0].shape[1]
        for chunk in edges.chunks(self.view, run.inputs[0].shape[1], at_once):
            with self.quiet():
                features, changed = edges.patched_features(self.view, run.values, other, chunk, stop)
                where = positions.repeat(len(chunk.edges), 1)
                logits = self.logits(features.flatten(0, 1), where).unflatten(0, (len(chunk.edges), -1))
            yield chunk.edges, logits, changed

    def edge_slopes(
        self,
        run: RecurrentRun,  # type: ignore[override]
        x: Float[Tensor, "path batch step size"],
        positions: Int[Tensor, "batch answer"],
        objective: Callable[[Tensor], Tensor],
    ) -> tuple[tuple[Tensor, ...], Any]:
        """The writes of a run at each input of a path, and gradients at every pre-activation summed over the path."""
        where = positions.repeat(len(x), 1)
        segment = max(2, round(x.shape[2] ** 0.5)) if x.shape[2] > SEGMENTED else None
        with self.quiet():
            values, found = first_order.slot_slopes(
                self.view, x.flatten(0, 1), lambda features: objective(self.logits(features, where)), segment=segment
            )
        first = {name: value[: run.batch] for name, value in values.items()}
        return self.counted(first), {slot: g.unflatten(0, x.shape[:2]).sum(0) for slot, g in found.items()}

    def write_difference(self, clean: Sequence[Tensor], corrupt: Sequence[Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """What all layers wrote in one run minus what they wrote in another, by name."""
        a, b = self._named(clean), self._named(corrupt)
        return {name: a[name] - b[name] for name in a}

    def add_scores(self, scores: Float[Tensor, "batch src dst"], delta: Any, slopes: Any) -> None:
        """Add first-order scores of all edges; see `edge_slopes`."""
        first_order.add_scores(self.view, scores, delta, slopes)

    def differs(self, writes: Sequence[Tensor], corrupt: Sequence[Tensor]) -> Bool[Tensor, " src"]:
        """Writers whose corrupt value is not, on every example, exactly what they wrote."""
        out = torch.zeros(self.view.shape[:2], dtype=torch.bool)
        for write, a, b in zip(self.network.writes, writes, corrupt, strict=True):
            changed = (a != b).flatten(2).any(0).cpu()  # step, number
            window = self.view.window_of(len(changed))
            step, number = changed.nonzero(as_tuple=True)
            out[window[step], self.view.writer_of[write.name][number]] = True
        return out.flatten()

    def sweep(self, tokens: Tensor, corrupt_of: Callable[[Any], Any]) -> RecurrentSweep:  # type: ignore[override]
        """A clean run of which many circuits are computed."""
        return RecurrentSweep(self, tokens, corrupt_of)

    def removals(  # type: ignore[override]
        self, tokens: Tensor, positions: Int[Tensor, "batch answer"], corrupt_of: Callable[[Any], Any]
    ) -> RecurrentRemovals:
        """A clean run from which edges are removed one after the other."""
        return RecurrentRemovals(self, tokens, positions, corrupt_of)

    def run_bytes(self, length: int) -> float:
        """Bytes per example of a recorded run."""
        return 4.0 * length * (2 * self.width + sum(s.size for _, st in self.network.stages for s in st.slots))

    def matrix_bytes(self, length: int) -> float:
        """Bytes per example, or circuit and example, of what all layers write, and of one edge matrix."""
        return 2 * self.run_bytes(length) + 8.0 * self.graph.mask.numel()

    def backward_bytes(self, length: int) -> float:
        """Bytes per example that a backward pass keeps: a rough count over steps."""
        kept = length if length <= SEGMENTED else 3 * length**0.5
        return self.run_bytes(length) + 5 * self.run_bytes(round(kept))

    def step_bytes(self, length: int) -> float:
        """Bytes per example of a masked run and its backward pass."""
        return self.backward_bytes(length) + 16.0 * self.graph.mask.numel()
