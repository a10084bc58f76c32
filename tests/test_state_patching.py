"""Patching what a recurrent network holds at some steps: against literal runs, and on networks that remember."""

import pytest
import torch
from torch import nn

import circuitkit as ck
from circuitkit.errors import OptionError
from tests.test_recurrent_core import STEPS, UNITS, net, pairs


def literal(module, x, other, first, stop, units):
    """Outputs of a GRU network whose units carry another run's state at some steps, cell call by cell call."""
    cell = nn.GRUCell(x.shape[2], UNITS).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.layer.state_dict().items()})
    h, outputs = torch.zeros(len(x), UNITS, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = cell(x[:, t], h)
        if first <= t < stop:
            h[:, units] = other[:, t, units]
        outputs.append(h)
    return module.head(torch.stack(outputs, 1))


@pytest.mark.parametrize("hold", [1, 2, 0])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_patched_states_are_those_of_literal_runs(hold, direction):
    module = net("gru")
    model, task = ck.load(module), pairs()
    batch = task.batches[0]
    sides = (batch.clean, batch.corrupt)[:: 1 if direction == "noising" else -1]
    scores = ck.score(model, task, "state-patching", nodes="each", hold=hold, direction=direction)
    assert scores.rows == tuple(f"l0.h{i}" for i in range(UNITS)) and scores.columns[-1] == "end"
    with torch.no_grad():
        other = model.trace(sides[1])["l0.h"]
        whole = task.metric(module(sides[0])[:, -1:], batch)
        for unit in range(UNITS):
            for t in range(STEPS):
                stop = STEPS if hold == 0 else t + hold
                patched = task.metric(literal(module, sides[0], other, t, stop, [unit])[:, -1:], batch)
                want = float((whole - patched).mean()) * (1 if direction == "noising" else -1)
                assert float(scores.values[unit, t]) == pytest.approx(want, abs=1e-6)


def test_gates_summands_and_stacks_can_be_patched():
    model, task = ck.load(net("lstm", num_layers=2, bidirectional=True)), pairs()
    for site in ("l0.f", "l1r.c", "l1.kept", "l0.g_pre"):
        scores = ck.score(model, task, "state-patching", site=site)
        assert scores.values.isfinite().all() and scores.values.abs().max() > 0
    # A gate that carries the other run's value at every step is clamped by one patch at the first step.
    held = ck.score(model, task, "state-patching", site="l0.f", hold=0)
    kicks = ck.score(model, task, "state-patching", site="l0.f")
    assert float(held.values[0, 0]) != pytest.approx(float(kicks.values[0, 0]))


def test_subspaces_and_units_add_up_where_the_readout_is_linear():
    model, task = ck.load(net("tanh")), pairs()
    basis = torch.linalg.qr(torch.randn(UNITS, UNITS, generator=torch.Generator().manual_seed(0)).double())[0]
    turned = model.viewed(subspaces={"l0.h": basis[:, :2]})
    whole = ck.score(model, task, "state-patching").values[0, -1]
    for view in (model, turned):
        parts = ck.score(view, task, "state-patching", nodes="each").values[:, -1]
        assert len(parts) == UNITS and float(parts.sum()) == pytest.approx(float(whole), abs=1e-6)
    assert not torch.allclose(
        ck.score(turned, task, "state-patching", nodes="each").values,
        ck.score(model, task, "state-patching", nodes="each").values,
    )


@pytest.mark.parametrize("name", ["tanh", "gru"])
def test_a_whole_state_moves_the_whole_effect_at_every_step(name):
    model = ck.load(f"toys/flip-flop_{name}_s0")
    task = ck.task("flip-flop", model, n=16)
    scores = ck.score(model, task, "state-patching")
    torch.testing.assert_close(scores.normalised, torch.ones_like(scores.normalised), rtol=0, atol=1e-4)


def test_an_attractor_undoes_a_kick_that_a_clamp_holds_and_distance_tells_noise():
    model = ck.load("toys/flip-flop_tanh_s0")
    task = ck.task("flip-flop", model, n=16)
    small = ck.score(model, task, "state-patching", noise=0.2, seed=1)
    large = ck.score(model, task, "state-patching", noise=5.0, seed=1)
    assert small.normalised.abs()[:, :-1].max() < 0.1
    near, far = (torch.tensor(s.provenance["distance"]) for s in (small, large))
    visited = torch.tensor(ck.score(model, task, "state-patching").provenance["distance"])
    assert visited.median() < 0.2 and near.mean() < far.mean() and far.min() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "l0.q"}, "no site 'l0.q' in Net; it has .*l0.z"),
        ({"hold": -1}, "got hold = -1"),
        ({"noise": 0.0}, "got noise = 0.0"),
        ({"direction": "forward"}, "'noising' or 'denoising'"),
        ({"nodes": "unit"}, "'all' or 'each'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        ck.score(ck.load(net("gru")), pairs(), "state-patching", **options)


def test_transformers_are_told_to_use_activation_patching():
    model = ck.load("induction/trained")
    with pytest.raises(OptionError, match="state-patching needs a recurrent"):
        ck.score(model, ck.task("induction-letters", model, n=4), "state-patching")
