"""Eigenvalues over training: matched as they should be, and what gradient descent makes of an integrator."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.analysis.eigenvalues import track_eigenvalues
from circuitkit.analysis.modes import dual, left_modes, right_modes
from circuitkit.errors import OptionError
from circuitkit.functional.assignment import cheapest_pairs

DOUBLE = torch.float64


def learn(wanted, n_steps, seed=0, n=64, size=0.01 / 8, rate=2e-2):
    """A linear network whose impulse response v^T W^t u learns a filter, by clipped gradient descent from almost 0."""
    rng = torch.Generator().manual_seed(seed)
    draw = (torch.randn(shape, generator=rng) for shape in ((n, n), (n,), (n,)))
    w, u, v = (x * scale for x, scale in zip(draw, (size, 1 / 8, 1 / 8), strict=True))
    kept = []
    for step in range(n_steps + 1):
        w, u, v = (x.detach().requires_grad_() for x in (w, u, v))
        if step % (n_steps // 10) == 0:
            kept.append((step, w.detach(), u.detach()[:, None], v.detach()[None]))
        h, response = u, []
        for _ in wanted:
            response.append(h @ v)
            h = w @ h
        grads = torch.autograd.grad((torch.stack(response) - wanted).square().sum(), (w, u, v))
        clip = min(1.0, 1 / float(torch.cat([g.flatten() for g in grads]).norm()))
        w, u, v = (x - rate * clip * g for x, g in zip((w, u, v), grads, strict=True))
    steps, weights, read_in, read_out = zip(*kept, strict=True)
    return track_eigenvalues(weights, steps, read_in=read_in, read_out=read_out)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_integrator_grows_one_outlier_and_nothing_else(seed):
    tracks = learn(0.95 ** torch.arange(60.0), 200, seed)
    assert float(tracks.values[0].abs().max()) < 0.02
    assert abs(float(tracks.values[-1, 0].real) - 0.95) <= 0.02 and float(tracks.values[-1, 0].imag) == 0
    assert float(tracks.values[-1, 1].abs()) < 0.1
    assert float(tracks.effective_rank[-1]) < 1.1 < 10 < float(tracks.effective_rank[0])
    # It reads the input and is read out: its left vector has turned to the read-in, its right one to the read-out.
    assert float(tracks.read_in[-1, 0]) > 0.85 and float(tracks.read_out[-1, 0]) > 0.85
    assert float(tracks.read_in[0, 0]) < 0.5
    growth = tracks.values[:, 0].abs()
    assert bool((growth[1:] >= growth[:-1] - 0.03).all())


def test_a_damped_oscillator_grows_a_conjugate_pair():
    t = torch.arange(60.0)
    tracks = learn(0.95**t * torch.cos(0.5 * t), 600)
    one, other = tracks.values[-1, :2]
    assert one == other.conj() and float(one.imag.abs()) > 0.3
    assert float(one.abs()) == pytest.approx(0.95, abs=0.02)
    assert float(one.angle().abs()) == pytest.approx(0.5, abs=0.02)
    assert float(tracks.values[-1, 2].abs()) < 0.1


@pytest.mark.parametrize("gap", [1e-1, 1e-4, 0.0])
def test_duals_of_values_near_each_other_are_those_of_the_right_vectors(gap):
    weight = torch.diag(torch.tensor([0.9, 0.5, 0.5 + gap, 0.1], dtype=DOUBLE))
    weight[0, 1:], weight[1, 2] = 0.3, float(gap > 0)
    values, right = right_modes(weight)
    products = dual(right) @ right.T
    torch.testing.assert_close(products, torch.eye(4, dtype=products.dtype), rtol=0, atol=1e-9)
    torch.testing.assert_close((right.T * values @ dual(right)).real, weight, rtol=0, atol=1e-9)
    left = left_modes(weight, values, right)
    torch.testing.assert_close(left.conj() @ weight.to(left), values[:, None] * left.conj(), rtol=0, atol=1e-8)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_left_and_right_vectors_are_those_of_the_weight(seed):
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(6, 6, generator=rng, dtype=DOUBLE) for _ in range(2)]
    tracks = track_eigenvalues(weights, [0, 1])
    for w, values, right, left in zip(weights, tracks.values, tracks.right, tracks.left, strict=True):
        w = w.to(values)
        torch.testing.assert_close(w @ right.T, right.T * values, rtol=0, atol=1e-9)
        torch.testing.assert_close(left.conj() @ w, values[:, None] * left.conj(), rtol=0, atol=1e-9)
        products = left.conj() @ right.T  # biorthogonal
        assert float((products - torch.diag(products.diagonal())).abs().max()) < 1e-7


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_modes_are_followed_through_crossings(seed):
    """Vectors stay, values pass each other: sorted by size they would be exchanged."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=rng, dtype=DOUBLE)).Q
    basis = basis + 0.1 * torch.randn(5, 5, generator=rng, dtype=DOUBLE)
    ends = torch.randn(2, 5, generator=rng, dtype=DOUBLE)
    paths = [ends[0].lerp(ends[1], a / 20) for a in range(21)]
    weights = [basis @ torch.diag(path) @ torch.linalg.inv(basis) for path in paths]
    tracks = track_eigenvalues(weights, range(21))
    order = ends[1].abs().argsort(descending=True)
    torch.testing.assert_close(tracks.values.real, torch.stack(paths)[:, order], rtol=0, atol=1e-8)


@given(n=st.integers(1, 6), seed=st.integers(0, 10_000), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_pairs_are_the_cheapest_of_all(n, seed, ties):
    cost = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    cost = cost.round() if ties else cost
    pairs = cheapest_pairs(cost)
    assert sorted(pairs.tolist()) == list(range(n))
    best = min(sum(float(cost[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(n)))
    assert float(cost[range(n), pairs].sum()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (([], []), "0 weights"),
        (([torch.eye(2), torch.eye(2)], [1, 1]), "steps growing"),
        (([torch.eye(2), torch.eye(3)], [0, 1]), "shapes"),
        (([torch.ones(2, 3)], [0]), "square"),
        (([torch.eye(2), torch.full((2, 2), torch.nan)], [0, 7]), "step 7 is not finite"),
    ],
)
def test_bad_input_is_named(given, said):
    with pytest.raises(OptionError, match=said):
        track_eigenvalues(*given)


def test_maps_must_fit_and_costs_be_finite():
    with pytest.raises(OptionError, match="read_in does not fit"):
        track_eigenvalues([torch.eye(2)], [0], read_in=[torch.ones(3, 1)])
    with pytest.raises(OptionError, match="read_out does not fit"):
        track_eigenvalues([torch.eye(2)], [0], read_out=[])
    with pytest.raises(OptionError, match="not finite"):
        cheapest_pairs(torch.tensor([[torch.inf]]))


def test_the_figure_shows_paths_and_magnitudes():
    figure = track_eigenvalues([torch.eye(2), 2 * torch.eye(2)], [0, 10]).plot(top=1)
    assert [trace.name for trace in figure.data if trace.showlegend is not False][-1] == "mode 0: 2.000"
    assert figure.data[-1].y == (1.0, 2.0)
