"""Any module that contains recurrent layers, as a `RecurrentModel`.

The user's code is entered up to its first recurrent layer, and left again with the output of its last one replaced, so
embeddings, read-outs and whatever else it does stay its own. What cannot be told apart is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from circuitkit.cautions import caution
from circuitkit.errors import UnsupportedModel
from circuitkit.models.hooks import quiet
from circuitkit.models.recurrent.cells.base import Described, Place
from circuitkit.models.recurrent.cells.inputs import stability
from circuitkit.models.recurrent.ends import Ends
from circuitkit.models.recurrent.model import RecurrentModel
from circuitkit.models.recurrent.parts import Block, Network, Write
from circuitkit.models.recurrent.watch import PROBE_STEPS, Watched, as_taken, first_of, outputs_of, tensors_of


def recurrent_model(module: nn.Module, *, name: str | None = None, tokenizer: Any = None) -> RecurrentModel:
    """A module with recurrent layers, ready to be analysed.

    Args:
        module: an ``nn.Module`` that turns token ids ``[batch, step]`` or numbers ``[batch, step, size]`` into outputs,
            or a recurrent layer itself.
        name: what it is called.
        tokenizer: a tokenizer or None.

    Raises:
        UnsupportedModel: if what stands between its layers is not known, or its state before the first step depends on
            the input.
    """
    _warn_of_training(module)
    with torch.random.fork_rng(devices=[]):  # a module that draws at random is refused, and must not move the user's
        watched = Watched(module)
        _warn_of_growth(watched)
        network = describe(watched)
        _check_feedback(watched, network)
    model = RecurrentModel(
        module,
        network,
        ends_of(watched, network),
        name=name or type(module).__name__,
        d_vocab=int(watched.numbers or watched.d_vocab or 0),
        tokenizer=tokenizer,
    )
    model.d_vocab_out = int(outputs_of(watched.seen[0].result).shape[-1])
    return model


def _warn_of_training(module: nn.Module) -> None:
    drops = [m for m in module.modules() if m.training and float(getattr(m, "dropout", 0) or getattr(m, "p", 0) or 0)]
    if drops:
        caution(
            f"{type(module).__name__} is in training mode with dropout; it is run in evaluation mode here, and left as "
            "it was",
        )


def _warn_of_growth(watched: Watched) -> None:
    for layer in watched.layers:
        radius = stability(layer)
        if radius is not None and radius > 1 + 1e-6:
            caution(
                f"{type(layer).__name__} is an unstable linear recurrence: its largest eigenvalue is {radius:.4g} in "
                f"size, so its state grows like {radius:.4g}^steps and overflows on long inputs; keep eigenvalues at 1 "
                "or below",
            )


def describe(watched: Watched) -> Network:
    """The network of a watched module: its layers, each reading what the one below gives. Raises UnsupportedModel."""
    size = watched.seen[0].of(watched.layers[0])[0].x.shape[-1]
    single = watched.numbers is None
    entry = Write("input" if single else "x", 1 if single else size, size if single else 1, kind="input")
    sources: tuple[Write, ...] = (entry,)
    blocks, n_layers, described = list[Block](), 0, Described((), (), 0)
    for i, layer in enumerate(watched.layers):
        if i:
            _check_between(watched, watched.layers[i - 1], layer)
        _check_start(watched, layer)
        start = None if watched.seen[0].of(layer)[0].state is None else partial(watched.start_of, layer)
        described = watched.cells[layer].describe(layer, Place(n_layers, sources, start))
        blocks += described.blocks
        n_layers += described.n_layers
        known = {write.name: write for block in described.blocks for write in block.writes}
        sources = tuple(known[name] for name in described.features)
    return Network(entry, tuple(blocks), described.features)


def _check_between(watched: Watched, below: nn.Module, above: nn.Module) -> None:
    seen = watched.seen[0]
    given = [call.x for call in seen.of(above)]
    made = [watched.padded(below, first_of(call.output)) for call in seen.of(below)]
    same = len(given) == len(made) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(given, made, strict=True)
    )
    if not same:
        raise UnsupportedModel(
            f"{type(above).__name__} does not read what {type(below).__name__} gives as it is: something is computed "
            "between the two recurrent layers, and it is not known how; describe it as a cell (docs/cells.md), or put "
            "them in one module"
        )


def _check_feedback(watched: Watched, network: Network) -> None:
    """Refuse a module in which what the recurrent layers give leads back to what the first of them reads."""
    first = watched.layers[0]
    if watched.bare:
        return
    probe = watched.probe(3, PROBE_STEPS, 0)
    size = sum(network.write(name).size for name in network.features)
    like = next(p for p in watched.module.parameters() if p.is_floating_point())
    other = torch.randn(3, PROBE_STEPS, size, generator=torch.Generator().manual_seed(2)).to(like)
    with torch.no_grad(), quiet(watched.module), _Leaving(watched).replaced(other):
        calls = watched.watch(probe).of(first)
    pairs = zip(calls, watched.seen[0].of(first), strict=True)
    if not all(torch.equal(a.x.nan_to_num(), b.x.nan_to_num()) for a, b in pairs):
        raise UnsupportedModel(
            f"what {type(first).__name__} reads depends on what the recurrent layers gave at earlier steps: there is a "
            "way back outside the layer, which its circuit would miss; describe the whole step as a cell "
            "(docs/cells.md)"
        )


def _check_start(watched: Watched, layer: nn.Module) -> None:
    """Refuse a state before the first step that is not the same for every input."""
    states = [side.of(layer)[0].state for side in watched.seen]
    if states[0] is None:
        return
    pairs = list(zip(*(tensors_of(state) for state in states), strict=True))
    axis = 0 if watched.cells[layer].once else 1
    rows = [a.select(axis, 0) for a, _ in pairs]
    even = all(torch.equal(a, row.unsqueeze(axis).expand_as(a)) for (a, _), row in zip(pairs, rows, strict=True))
    if not even or any(not torch.equal(a, b) for a, b in pairs):
        raise UnsupportedModel(
            f"the state that {type(layer).__name__} starts from depends on the input or on earlier batches; reset it "
            "in forward (zeros, or a parameter), or describe what computes it as a cell (docs/cells.md)"
        )


def ends_of(watched: Watched, network: Network) -> Ends:
    """How a watched module is entered, up to its first recurrent layer, and left from its last one."""
    if watched.bare:
        return Ends(lambda x: x, lambda x: x, lambda x: outputs_of(watched.run(x)), True, watched.numbers)
    leaving = _Leaving(watched)
    size = sum(network.write(name).size for name in network.features)
    with torch.no_grad(), quiet(watched.module):
        positional = leaving.positional(size)
    return Ends(watched.enter, leaving, lambda x: outputs_of(watched.run(x)), positional, watched.numbers)


class _Leaving:
    """The rest of the user's module: from the features of the last recurrent layer to outputs."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def __call__(self, features: Float[Tensor, "*row step feature"]) -> Tensor:
        watched, rows = self.watched, features.reshape(-1, *features.shape[-2:])
        with self.replaced(rows):
            out = outputs_of(watched.run(watched.probe(len(rows), rows.shape[1], None)))
        sound = bool(outputs_of(watched.seen[0].result).isfinite().all()) and bool(rows.isfinite().all())
        if sound and bool(out.isnan().any()):
            raise UnsupportedModel(
                f"{type(watched.module).__name__} uses more than the outputs of its last recurrent layer (the last "
                "state of a lower layer, or c_n); read the outputs instead, or describe it as a cell (docs/cells.md)"
            )
        return out.reshape(*features.shape[:-2], *out.shape[-2:])

    @contextmanager
    def replaced(self, features: Tensor) -> Iterator[None]:
        """The last recurrent layer returns given features, the others nothing of use; none of them computes."""
        put: list[nn.Module] = []
        try:
            for layer in self.watched.layers:
                given = features if layer is self.watched.layers[-1] else None
                layer.forward = _Given(self.watched, layer, given, features)  # type: ignore[assignment,method-assign]
                put.append(layer)
            yield
        finally:
            for layer in put:
                del layer.forward

    def positional(self, size: int) -> bool:
        """Whether an output at a step depends on the features of that step alone, tried on random features."""
        like = next(self.watched.module.parameters())
        features = torch.randn(2, 4, size, generator=torch.Generator().manual_seed(0)).to(like)
        whole = self(features)
        single = torch.cat([self(features[:, t : t + 1]) for t in range(4)], 1)
        single = single[:, -1:] if whole.shape[1] == 1 else single
        close = 1e-5 if whole.dtype.itemsize >= 4 else 0.02
        return whole.shape == single.shape and bool((whole - single).abs().max() <= close * (1 + whole.abs().max()))


class _Given:
    """Stands in for a recurrent layer's forward: gives the features it was made with, in the layer's own form."""

    def __init__(self, watched: Watched, layer: nn.Module, features: Tensor | None, like: Tensor) -> None:
        self.watched, self.layer, self.step = watched, layer, 0
        size = getattr(layer, "proj_size", 0) or getattr(layer, "hidden_size", like.shape[-1])
        size = size * (2 if getattr(layer, "bidirectional", False) else 1)
        self.features = like.new_zeros(*like.shape[:2], size) if features is None else features

    def __call__(self, x: Any, *_args: Any, **_kwargs: Any) -> Any:
        features, layer = self.features, self.layer
        if self.watched.cells[layer].once:
            out = features[:, self.step]
            self.step += 1
            return (out, torch.full_like(out, torch.nan)) if self.watched.tuples[layer] else out
        given: Any = as_taken(layer, features)
        if isinstance(x, PackedSequence):
            lengths = torch.full((len(features),), features.shape[1])
            given = pack_padded_sequence(features, lengths, batch_first=True)
        return (given, self._last()) if self.watched.tuples[layer] else given

    def _last(self) -> Any:
        """The states after the last step, as far as the outputs tell; NaN for the others."""
        layer, features = self.layer, self.features
        directions = 2 if getattr(layer, "bidirectional", False) else 1
        parts = features.chunk(directions, -1)
        h = parts[0].new_full((directions * int(getattr(layer, "num_layers", 1)), *parts[0][:, 0].shape), torch.nan)
        ends = [parts[0][:, -1], *(part[:, 0] for part in parts[1:])]
        h = torch.cat((h[:-directions], torch.stack(ends)))
        return (h, torch.full_like(h, torch.nan)) if isinstance(layer, nn.LSTM) else h
