"""Long short-term memory of torch (Hochreiter and Schmidhuber 1997; forget gates: Gers et al. 2000).

    i, f, o = sigmoid(...)   g = tanh(...)            each of W_i x + b_i + W_h h + b_h
    c(t) = f c(t-1) + i g                             the c that is carried over is a slot of its own: carry
    h(t) = o tanh(c(t))                               with ``proj_size`` h = W_hr (o tanh(c)), a stage of its own

torch keeps its rows in the order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.layered import Part, one_step, stacked
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


def _step(c_name: str, out_name: str, site: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    i, f, o = (see(gate, pre[gate].sigmoid()) for gate in "ifo")
    g = see("g", torch.tanh(pre["g"]))
    c = see("c", see("kept", f * pre["carry"]) + see("new", i * g))
    return {c_name: c, out_name: see(site, o * see("tanh_c", torch.tanh(c)))}


def _project(name: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    return {name: see("h", pre["proj"])}


SITES = ("i_pre", "f_pre", "g_pre", "o_pre", "i", "f", "g", "o", "kept", "new", "c", "tanh_c", "h")


def _block(part: Part) -> Block:
    n = part.size
    c = Write(part.name("c"), n, start=part.start("c"), kind="cell")
    projected = part.projection()
    out = Write(part.name("m" if projected else "h"), n, start=None if projected else part.start("h"))
    h = Write(part.name("h"), part.output, start=part.start("h")) if projected else out
    fed = {"o": (out.name,)}
    slots = (
        *(Slot(gate, n, feeds=fed.get(gate, (c.name, out.name)), bias=part.bias(k)) for k, gate in enumerate("ifgo")),
        Slot("carry", n, feeds=(c.name, out.name)),
    )
    links = (
        *part.input_links(("i", "f", "g", "o")),
        Link(h.name, ("i", "f", "g", "o"), part.weight("hh"), lag=1),
        Link(c.name, ("carry",), lag=1),
    )
    site = "m" if projected else "h"
    sites = (*SITES[:-1], "m", "h") if projected else SITES
    stages = [Stage(slots, (c, out), links, partial(_step, c.name, out.name, site), sites)]
    if projected:
        read = Slot("proj", part.output, feeds=(h.name,))
        link = Link(out.name, ("proj",), projected)
        stages.append(Stage((read,), (h,), (link,), partial(_project, h.name), ()))
    return Block(part.layer, tuple(stages), part.reverse, stem=part.stem)


@cell(nn.LSTM, example=lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True))
def lstm(module: nn.LSTM, place: Place) -> Described:
    """Layers of a ``torch.nn.LSTM``."""
    return stacked(module, place, _block, ("h", "c"))


@cell(nn.LSTMCell, example=lambda: nn.LSTMCell(3, 4), once=True)
def lstm_cell(module: nn.LSTMCell, place: Place) -> Described:
    """One ``torch.nn.LSTMCell``."""
    return one_step(module, place, _block, ("h", "c"))
