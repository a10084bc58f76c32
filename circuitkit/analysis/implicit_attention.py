"""Implicit attention: linear and gated linear recurrences as exact attention maps over their inputs.

    h_t = a_t h_{t-1} + u_t                  alpha[t, s] = prod of a_r over s < r <= t           one head per unit
    h_t = A_t h_{t-1} + delta_t B_t u_t,     alpha[t, s] = C_t (prod of A_r) delta_s B_s         one head per channel
          y_t = C_t h_t
    S_t = S_{t-1} + v_t k_t^T, y_t = S_t q_t      alpha[t, s] = q_t k_s                          one head
    S_t = S_{t-1} (I - beta_t k_t k_t^T) + ...    alpha[t, s] = beta_s k_s (prod of (I - ...)) q_t   one head

The maps are read off a run of the loaded network and must add up to what the layer gave, or they are refused. What
the coefficients depend on is the layer's input, not its state: the map is exact for the whole layer, and global in
what it weighs (u, v). Layers whose gates read the state are for `circuitkit.analysis.frozen_gates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitkit.analysis.attention_maps import AttentionMaps, chosen_units, recurrence_maps
from circuitkit.errors import UnsupportedModel
from circuitkit.functional.implicit_maps import delta_map, linear_attention_map, selective_map
from circuitkit.models.recurrent.parts import Block, Stage, Weights, Write

if TYPE_CHECKING:
    from circuitkit.models.recurrent.model import RecurrentModel


@dataclass(frozen=True, eq=False)
class _Layer:
    """The blocks that share a name, with what they showed on a run."""

    name: str
    blocks: tuple[Block, ...]
    run: Mapping[str, Tensor]
    starts: Mapping[str, Tensor]
    units: Sequence[int] | None

    def __getitem__(self, site: str) -> Tensor:
        return self.run[f"{self.name}.{site}"]

    @property
    def sites(self) -> set[str]:
        return {site for block in self.blocks for stage in block.stages for site in stage.sites}

    @property
    def recurrence(self) -> tuple[Block, Stage] | None:
        """The stage that reads its own only write by nothing but the identity: a recurrence linear in its state."""
        for block in self.blocks:
            (stage, *more) = block.stages
            own = [link for link in stage.links if link.source in block.own]
            if own and not more and all(x.weight is None and x.slots == ("carry",) and x.lag == 1 for x in own):
                return block, stage
        return None


def implicit_attention(
    model: RecurrentModel, inputs: Tensor, *, units: Sequence[int] | None = None
) -> dict[str, AttentionMaps]:
    """The exact attention maps of every layer that is linear in its state, by the layer's name (``l0``).

    Args:
        model: a loaded recurrent model.
        inputs: as the model takes them: token ids, or numbers ``[batch, step, size]``.
        units: which units (or channels) of each layer; all without it. Memory is O(batch units steps^2).

    Raises:
        UnsupportedModel: if the model has no such layer, or the maps do not add up to what a layer gave.
        OptionError: if a layer has no such unit.

    >>> import circuitkit as ck
    >>> from circuitkit.models.recurrent.cells.lru import LRU
    >>> maps = implicit_attention(ck.load(LRU(3, 4)), torch.randn(2, 5, 3))["l0"]
    >>> maps.heads, maps.pattern.dtype, maps.error < 1e-5
    (('l0.h0', 'l0.h1', 'l0.h2', 'l0.h3'), torch.complex64, True)
    """
    network = model.network
    run = model.trace(inputs)
    starts = Weights.of(network, run["input"]).starts
    found = {}
    for name in dict.fromkeys(block.stem for block in network.blocks):
        blocks = tuple(block for block in network.blocks if block.stem == name)
        layer = _Layer(name, blocks, run, starts, units)
        build = next((build for sites, build in _FORMS if layer.recurrence and sites <= layer.sites), None)
        if build is not None:
            found[name] = build(layer)
    if not found:
        raise UnsupportedModel(
            "no layer of the model is linear in its state with a decay per unit; "
            "for LSTM and GRU layers use `circuitkit.analysis.frozen_gates`"
        )
    return found


def _selective(layer: _Layer) -> AttentionMaps:
    """y without skip and gate (the site ``read``), from what the convolution gave."""
    channels = layer["read"].shape[-1]
    chosen = chosen_units(layer.name, channels, layer.units)
    a = layer["a_bar"].unflatten(-1, (channels, -1))[..., chosen, :]
    b = layer["delta"][..., chosen, None] * layer["B_pre"][..., None, :]
    pattern = selective_map(a, b, layer["C_pre"][..., None, :].expand_as(a))
    heads = tuple(f"{layer.name}.h{i}" for i in chosen)
    parts = layer["value_pre"][..., chosen], layer["read"][..., chosen]
    return _without_start(layer, "selective state space", heads, pattern, *(x[..., None] for x in parts))


def _linear(layer: _Layer) -> AttentionMaps:
    chosen_units(layer.name, 1, layer.units)
    pattern = linear_attention_map(layer["q_pre"], layer["k_pre"])[:, None]
    parts = layer["v_pre"][:, :, None], layer["y"][:, :, None]
    return _without_start(layer, "linear attention", (f"{layer.name}.S",), pattern, *parts)


def _delta(layer: _Layer) -> AttentionMaps:
    chosen_units(layer.name, 1, layer.units)
    pattern = delta_map(layer["q"], layer["k"], layer["beta"].squeeze(-1))[:, None]
    parts = layer["v_pre"][:, :, None], layer["y"][:, :, None]
    return _without_start(layer, "delta rule", (f"{layer.name}.S",), pattern, *parts)


def _without_start(
    layer: _Layer, what: str, heads: tuple[str, ...], pattern: Tensor, values: Tensor, output: Tensor
) -> AttentionMaps:
    """Maps of a layer that begins with nothing; one that does not is refused, because its sum is another."""
    return AttentionMaps(layer.name, what, heads, pattern, values, torch.zeros_like(output), output).checked()


def _diagonal(layer: _Layer) -> AttentionMaps:
    """State of each unit, from what entered it. Units of two numbers are complex."""
    assert layer.recurrence is not None
    block, stage = layer.recurrence
    (write,) = stage.writes
    chosen = chosen_units(layer.name, write.n, layer.units)
    slots = {slot.name: layer[f"{slot.name}_pre"] for slot in stage.slots}
    nothing = torch.zeros_like(slots["carry"])
    one = nothing.unflatten(-1, (write.n, write.width)).index_fill(-1, torch.tensor(0, device=nothing.device), 1.0)
    # Linear in what is carried over: a carried 1 shows the decay, a carried 0 what enters.
    decay = _shown(stage, slots | {"carry": one.flatten(-2)})["kept"]
    entered = _shown(stage, slots | {"carry": nothing})["h"]
    decay, entered, output, first = (
        _numbers(x, write)[..., chosen]
        for x in (decay, entered, layer.run[write.name], layer.starts[write.name].expand(nothing.shape[-1]))
    )
    return recurrence_maps(
        layer.name,
        "linear recurrence" if write.width == 1 else "complex linear recurrence",
        tuple(f"{write.name}{i}" for i in chosen),
        decay=decay,
        strength=torch.ones_like(decay),
        values=entered,
        first=first,
        output=output,
        reverse=block.reverse,
    )


def _shown(stage: Stage, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a stage makes and shows, by the names of its sites."""
    seen: dict[str, Tensor] = {}
    stage.step(slots, lambda name, value: seen.setdefault(name, value))
    return seen


def _numbers(x: Tensor, write: Write) -> Tensor:
    if write.width == 1:
        return x
    if write.width > 2:
        raise UnsupportedModel(
            f"units of {write.name} have {write.width} numbers each, expected 1, or 2 for complex ones"
        )
    return torch.view_as_complex(x.unflatten(-1, (write.n, 2)).contiguous())


_FORMS: tuple[tuple[set[str], Callable[[_Layer], AttentionMaps]], ...] = (
    ({"a_bar", "delta", "B_pre", "C_pre", "value_pre", "read"}, _selective),
    ({"k", "q", "beta", "v_pre", "S", "y"}, _delta),
    ({"k_pre", "q_pre", "v_pre", "S", "y"}, _linear),
    ({"carry_pre", "kept", "h"}, _diagonal),
)
