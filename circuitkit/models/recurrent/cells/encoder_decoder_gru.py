"""A GRU that reads a sequence and a GRU that writes one, on one time axis (Cho et al. 2014, arXiv:1406.1078).

    h(t) = (1 - phase) encoder(x(t), h(t-1)) + phase decoder(x(t), h(t-1))

The last number of every input is the phase: 0 while the encoder reads, 1 while the decoder writes, so the decoder
starts from the encoder's last state. Each of the two computes

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z likewise
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    (1 - z) n + z h(t-1)

Slots of the encoder begin with ``enc_``, those of the decoder with ``dec_``; both share the carried h and the phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.inputs import input_links
from circuitkit.models.recurrent.parts import Block, Getter, Link, See, Slot, Stage, Write

PARTS = ("enc", "dec")


class EncoderDecoderGRU(nn.Module):
    """An encoder and a decoder that share one state; gates in torch's order r, z, n.

    Args:
        input_size: numbers per step, the last of which is the phase.
        hidden_size: units.

    >>> EncoderDecoderGRU(4, 3)(torch.zeros(2, 5, 4)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.enc = nn.GRUCell(input_size - 1, hidden_size)
        self.dec = nn.GRUCell(input_size - 1, hidden_size)

    def forward(self, x: Float[Tensor, "batch step size"]) -> Float[Tensor, "batch step hidden"]:
        """The state after every step; zeros before the first."""
        h = x.new_zeros(len(x), self.hidden_size)
        states = []
        for numbers, phase in zip(x[..., :-1].unbind(1), x[..., -1:].unbind(1), strict=True):
            # Mostly the whole batch is in one phase; then only that half is worth computing.
            if not phase.any():
                h = self.enc(numbers, h)
            elif (phase == 1).all():
                h = self.dec(numbers, h)
            else:
                h = (1 - phase) * self.enc(numbers, h) + phase * self.dec(numbers, h)
            states.append(h)
        return torch.stack(states, 1)


def _step(name: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    made = []
    for part in PARTS:
        r, z = (see(f"{part}_{gate}", pre[f"{part}_{gate}"].sigmoid()) for gate in "rz")
        n = see(f"{part}_n", torch.tanh(pre[f"{part}_n"] + see(f"{part}_r_hn", r * pre[f"{part}_hn"])))
        new, kept = see(f"{part}_new", (1 - z) * n), see(f"{part}_kept", z * pre["carry"])
        made.append(new + kept)
    phase = pre["phase"]
    return {name: see("h", (1 - phase) * made[0] + phase * made[1])}


def _bias(gru: nn.GRUCell, k: int, kinds: tuple[str, ...]) -> Getter:
    rows = slice(k * gru.hidden_size, (k + 1) * gru.hidden_size)
    return lambda: sum(getattr(gru, f"bias_{kind}")[rows] for kind in kinds)  # type: ignore[return-value]


def _slots(module: EncoderDecoderGRU, h: Write) -> tuple[Slot, ...]:
    slots = []
    both = ("ih", "hh")
    for part in PARTS:
        gru = getattr(module, part)
        kinds = {"r": (0, both), "z": (1, both), "n": (2, both[:1]), "hn": (2, both[1:])}
        slots += [Slot(f"{part}_{x}", h.n, feeds=(h.name,), bias=_bias(gru, *kind)) for x, kind in kinds.items()]
    return (*slots, Slot("carry", h.n, feeds=(h.name,)), Slot("phase", 1, feeds_all=(h.name,)))


def _input_links(module: EncoderDecoderGRU, place: Place) -> list[Link]:
    links = list(input_links(place, ("phase",), lambda: _last(module.enc.weight_ih)))
    for part in PARTS:
        # A column of zeros for the phase, which the gates do not read.
        weight = partial(lambda gru: nn.functional.pad(gru.weight_ih, (0, 1)), getattr(module, part))
        links += input_links(place, tuple(f"{part}_{gate}" for gate in "rzn"), weight)
    return links


def _last(weight: Float[Tensor, "row column"]) -> Float[Tensor, "1 size"]:
    """The row that picks the number after a weight's columns."""
    return nn.functional.pad(weight.new_ones(1, 1), (weight.shape[1], 0))


def _state_links(module: EncoderDecoderGRU, h: Write) -> list[Link]:
    links = [Link(h.name, ("carry",), lag=1)]
    for part in PARTS:
        gru = getattr(module, part)
        slots = (f"{part}_r", f"{part}_z", f"{part}_hn")
        links.append(Link(h.name, slots, lambda gru=gru: gru.weight_hh, lag=1))  # type: ignore[misc]
    return links


SITES = tuple(f"{part}_{x}" for part in PARTS for x in ("r", "z", "r_hn", "n", "new", "kept"))


@cell(EncoderDecoderGRU, example=lambda: EncoderDecoderGRU(4, 3))
def encoder_decoder_gru(module: EncoderDecoderGRU, place: Place) -> Described:
    """The one block of an `EncoderDecoderGRU`."""
    h = Write(f"{place.stem()}.h", module.hidden_size)
    slots = _slots(module, h)
    links = (*_input_links(module, place), *_state_links(module, h))
    sites = (*(f"{slot.name}_pre" for slot in slots), *SITES, "h")
    stage = Stage(slots, (h,), links, partial(_step, h.name), sites)
    return Described((Block(place.layer, (stage,), stem=place.stem()),), (h.name,))
