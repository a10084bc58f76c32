"""Small recurrent networks and what is known about them, for tests of dynamics."""

from functools import cache

import torch
from torch import nn

from circuitkit.models.recurrent.cells.base import Place, cell_of
from circuitkit.models.recurrent.parts import Network, Write
from circuitkit.models.recurrent.stepper import run_network
from circuitkit.models.recurrent.transition import transition
from circuitkit.models.recurrent.zoo import build


def network_of(*modules: nn.Module, size: int) -> Network:
    """Recurrent modules in a row, each reading the one before."""
    read = Write("input", size, kind="input")
    sources, blocks, features, layer = (read,), (), (), 0
    for module in modules:
        made = cell_of(module).describe(module, Place(layer, sources))
        blocks, features, layer = (*blocks, *made.blocks), made.features, layer + made.n_layers
        sources = tuple(write for block in made.blocks for write in block.writes if write.name in features)
    return Network(read, blocks, features)


def pulses(batch: int, n_steps: int, seed: int = 7) -> torch.Tensor:
    """Trials of the 3-bit flip-flop: every bit is set at step 0, and again now and then."""
    rng = torch.Generator().manual_seed(seed)
    x = (torch.rand(batch, n_steps, 3, generator=rng) < 0.15).float()
    x = x * (torch.randint(0, 2, x.shape, generator=rng) * 2 - 1)
    x[:, 0] = torch.randint(0, 2, (batch, 3), generator=rng) * 2.0 - 1
    return x


@cache
def flip_flop(cell: str, seed: int = 0):
    """A trained network: its step, its read-out in float64, and the states that it visits."""
    net = build(f"toys/flip-flop_{cell}_s{seed}")[0]
    network = network_of(net.cell, size=3)
    step = transition(network)
    states = step.state_of(run_network(network, pulses(64, 25)))
    weight, bias = net.readout.weight.detach().double(), net.readout.bias.detach().double()
    return step, lambda state: state[..., -weight.shape[1] :] @ weight.T + bias, states
