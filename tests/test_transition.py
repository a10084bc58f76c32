"""One step of a network as a function of its state, against whole runs and against derivatives by hand."""

import pytest
import torch
from torch import nn

from circuitkit.errors import GraphError, UnsupportedModel
from circuitkit.models.recurrent.cells.base import cells
from circuitkit.models.recurrent.parts import Block, Link, Network, Slot, Stage, Write
from circuitkit.models.recurrent.stepper import run_network
from circuitkit.models.recurrent.transition import transition
from tests.dynamics_toys import network_of

NETS = {
    "tanh": lambda: network_of(nn.RNN(3, 5, num_layers=2, batch_first=True), size=3),
    "gru": lambda: network_of(nn.GRU(3, 5, num_layers=2, batch_first=True), size=3),
    "lstm": lambda: network_of(nn.LSTM(3, 5, num_layers=2, batch_first=True), size=3),
    "projected-lstm": lambda: network_of(nn.LSTM(3, 5, proj_size=2, batch_first=True), size=3),
    "lstm-on-gru": lambda: network_of(nn.GRU(3, 4, batch_first=True), nn.LSTM(4, 5, batch_first=True), size=3),
}


def delays(*lags: int) -> Network:
    """A network with taps on its input and on itself, at several lags."""
    rng = torch.Generator().manual_seed(0)
    weights = {lag: 0.3 * torch.randn(4, 3, generator=rng) for lag in lags}
    own = {lag: 0.3 * torch.randn(4, 4, generator=rng) for lag in lags if lag}
    read, start = Write("input", 3, kind="input"), torch.randn(4, generator=rng)
    h = Write("l0.h", 4, start=lambda: start)
    links = [Link("input", ("",), lambda w=w: w, lag=lag) for lag, w in weights.items()]
    links += [Link("l0.h", ("",), lambda w=w: w, lag=lag) for lag, w in own.items()]
    slot = Slot("", 4, feeds=("l0.h",))
    stage = Stage((slot,), (h,), tuple(links), lambda pre, see: {"l0.h": see("h", torch.tanh(pre[""]))}, ("pre", "h"))
    return Network(read, (Block(0, (stage,), stem="l0"),), ("l0.h",))


NETS |= {"taps": lambda: delays(0, 1, 3), "late taps": lambda: delays(2), "one tap": lambda: delays(0, 1)}


@pytest.mark.parametrize("name", NETS)
def test_step_after_step_is_the_whole_run(name):
    network = NETS[name]()
    step, x = transition(network), torch.randn(4, 7, 3, dtype=torch.float64)
    values = run_network(network, x)
    want, state = step.state_of(values), step.start(x).expand(4, -1)
    assert want.shape == (4, 7, step.size) and len(step.names) == step.size == len(set(step.names))
    for t in range(7):
        features = torch.cat([values[write] for write in network.features], -1)[:, t]
        torch.testing.assert_close(step.features(state, x[:, t]), features, rtol=0, atol=1e-12)
        state = step(state, x[:, t])
        torch.testing.assert_close(state, want[:, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in cells() if not cells()[kind].once], ids=lambda kind: kind.__name__)
def test_every_cell_steps_or_is_refused_by_name(kind):
    module = cells()[kind].example().double()
    size = getattr(module, "input_size", 3)
    network = network_of(module, size=size)
    if not network.causal:
        with pytest.raises(UnsupportedModel, match=r"layer 0 .* (backward|all steps at once)"):
            transition(network)
        return
    step, x = transition(network), torch.randn(2, 5, size, dtype=torch.float64)
    want, state = step.state_of(run_network(network, x)), step.start(x).expand(2, -1)
    for t in range(5):
        state = step(state, x[:, t])
        torch.testing.assert_close(state, want[:, t], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NETS)
def test_jacobians_are_finite_differences(name):
    step = transition(NETS[name]())
    state, x = torch.randn(2, step.size, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    by_state, by_input = step.jacobians(state, x)
    eps = 1e-6
    for i in range(step.size):
        push = eps * torch.eye(step.size, dtype=torch.float64)[i]
        want = (step(state + push, x) - step(state - push, x)) / (2 * eps)
        torch.testing.assert_close(by_state[:, :, i], want, rtol=0, atol=1e-8)
    for i in range(3):
        push = eps * torch.eye(3, dtype=torch.float64)[i]
        want = (step(state, x + push) - step(state, x - push)) / (2 * eps)
        torch.testing.assert_close(by_input[:, :, i], want, rtol=0, atol=1e-8)


def test_the_weights_are_the_users_own():
    module = nn.GRU(3, 5, batch_first=True)
    step, state, x = transition(network_of(module, size=3)), torch.zeros(2, 5), torch.ones(2, 3)
    before = step(state, x)
    with torch.no_grad():
        module.weight_ih_l0.mul_(2)
    torch.testing.assert_close(step(state, x), module(x[:, None])[0][:, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(step(state, x), before)
    assert module.weight_ih_l0.grad is None and not step(state, x).requires_grad


def test_one_state_with_many_inputs_and_without_a_batch():
    step = transition(NETS["gru"]())
    state, x = torch.randn(step.size), torch.randn(6, 3)
    many = step(state, x)
    for one, u in zip(many, x, strict=True):
        torch.testing.assert_close(step(state, u), one)


def test_a_network_that_looks_ahead_is_refused():
    with pytest.raises(UnsupportedModel, match=r"layer 0 .*backward"):
        transition(network_of(nn.GRU(3, 5, bidirectional=True, batch_first=True), size=3))


def test_a_state_needs_all_writes():
    with pytest.raises(GraphError, match=r"l0\.c"):
        transition(NETS["lstm"]()).state_of({"l0.h": torch.zeros(2, 3, 5)})
