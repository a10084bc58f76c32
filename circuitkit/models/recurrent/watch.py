"""A module with recurrent layers, watched while it runs: what its layers are given, and what they return."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from circuitkit.errors import UnsupportedModel
from circuitkit.models.hooks import quiet
from circuitkit.models.recurrent.cells.base import Cell, cell_of, cells

PROBE_STEPS = 5


def recurrent_layers(module: nn.Module) -> list[nn.Module]:
    """The modules inside (or the module itself) that a registered cell describes, outermost only.

    Raises:
        UnsupportedModel: for a subclass of a registered cell, which may compute something else.
    """
    if cell_of(module) is not None:
        return [module]
    known = next((kind for kind in cells() if isinstance(module, kind)), None)
    if known is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} is a subclass of {known.__name__} and may compute something else (as weight_norm "
            "and other parametrisations do); remove the parametrisation, or register the class as a cell "
            "(docs/cells.md)"
        )
    return [layer for child in module.children() for layer in recurrent_layers(child)]


class _Stop(Exception):
    """Raised by our own hook to end a forward pass early."""


@dataclass
class Call:
    """One call of a recurrent layer: its input, batch first, the state it was given, and what it returned."""

    layer: nn.Module
    x: Tensor
    state: Any
    output: Any = None
    packed: bool = False


@dataclass
class Seen:
    """All calls of one pass."""

    calls: list[Call] = field(default_factory=list)
    result: Any = None

    def of(self, layer: nn.Module) -> list[Call]:
        """The calls of one layer, in order."""
        return [call for call in self.calls if call.layer is layer]


class Watched:
    """A module that was watched on random inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = recurrent_layers(module)
        if not self.layers:
            raise UnsupportedModel(f"{type(module).__name__} holds no recurrent layer that circuitkit knows")
        self.bare = self.layers[0] is module
        self.cells: dict[nn.Module, Cell] = {layer: cell_of(layer) for layer in self.layers}  # type: ignore[misc]
        self.d_vocab, self.numbers = self._reads()
        with torch.no_grad(), quiet(module):
            self.seen = [self.watch(self.probe(3, PROBE_STEPS, seed)) for seed in (0, 1)]
        self.layers = list(dict.fromkeys(call.layer for call in self.seen[0].calls))
        self.tuples = {layer: isinstance(self.seen[0].of(layer)[0].output, tuple | list) for layer in self.layers}

    # What it reads.

    def _reads(self) -> tuple[int | None, int | None]:
        """Number of token ids, or how many numbers are read at each step."""
        if self.bare:
            return None, _input_size(self.module)
        table = next((m for m in self.module.modules() if isinstance(m, nn.Embedding)), None)
        if table is not None:
            return table.num_embeddings, None
        reads = (nn.Linear, nn.Conv1d)
        others = [m for m in self.module.modules() if isinstance(m, reads)]
        sizes = dict.fromkeys(_input_size(m) for m in (self.layers[0], *others))
        errors = []
        for size in sizes:
            self.d_vocab, self.numbers = None, size
            try:
                with torch.no_grad(), quiet(self.module):
                    self.watch(self.probe(3, PROBE_STEPS, 0))
                return None, size
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                errors.append(f"{size} numbers per step: {error}")
        raise UnsupportedModel(
            f"{type(self.module).__name__} takes neither token ids nor numbers [batch, step, size] ("
            + "; ".join(errors)
            + "); give it a forward that does"
        )

    def probe(self, batch: int, steps: int, seed: int | None) -> Tensor:
        """Random inputs, or zeros without a seed."""
        like = next(self.module.parameters())
        if self.numbers is None:
            if seed is None:
                return torch.zeros(batch, steps, dtype=torch.long, device=like.device)
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(int(self.d_vocab or 1), (batch, steps), generator=generator).to(like.device)
        if seed is None:
            return torch.zeros(batch, steps, self.numbers, device=like.device, dtype=like.dtype)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, steps, self.numbers, generator=generator).to(like)

    # How it runs.

    def run(self, inputs: Tensor) -> Any:
        """The user's forward pass; a recurrent layer alone is called as it wants to be."""
        if not self.bare:
            takes = inspect.signature(self.module.forward).parameters
            if "lengths" in takes:
                return self.module(inputs, lengths=torch.full((len(inputs),), inputs.shape[1]))
            return self.module(inputs)
        if self.cells[self.module].once:
            state, outputs = None, []
            for t in range(inputs.shape[1]):
                state = self.module(inputs[:, t], state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs, 1)
        out = self.module(as_taken(self.module, inputs))
        return batch_first(self.module, out[0] if isinstance(out, tuple | list) else out)

    def watch(self, inputs: Tensor, *, stop: bool = False) -> Seen:
        """Run it and keep what its recurrent layers were given; ``stop`` ends the pass when the first is called."""
        seen, handles = Seen(), []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            x, state = given[0], given[1] if len(given) > 1 else None
            packed = isinstance(x, PackedSequence)
            seen.calls.append(Call(layer, self.padded(layer, x), state, packed=packed))
            if stop and not self.cells[layer].once:
                raise _Stop

        def after(_layer: nn.Module, _args: Any, output: Any) -> None:
            seen.calls[-1].output = output

        try:
            for layer in self.layers:
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(layer.register_forward_hook(after))
            seen.result = self.run(inputs)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def enter(self, inputs: Tensor) -> Float[Tensor, "batch step size"]:
        """The input vectors of the first recurrent layer."""
        first = self.layers[0]
        calls = self.watch(inputs, stop=True).of(first)
        return torch.stack([call.x for call in calls], 1) if self.cells[first].once else calls[0].x

    def start_of(self, layer: nn.Module) -> Any:
        """The state before the first step that the user's code passes to a layer now, of one example."""
        with torch.no_grad(), quiet(self.module):
            state = self.watch(self.probe(1, 1, None)).of(layer)[0].state
        axis = 0 if self.cells[layer].once else 1
        parts = tuple(part.select(axis, 0) for part in tensors_of(state))
        return parts if len(parts) > 1 else parts[0]

    def padded(self, layer: nn.Module, x: Any) -> Tensor:
        """What goes into or comes out of a layer, batch first and unpacked."""
        if not isinstance(x, PackedSequence):
            return x.detach() if self.cells[layer].once else batch_first(layer, x.detach())
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        if int(lengths.min()) != int(lengths.max()) and getattr(layer, "bidirectional", False):
            raise UnsupportedModel(
                f"{type(layer).__name__} reads packed sequences of {int(lengths.min())} to {int(lengths.max())} steps "
                "in both directions; give one batch per length, so that nothing is padded"
            )
        return padded


def _input_size(layer: nn.Module) -> int:
    names = ("input_size", "in_features", "in_channels")
    size = next((value for value in (getattr(layer, name, None) for name in names) if value), None)
    if size is None:
        raise UnsupportedModel(f"{type(layer).__name__} has no input_size; give it one, so that it can be tried out")
    return int(size)


def first_of(output: Any) -> Any:
    """The outputs, of what a layer or module returns."""
    return output[0] if isinstance(output, tuple | list) and not isinstance(output, PackedSequence) else output


def tensors_of(state: Any) -> list[Tensor]:
    """The tensors of a state."""
    return list(state) if isinstance(state, tuple | list) else [state]


def batch_first(layer: nn.Module, x: Tensor) -> Tensor:
    """A tensor of a layer with the batch as first axis."""
    return x if getattr(layer, "batch_first", True) else x.transpose(0, 1)


as_taken = batch_first  # swapping the first two axes is its own inverse


def outputs_of(result: Any) -> Float[Tensor, "batch step vocab"]:
    """A module's outputs: the first tensor of what it returns, with an axis of steps."""
    out = first_of(result)
    if isinstance(out, PackedSequence):
        out = pad_packed_sequence(out, batch_first=True)[0]
    out = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(out, Tensor) or out.dim() not in (2, 3):
        raise UnsupportedModel(
            f"got outputs {getattr(out, 'shape', type(out).__name__)}, expected a tensor [batch, step, vocab], or "
            "[batch, vocab] for one answer per sequence"
        )
    return out[:, None] if out.dim() == 2 else out
