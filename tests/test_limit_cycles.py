"""Driven networks whose cycles are known, and the phase-memory networks of Pals, Macke and Barak."""

import math

import pytest
import torch

from circuitkit.analysis.fixed_points import find_fixed_points
from circuitkit.analysis.limit_cycles import find_limit_cycles, phase_memory, stroboscopic
from circuitkit.errors import OptionError
from circuitkit.models.recurrent.transition import transition
from circuitkit.models.recurrent.zoo import build
from tests.dynamics_toys import network_of

DOUBLE = torch.float64
STEPS, TURNS, DT = 125, 2, 0.002  # two turns of 8 Hz in steps of 2 ms


def sine(n_steps):
    return torch.sin(2 * math.pi * 8 * DT * torch.arange(n_steps, dtype=DOUBLE))


def memory_of(name):
    """The verdict on a network of the zoo: a reference sine, and one pulse for each stimulus, from the last column."""
    net, _, card = build(f"phase-memory/{name}")
    step = transition(network_of(net.cell, size=3))
    stimuli = torch.zeros(2, 2 * STEPS, 3, dtype=DOUBLE)
    stimuli[:, :, 0] = sine(2 * STEPS)
    for i in range(2):
        stimuli[i, 75:150, -(i + 1)] = 1
    drive = torch.zeros(STEPS, 3, dtype=DOUBLE)
    drive[:, 0] = sine(STEPS)
    states = dict(zip(step.names, range(step.size), strict=True))
    made = [
        states[f"l0.{'h' if card['output_nonlinearity_g'] == 'identity' else 'r'}{i}"] for i in range(card["n_rec"])
    ]
    weight = net.readout.weight.detach().double()
    start = step.start(drive)
    return phase_memory(
        step, lambda s: s[..., made] @ weight.T, start, stimuli, drive, card["phase_offsets_cycles"], turns=TURNS
    )


def test_full_rank_has_two_stable_cycles_one_for_each_stimulus():
    memory = memory_of("full_rank_n100")
    assert memory.works and memory.problems == ()
    assert len(memory.cycles) == 2 and memory.cycles.stable == (True, True)
    assert sorted(memory.cycles.reached.tolist()) == [0, 1]
    assert float(memory.correlations.min()) > 0.99  # the card says 0.996 over random trials
    gaps = torch.tensor(memory.wanted) - memory.offsets
    assert float((gaps - gaps.round()).abs().max()) < 0.02  # turns
    step = transition(network_of(build("phase-memory/full_rank_n100")[0].cell, size=3))
    state = memory.cycles.orbits[:, -1]
    for t, u in enumerate(memory.cycles.drive):
        state = step(state, u)
        torch.testing.assert_close(state, memory.cycles.orbits[:, t], rtol=0, atol=1e-5)
    assert "remembers" in memory.plot().layout.title.text


def test_rank_one_with_a_linear_read_out_is_recognised_as_failing():
    memory = memory_of("rank1_linear_readout_fails")
    assert not memory.works
    assert "stimuli 0 and 1 end on the same cycle" in memory.problems
    assert any("correlates" in problem for problem in memory.problems)
    assert "same cycle" in memory.plot().layout.title.text


def test_a_driven_linear_network_has_the_cycle_and_multipliers_that_algebra_says():
    w = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) / 3
    drive = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    found = find_limit_cycles(lambda h, u: h @ w.T + u, torch.randn(4, 3), drive)
    assert len(found) == 1 and found.reached.tolist() == [0] * 4
    powers = torch.linalg.matrix_power
    forced = sum(powers(w, 4 - t) @ drive[t] for t in range(5))
    want = torch.linalg.solve(torch.eye(3).double() - powers(w, 5), forced)
    torch.testing.assert_close(found.orbits[0, -1], want, rtol=0, atol=1e-7)
    multipliers = torch.linalg.eigvals(w) ** 5
    torch.testing.assert_close(
        found.multipliers[0].abs(), multipliers.abs().sort(descending=True).values, rtol=0, atol=1e-10
    )


def test_the_unstable_cycle_between_two_stable_ones_is_a_fixed_point_of_the_stroboscopic_map():
    def step(h, u):
        return torch.tanh(2 * h + u)

    drive = torch.tensor([[0.1], [-0.1]], dtype=DOUBLE)
    stable = find_limit_cycles(step, torch.tensor([[1.0], [0.5], [-1.0]]), drive)
    assert len(stable) == 2 and stable.reached.tolist() == [0, 0, 1]
    period = stroboscopic(step, drive)
    points = find_fixed_points(period, torch.linspace(-1, 1, 9)[:, None], torch.zeros(1), n_starts=64)
    assert points.counts == {"stable": 2, "saddle-1": 1}
    torch.testing.assert_close(
        points.states[points.of("stable")].sort(0).values, stable.orbits[:, -1].sort(0).values, rtol=0, atol=1e-7
    )


def test_what_does_not_settle_is_no_cycle():
    turn = torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]], dtype=DOUBLE)
    drive = torch.zeros(3, 2, dtype=DOUBLE)
    found = find_limit_cycles(lambda h, u: h @ turn.T + u, torch.ones(2, 2), drive, periods=20)
    assert len(found) == 0 and found.reached.tolist() == [-1, -1] and found.stable == ()
    blows_up = find_limit_cycles(lambda h, u: 3 * h + u, torch.ones(1, 2), drive, periods=1000)
    assert len(blows_up) == 0
    found.plot()
    memory = phase_memory(
        lambda h, u: h @ turn.T + u, lambda h: h[..., :1], torch.ones(2), torch.zeros(2, 3, 2), drive, (0.0, 0.5)
    )
    assert not memory.works and "no cycle" in memory.problems[0]


def test_bad_input_is_named():
    drive = torch.ones(4, 1)
    with pytest.raises(OptionError, match="not finite"):
        find_limit_cycles(lambda h, u: h, torch.tensor([[torch.nan]]), drive)
    with pytest.raises(OptionError, match="period of 4 steps"):
        phase_memory(lambda h, u: h, lambda h: h, torch.zeros(1), torch.zeros(1, 6, 1), drive, (0.0,))
    with pytest.raises(OptionError, match="2 stimuli"):
        phase_memory(lambda h, u: h, lambda h: h, torch.zeros(1), torch.zeros(2, 4, 1), drive, (0.0,))
