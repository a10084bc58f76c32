"""Waves whose velocity is known, memory whose capacity is known, and distances by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.analysis.memory_capacity import memory_capacity
from circuitkit.analysis.waves import space_time
from circuitkit.errors import OptionError
from circuitkit.functional.manifold import distance_to_visited

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def wave(turns_in_space, turns_in_time, n_steps=40, n_units=24):
    t, s = torch.arange(n_steps, dtype=DOUBLE)[:, None], torch.arange(n_units, dtype=DOUBLE)[None]
    return torch.cos(2 * torch.pi * (turns_in_space * s / n_units - turns_in_time * t / n_steps))


@given(k=st.integers(1, 11), f=st.integers(1, 19), back=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_travelling_wave_has_its_velocity(k, f, back):
    waves = space_time(wave(k, -f if back else f) + 3)
    assert waves.moving == pytest.approx(1) and waves.direction == pytest.approx(-1 if back else 1)
    assert waves.velocity == pytest.approx((-1 if back else 1) * (f / 40) / (k / 24))


@given(seed=st.integers(0, 1000), n_steps=st.integers(3, 20), n_units=st.integers(3, 20))
@settings(max_examples=30, deadline=None)
def test_the_power_is_the_variance(seed, n_steps, n_units):
    activity = torch.randn(n_steps, n_units, generator=rng(seed), dtype=DOUBLE)
    waves = space_time(activity)
    assert float(waves.power.sum()) == pytest.approx(float(activity.var(correction=0)))
    assert waves.power.shape == (n_steps, n_units) and 0 <= waves.moving <= 1 and -1 <= waves.direction <= 1
    mirrored = space_time(activity.flip(1))
    assert mirrored.moving == pytest.approx(waves.moving) and mirrored.direction == pytest.approx(-waves.direction)


def test_what_does_not_travel():
    still = space_time(wave(3, 0))
    assert still.moving == pytest.approx(0, abs=1e-12) and still.velocity is None
    together = space_time(wave(0, 4))
    assert together.moving == pytest.approx(0, abs=1e-12)
    standing = space_time(wave(2, 5) + wave(2, -5))
    assert standing.moving == pytest.approx(1) and standing.direction == pytest.approx(0, abs=1e-9)
    silent = space_time(torch.ones(5, 5))
    assert silent.moving == 0 and silent.velocity is None
    silent.plot()


def test_a_ring_of_shifts_carries_waves_and_its_figure_shows_them():
    shift, h, states = torch.eye(20).roll(1, 0), torch.zeros(20), []
    h[:4] = 1
    for _ in range(40):
        h = shift @ h
        states.append(h)
    waves = space_time(torch.stack(states))
    assert waves.velocity == pytest.approx(1) and waves.direction == pytest.approx(1)
    assert waves.moving > 0.9
    assert "+1 units per step" in waves.plot().layout.title.text


def test_waves_need_steps_and_units():
    with pytest.raises(OptionError, match=r"\(2, 5\)"):
        space_time(torch.zeros(2, 5))


@pytest.mark.parametrize("n", [1, 5, 20])
def test_a_delay_line_remembers_as_many_steps_as_it_has_units(n):
    x = torch.rand(4000, generator=rng(), dtype=DOUBLE)
    shift, h, states = torch.diag(torch.ones(n - 1, dtype=DOUBLE), -1), torch.zeros(n, dtype=DOUBLE), []
    read = torch.eye(n, dtype=DOUBLE)[0]
    for value in x:  # it stores x(t - 1) at step t
        states.append(h)
        h = shift @ h + value * read
    capacity = memory_capacity(torch.stack(states), x, lags=2 * n)
    assert capacity.total == pytest.approx(n, abs=0.05)
    assert float(capacity.squares[:n].min()) > 0.999 and float(capacity.squares[n:].max()) < 0.01


@pytest.mark.parametrize("seed", [0, 1])
def test_a_linear_reservoir_remembers_at_most_as_many_steps_as_units(seed):
    n, x = 10, torch.rand(6000, generator=rng(seed), dtype=DOUBLE) - 0.5
    w = 0.9 * torch.linalg.qr(torch.randn(n, n, generator=rng(seed), dtype=DOUBLE)).Q
    u, h, states = torch.randn(n, generator=rng(seed + 9), dtype=DOUBLE), torch.zeros(n, dtype=DOUBLE), []
    for value in x:
        h = w @ h + value * u
        states.append(h)
    lags = 60
    total = memory_capacity(torch.stack(states), x, lags=lags).total
    chance = lags / 2 / 2950
    assert 0.8 * (n - 1) < total <= n + 3 * chance  # lag 0 takes a part of n that is not counted


def test_noise_remembers_nothing_and_dead_units_do_not_matter():
    x, states = torch.rand(3000, generator=rng()), torch.randn(3000, 5, generator=rng(1))
    assert memory_capacity(states, x, lags=20).total < 0.05
    delays = torch.stack([x.roll(1), x.roll(1), torch.zeros_like(x)], 1)
    capacity = memory_capacity(delays, x, lags=3, ridge=0.0)
    assert capacity.total == pytest.approx(1, abs=0.02)
    assert memory_capacity(torch.zeros(3000, 2), x, lags=3).total == 0
    assert "sum 1.0" in capacity.plot().layout.title.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"states": torch.zeros(10, 2)}, "10 states for 500 inputs"),
        ({"lags": 0}, "lags=0"),
        ({"held_out": 1.0}, r"held_out=1\.0"),
        ({"washout": 495}, "run longer"),
    ],
)
def test_bad_runs_are_named(changes, said):
    options = {"states": torch.randn(500, 3), "x": torch.randn(500), "lags": 5} | changes
    with pytest.raises(OptionError, match=said):
        memory_capacity(**options)


@given(seed=st.integers(0, 1000), n=st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_distances_are_those_of_the_nearest_visited_state(seed, n):
    visited = torch.randn(n, 3, generator=rng(seed), dtype=DOUBLE)
    states = torch.randn(2, 4, 3, generator=rng(seed + 1), dtype=DOUBLE)
    found = distance_to_visited(states, visited)
    gaps = (states[..., None, :] - visited).norm(dim=-1)
    torch.testing.assert_close(found.nearest, gaps.min(-1).values)
    assert torch.equal(found.neighbour, gaps.argmin(-1))
    among = (visited[:, None] - visited).norm(dim=-1) + torch.diag(torch.full((n,), torch.inf))
    assert found.spacing == pytest.approx(float(among.min(-1).values.quantile(0.9)))
    torch.testing.assert_close(found.relative, found.nearest / found.spacing)
    # No unit of length, no order, and rest at the same state for long, changes how far a state is.
    other = distance_to_visited(7 * states, 7 * torch.cat((visited[:1].expand(50, -1), visited)).flip(0))
    torch.testing.assert_close(other.relative, found.relative)


def test_distances_in_chunks_are_the_same(monkeypatch):
    visited, states = torch.randn(40, 3, generator=rng()), torch.randn(7, 3, generator=rng(1))
    whole = distance_to_visited(states, visited)
    monkeypatch.setattr("circuitkit.functional.manifold._CHUNK", 100)
    cut = distance_to_visited(states, visited)
    assert torch.equal(whole.nearest, cut.nearest) and whole.spacing == cut.spacing
    assert float(distance_to_visited(visited, visited).nearest.max()) == 0


def test_distances_need_visited_states():
    for visited, said in (
        (torch.zeros(3, 2), "1 of them different"),
        (torch.zeros(3, 4), "4"),
        (torch.full((3, 2), torch.nan), "finite"),
    ):
        with pytest.raises(OptionError, match=said):
            distance_to_visited(torch.zeros(1, 2), visited)
