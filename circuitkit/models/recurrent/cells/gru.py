"""The gated recurrent unit of torch (Cho et al. 2014, arXiv:1406.1078; the reset gate acts behind the product).

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z likewise
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     the recurrent part of n is a slot of its own: hn
    h(t) = (1 - z) n + z h(t-1)                       the h that is carried over is a slot of its own: carry

torch keeps its rows in the order r, z, n.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.layered import Part, one_step, stacked
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


def _step(name: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    r, z = see("r", pre["r"].sigmoid()), see("z", pre["z"].sigmoid())
    n = see("n", torch.tanh(pre["n"] + see("r_hn", r * pre["hn"])))
    return {name: see("h", see("new", (1 - z) * n) + see("kept", z * pre["carry"]))}


SITES = ("r_pre", "z_pre", "n_pre", "hn_pre", "r", "z", "r_hn", "n", "new", "kept", "h")


def _block(part: Part) -> Block:
    n, h = part.size, Write(part.name("h"), part.size, start=part.start("h"))
    bias = {
        "r": part.bias(0),
        "z": part.bias(1),
        "n": part.bias(2, ("ih",)),
        "hn": part.bias(2, ("hh",)),
        "carry": None,
    }
    slots = tuple(Slot(name, n, feeds=(h.name,), bias=b) for name, b in bias.items())
    links = (
        *part.input_links(("r", "z", "n")),
        Link(h.name, ("r", "z", "hn"), part.weight("hh"), lag=1),
        Link(h.name, ("carry",), lag=1),
    )
    return Block(part.layer, (Stage(slots, (h,), links, partial(_step, h.name), SITES),), part.reverse, stem=part.stem)


@cell(nn.GRU, example=lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True))
def gru(module: nn.GRU, place: Place) -> Described:
    """Layers of a ``torch.nn.GRU``."""
    return stacked(module, place, _block, ("h",))


@cell(nn.GRUCell, example=lambda: nn.GRUCell(3, 4), once=True)
def gru_cell(module: nn.GRUCell, place: Place) -> Described:
    """One ``torch.nn.GRUCell``."""
    return one_step(module, place, _block, ("h",))
