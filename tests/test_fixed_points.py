"""Fixed points of networks whose fixed points are known, and of trained flip-flops."""

import itertools

import networkx as nx
import pytest
import torch

from circuitkit.analysis.attractor_graph import attractor_graph, pulse_moves
from circuitkit.analysis.fixed_points import find_fixed_points
from circuitkit.analysis.mode_ablation import ablate_modes, mode_projector
from circuitkit.errors import OptionError
from tests.dynamics_toys import flip_flop, pulses

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latches(h, x):
    """Three bits that do not know each other: 27 fixed points, 3^3 with 0 or +-a in each number."""
    return torch.tanh(2 * h + x)


@pytest.fixture(scope="module")
def cube():
    states = torch.randn(200, 3, generator=rng())
    return find_fixed_points(latches, states, torch.zeros(3))


def test_the_cube_of_three_latches_is_found_to_rounding_error(cube):
    assert cube.counts == {"stable": 8, "saddle-1": 12, "saddle-2": 6, "saddle-3": 1}
    a = torch.tensor(0.9)  # a = tanh(2 a), by iteration
    for _ in range(200):
        a = torch.tanh(2 * a.double())
    want = {tuple(round(float(v), 9) + 0.0 for v in point) for point in itertools.product((-a, 0 * a, a), repeat=3)}
    assert {tuple(round(v, 9) + 0.0 for v in point) for point in cube.states.tolist()} == want
    assert cube.index_sum == 1 and int(cube.found.sum()) + cube.n_lost == 512
    # dF/dh is diagonal: 2 (1 - h^2); dF/dx the same without the 2.
    want = torch.diag_embed(2 * (1 - torch.tanh(2 * cube.states).square()))
    torch.testing.assert_close(cube.jacobians, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(cube.input_jacobians, want / 2, rtol=0, atol=1e-9)


def test_the_cubes_edges_are_its_saddles(cube):
    graph = attractor_graph(latches, cube)
    corners = cube.states[graph.stable].sign()
    assert graph.fraction_joining == 1.0
    assert nx.is_isomorphic(nx.Graph(graph.to_networkx()), nx.hypercube_graph(3))
    for saddle, (a, b) in zip(graph.saddles.tolist(), graph.ends.tolist(), strict=True):
        between = cube.states[graph.stable[[a, b]]].mean(0)
        torch.testing.assert_close(between, cube.states[saddle], rtol=0, atol=1e-9)
    moves = pulse_moves(latches, graph, torch.cat((torch.eye(3), -torch.eye(3)))[:, None] * 3)
    assert moves.fraction_along_edges == 1.0
    for bit, row in enumerate(moves.to.tolist()):
        for start, end in enumerate(row):
            want = corners[start].clone()
            want[bit % 3] = 1 if bit < 3 else -1
            assert torch.equal(corners[end], want)


def test_a_saddle_that_leads_to_one_point_twice_or_nowhere_joins_nothing():
    # A ring: the radius is pulled to 1, the angle from pi to 0 both ways round; and along a line without an end.
    def ring(h, x):
        angle, radius = torch.atan2(h[..., 1], h[..., 0]), h.norm(dim=-1)
        angle, radius = angle - 0.2 * torch.sin(angle), radius + 0.5 * (1 - radius)
        return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)

    points = find_fixed_points(ring, torch.tensor([[1.0, 0.3], [-1.0, 0.1], [0.0, 1.0]]), torch.zeros(1), noise=0.1)
    graph = attractor_graph(ring, points)
    assert graph.ends.tolist() == [[0, 0]] and graph.fraction_joining == 0.0
    assert list(graph.to_networkx().edges()) == [(0, 0)]
    assert attractor_graph(ring, points, steps=3).ends.tolist() == [[-1, -1]]
    assert attractor_graph(ring, points, steps=3).to_networkx().number_of_edges() == 0


def test_slow_points_are_told_from_fixed_ones():
    # h^2 + 1e-4 never vanishes: the network crawls past 0, where q has a minimum that is no fixed point.
    def crawls(h, x):
        return h + h.square() + 1e-4

    points = find_fixed_points(crawls, torch.tensor([[-0.5], [0.0]]), torch.zeros(1), noise=0.2, n_starts=64)
    assert points.counts == {"slow": 1}
    assert abs(float(points.states[0])) < 1e-3 and float(points.speeds[0]) == pytest.approx(1e-4, rel=1e-3)
    strict = find_fixed_points(crawls, torch.tensor([[-0.5], [0.0]]), torch.zeros(1), noise=0.2, n_starts=64, slow=1e-6)
    assert len(strict) == 0 and strict.n_lost == 64 and strict.counts == {}


def test_a_linear_network_has_one_fixed_point_where_algebra_says():
    w = torch.randn(4, 4, generator=rng(), dtype=DOUBLE) / 4
    x = torch.randn(4, generator=rng(1), dtype=DOUBLE)
    points = find_fixed_points(lambda h, u: h @ w.T + u, torch.randn(9, 4, generator=rng()), x, n_starts=32)
    torch.testing.assert_close(points.states[0], torch.linalg.solve(torch.eye(4).double() - w, x), rtol=0, atol=1e-9)
    assert points.counts == {"stable": 1}


@pytest.mark.parametrize(("cell", "seed", "n_units"), [("tanh", 0, 32), ("gru", 1, 24)])
def test_trained_flip_flops_have_eight_stable_points_and_the_saddles_between_them(cell, seed, n_units):
    step, read_out, states = flip_flop(cell, seed)
    assert step.size == n_units
    points = find_fixed_points(step, states, torch.zeros(3))
    assert points.counts["stable"] == 8 and points.counts["saddle-1"] >= 10
    graph = attractor_graph(step, points)
    bits = read_out(points.states[graph.stable])
    torch.testing.assert_close(bits, bits.sign(), rtol=0, atol=0.15)  # the outputs at rest are the bits
    assert len({tuple(row) for row in bits.sign().tolist()}) == 8
    assert graph.fraction_joining == 1.0
    flips = [(bits[a].sign() != bits[b].sign()).nonzero().flatten().tolist() for a, b in graph.ends.tolist()]
    assert all(len(bit) == 1 for bit in flips)  # every saddle joins two states that differ in one bit
    once = pulse_moves(step, graph, torch.cat((torch.eye(3), -torch.eye(3)))[:, None])
    for pulse, row in enumerate(once.to.tolist()):
        assert all(bits[end, pulse % 3].sign() == (1 if pulse < 3 else -1) for end in row)
    # Held still along the direction in which a saddle decides, the network loses that bit and no other.
    for edge in (0, len(flips) // 2):
        saddle = int(graph.saddles[edge])
        where = points.states[saddle], points.jacobians[saddle]
        lost = ablate_modes(step, read_out, *where, [0], step.start(points.states), pulses(32, 25)).effect
        bit = flips[edge][0]
        assert float(lost[bit]) > 0.8 and float(lost[[b for b in range(3) if b != bit]].max()) < 0.1


def test_ablating_modes_of_a_linear_network_is_algebra():
    w = torch.diag(torch.tensor([0.9, 0.5, 0.2], dtype=DOUBLE))
    turn = torch.tensor([[0.6, -0.5, 0], [0.5, 0.6, 0], [0, 0, 0.3]], dtype=DOUBLE)
    mix = torch.randn(3, 3, generator=rng(), dtype=DOUBLE)
    x = torch.randn(2, 6, 3, generator=rng(1), dtype=DOUBLE)
    zero = torch.zeros(3, dtype=DOUBLE)
    jacobian = mix @ w @ torch.linalg.inv(mix)
    found = ablate_modes(lambda h, u: h @ jacobian.T + u, lambda h: h, zero, jacobian, [1], zero, x)
    smaller = mix @ torch.diag(torch.tensor([0.9, 0, 0.2], dtype=DOUBLE)) @ torch.linalg.inv(mix)
    keep = mix @ torch.diag(torch.tensor([1.0, 0, 1], dtype=DOUBLE)) @ torch.linalg.inv(mix)
    state = zero.expand(2, -1)
    for t in range(6):
        state = state @ smaller.T + x[:, t] @ keep.T
        torch.testing.assert_close(found.ablated[:, t], state)
    jacobian = mix @ turn @ torch.linalg.inv(mix)
    projector, values = mode_projector(jacobian, [0])  # one of a pair takes the other along
    assert len(values) == 2 and values[0] == values[1].conj()
    torch.testing.assert_close(projector @ projector, projector)
    assert float(projector.trace()) == pytest.approx(1.0)


def test_the_same_seed_finds_the_same_points_and_leaves_the_random_state_alone(cube):
    before = torch.get_rng_state()
    again = find_fixed_points(latches, torch.randn(200, 3, generator=rng()), torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(again.states, cube.states)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"states": torch.zeros(0, 2)}, "no visited states"),
        ({"states": torch.full((1, 2), torch.nan)}, "not finite"),
        ({"n_starts": 0}, "n_starts=0"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"apart": 0.0}, "apart=0.0"),
    ],
)
def test_bad_input_is_named(changes, said):
    given = {"states": torch.zeros(3, 2), "x": torch.zeros(2)} | changes
    with pytest.raises(OptionError, match=said):
        find_fixed_points(latches, **given)


def test_a_graph_without_stable_points_and_modes_that_do_not_exist():
    points = find_fixed_points(lambda h, x: 2 * h, torch.ones(2, 1), torch.zeros(1), n_starts=4)
    with pytest.raises(OptionError, match="no stable point"):
        attractor_graph(lambda h, x: 2 * h, points)
    with pytest.raises(OptionError, match="from 0 to 1"):
        mode_projector(torch.eye(2, dtype=DOUBLE), [2])
    with pytest.raises(OptionError, match="no full set"):
        mode_projector(torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=DOUBLE), [0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_gives_no_numbers_is_refused(bad):
    with pytest.raises(OptionError, match="gives NaN or infinite states"):
        find_fixed_points(lambda h, x: h * bad, torch.randn(8, 2), torch.zeros(1), n_starts=4)


def test_figures_show_what_was_found(cube):
    figure = cube.plot()
    assert {"visited states", "stable", "saddle-1", "saddle-2", "saddle-3"} <= {trace.name for trace in figure.data}
    assert "8 stable, 12 saddle-1" in figure.layout.title.text
    picture = attractor_graph(latches, cube).plot()
    assert "100 % of them" in picture.layout.title.text and len(picture.data[1].x) == 12
