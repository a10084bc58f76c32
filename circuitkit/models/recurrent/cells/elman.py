"""The simple recurrent network of torch (Elman 1990), tanh or ReLU.

h(t) = f(W_ih x(t) + b_ih + W_hh h(t-1) + b_hh)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.layered import Part, one_step, stacked
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write

NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu}


def _step(name: str, nonlinearity: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    return {name: see("h", NONLINEARITIES[nonlinearity](pre[""]))}


def _block(nonlinearity: str, part: Part) -> Block:
    h = Write(part.name("h"), part.size, start=part.start("h"))
    slot = Slot("", part.size, feeds=(h.name,), bias=part.bias())
    links = (*part.input_links(("",)), Link(h.name, ("",), part.weight("hh"), lag=1))
    stage = Stage((slot,), (h,), links, partial(_step, h.name, nonlinearity), ("pre", "h"))
    return Block(part.layer, (stage,), part.reverse, stem=part.stem)


@cell(nn.RNN, example=lambda: nn.RNN(3, 4, num_layers=2, bidirectional=True, batch_first=True))
def rnn(module: nn.RNN, place: Place) -> Described:
    """Layers of a ``torch.nn.RNN``."""
    return stacked(module, place, partial(_block, module.nonlinearity), ("h",))


@cell(nn.RNNCell, example=lambda: nn.RNNCell(3, 4), once=True)
def rnn_cell(module: nn.RNNCell, place: Place) -> Described:
    """One ``torch.nn.RNNCell``."""
    return one_step(module, place, partial(_block, module.nonlinearity), ("h",))
