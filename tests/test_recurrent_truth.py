"""Recurrent networks whose circuit is known: hand-made units among others that are deaf, mute, or talk to themselves.

Every weight of the shipped `second-largest` networks is part of their circuit, so they are planted in larger ones.
"""

import copy
from functools import cache

import networkx as nx
import pytest
import torch
from torch import nn

import circuitkit as ck
from circuitkit.functional.stats import auroc

LENGTHS = (2, 3)
METHODS = {"exact": {}, "eap": {}, "eap-ig": {"steps": 64}}


class Net(nn.Module):
    """A recurrent layer and a linear read-out, without biases."""

    def __init__(self, units, n_out):
        super().__init__()
        self.layer = nn.RNN(1, units, nonlinearity="relu", bias=False, batch_first=True)
        self.head = nn.Linear(units, n_out, bias=False)

    def forward(self, x):
        return self.head(self.layer(x)[0])


@cache
def handmade(length):
    return ck.load(f"second-largest/length_{length}")


@cache
def planted(length, seed):
    """The hand-made network among as many deaf and as many mute units, in random order; and its units' numbers."""
    module = handmade(length).module
    own = [w.detach() for w in (module.cell.weight_ih_l0, module.cell.weight_hh_l0, module.readout.weight)]
    n = len(own[0])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(3 * n, generator=generator)
    units, deaf, mute = order.split(n)
    net = Net(3 * n, len(own[2]))
    size = float(own[1].abs().mean())
    reads, inside, out = (
        torch.zeros_like(w) for w in (net.layer.weight_ih_l0, net.layer.weight_hh_l0, net.head.weight)
    )
    reads[units], inside[units[:, None], units], out[:, units] = own
    # Deaf: nothing reaches them but themselves, and they speak to everyone. Mute: the other way round.
    draw = torch.randn(3 * n, 3 * n, generator=generator)
    inside[:, deaf] = size * draw[:, deaf]
    inside[deaf[:, None], torch.cat((units, mute))] = 0
    inside[mute] = size * draw[mute]
    inside[torch.cat((units, deaf))[:, None], mute] = 0
    reads[mute], out[:, deaf] = size * draw[mute, :1], size * draw[: len(out)][:, deaf]
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (reads, inside, out), strict=True):
            parameter.copy_(value)
    return ck.load(net, name=f"planted/{length}"), units


def known_edges(model):
    """Nonzero weights on a path from the input to the logits, by a walk over the weights alone."""
    graph, layer = nx.DiGraph(), model.module.layer
    graph.add_edges_from(("x", f"u{i}") for i in layer.weight_ih_l0.nonzero()[:, 0].tolist())
    graph.add_edges_from((f"u{j}", f"u{i}") for i, j in layer.weight_hh_l0.nonzero().tolist())
    graph.add_edges_from((f"u{j}", "out") for j in model.module.head.weight.nonzero()[:, 1].tolist())
    on_path = {"x", "out"} | (nx.descendants(graph, "x") & nx.ancestors(graph, "out"))
    return {(a, b) for a, b in graph.edges if a in on_path and b in on_path}


def edge_mask(model):
    """The known edges in the model's own graph."""
    wanted = known_edges(model)
    mask = torch.zeros_like(model.graph.mask)
    for i, source in enumerate(model.graph.source_nodes):
        for j, destination in enumerate(model.graph.destination_nodes):
            a = "x" if source.kind == "input" else f"u{source.index}"
            b = "out" if destination.kind == "logits" else f"u{destination.index}"
            mask[i, j] = bool(model.graph.mask[i, j]) and (a, b) in wanted
    return mask


def unit_strength(scores):
    """Of each unit: the sum of the magnitudes of what it sends."""
    rows = [i for i, node in enumerate(scores.graph.source_nodes) if node.kind == "unit"]
    return scores.values[rows].abs().sum(1)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_weight_of_the_shipped_networks_is_part_and_has_an_effect(length):
    model = handmade(length)
    assert all(bool(weight.all()) for weight in model.module.parameters())
    scores = ck.score(model, ck.task("second-largest", model, n=64), "exact", progress=False)
    assert bool((scores.values[model.graph.mask] != 0).all())


@pytest.mark.parametrize("length", LENGTHS)
def test_planted_networks_compute_what_the_handmade_ones_do_and_know_their_edges(length):
    model, units = planted(length, 0)
    x = torch.randn(50, length, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # in double precision: weights of hundreds cancel
        ours, theirs = (copy.deepcopy(each.module).double()(x.double()) for each in (model, handmade(length)))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    n = len(units)
    assert int(edge_mask(model).sum()) == len(known_edges(model)) == n + n * n + n
    assert float(model.trace(x)["l0.h"].abs().amax((0, 1)).gt(0).sum()) > n  # the mute ones are busy too


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_the_planted_circuit_is_recovered(method, length, seed):
    model, units = planted(length, seed)
    task = ck.task("second-largest", model, n=64, seed=seed)
    scores = ck.score(model, task, method, progress=False, **METHODS[method])
    mask, part = model.graph.mask, edge_mask(model)
    assert not scores.values[mask & ~part].any()  # deaf and mute: exactly no effect
    assert auroc(scores.values[mask].abs(), part[mask]) >= 0.99
    ours = torch.zeros(3 * len(units), dtype=torch.bool)
    ours[units] = True
    assert auroc(unit_strength(scores), ours) >= 0.99
    circuit = scores.top(int(part.sum()))
    assert torch.equal(circuit.mask, part)
    assert ck.evaluate(model, task, circuit, curve=False, progress=False).faithfulness == pytest.approx(1.0, abs=1e-4)
