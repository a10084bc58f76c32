"""Recurrences written as attention, against triple loops and against the scans themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.functional.implicit_maps import delta_map, diagonal_map, fold, linear_attention_map, selective_map
from circuitkit.functional.prefix_products import prefix_products
from tests.oracles.implicit_maps import (
    delta_scan,
    literal_delta_map,
    literal_prefix_products,
    literal_selective_map,
    selective_scan,
)

EXACT = {"rtol": 1e-12, "atol": 1e-13}
# Zeros, signs, numbers whose product leaves float64 on the way and comes back, and unstable ones.
AWKWARD = [0.0, -0.0, 1.0, -1.0, 1e-200, -1e-200, 1e200, 0.5, -0.9, 1.1]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_products_of_zeros_signs_and_extremes(values):
    a = torch.tensor(values, dtype=torch.float64)
    got = prefix_products(a)
    for t in range(len(a)):
        for s in range(len(a)):
            # math.prod of exact powers would overflow on the way, so magnitudes are compared as logarithms.
            part = values[s + 1 : t + 1]
            zero = s > t or 0 in [abs(x) for x in part]
            assert (got[t, s] == 0) == zero or math.fsum(math.log10(abs(x)) for x in part) < -300
            if not zero and abs(size := math.fsum(math.log(abs(x)) for x in part)) < 600:
                sign = math.prod(math.copysign(1, x) for x in part)
                assert float(got[t, s]) == pytest.approx(sign * math.exp(size), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_products_equal_three_loops(dtype):
    a = torch.randn(2, 30, dtype=dtype, generator=seeded(0))
    a[0, 7] = 0
    want = torch.stack([literal_prefix_products(row) for row in a])
    torch.testing.assert_close(prefix_products(a), want, **EXACT)
    assert prefix_products(a)[0, 7:, :7].abs().max() == 0 and a[0, 7] == 0


def test_a_thousand_steps_after_many_tiny_ones():
    """A quotient of running products would be 0 / 0 here, and a difference of running logarithms off by 1e-11."""
    a = torch.tensor([1e-30] * 500 + [0.999] * 500, dtype=torch.float64)
    got = prefix_products(a)
    assert torch.allclose(got[-1, 500:], 0.999 ** torch.arange(499, -1, -1).double(), rtol=1e-13, atol=0)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_the_map_weighs_the_inputs_to_the_scan(steps, channels, states, complex_, seed):
    dtype = torch.complex128 if complex_ else torch.float64
    a, b, c = torch.randn(3, 2, steps, channels, states, dtype=dtype, generator=seeded(seed))
    a = 0.99 * a / a.abs().amax().clamp(min=1.0)
    a[..., ::3, :, :1] *= 0
    u = torch.randn(2, steps, channels, dtype=dtype, generator=seeded(seed + 1))
    alpha = selective_map(a, b, c)
    got = torch.einsum("rcts,rsc->rtc", alpha, u)
    assert float((got - selective_scan(a, b, c, u)).abs().max()) < 1e-12
    torch.testing.assert_close(alpha[1], literal_selective_map(a[1], b[1], c[1]), **EXACT)


def test_the_identity_of_a_selective_state_space_layer():
    """Six channels of four states over thirty steps, the size at which the study measured 1.8e-15."""
    rand = {"dtype": torch.float64, "generator": seeded(3)}
    delta = torch.randn(1, 30, 6, **rand).exp()
    a = torch.exp(-delta[..., None] * torch.rand(6, 4, **rand))
    b = delta[..., None] * torch.randn(1, 30, 1, 4, **rand)
    c = torch.randn(1, 30, 1, 4, **rand).expand_as(a)
    u = torch.randn(1, 30, 6, **rand)
    got = torch.einsum("rcts,rsc->rtc", selective_map(a, b, c), u)
    assert float((got - selective_scan(a, b, c, u)).abs().max()) < 1e-12


def test_real_decays_of_complex_inputs_and_the_other_way_round():
    a, b, c = torch.rand(3, 7, 2, generator=seeded(1))
    want = diagonal_map(a, b, c)
    turn = torch.tensor(1j)
    torch.testing.assert_close(diagonal_map(a, turn * b, c), turn * want)
    torch.testing.assert_close(diagonal_map(a, b, turn * c), turn * want)
    torch.testing.assert_close(diagonal_map(a + 0j, b, c), want + 0j)


def test_one_state_is_the_diagonal_map():
    a, b, c = torch.rand(3, 2, 7, 5, generator=seeded(1))
    assert torch.equal(diagonal_map(a, b, c), selective_map(a[..., None], b[..., None], c[..., None]))


def test_linear_attention_and_its_fast_weights():
    q, k, v = torch.randn(3, 2, 3, 15, 4, dtype=torch.float64, generator=seeded(2))
    written = torch.einsum("...sv,...sk->...svk", v, k).cumsum(-3)
    want = torch.einsum("...tvk,...tk->...tv", written, q)
    torch.testing.assert_close(linear_attention_map(q, k) @ v, want, **EXACT)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_the_delta_rule(steps, width, seed):
    q, k, v = torch.randn(3, 2, 3, steps, width, dtype=torch.float64, generator=seeded(seed))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = 2 * torch.rand(2, 3, steps, dtype=torch.float64, generator=seeded(seed + 1))
    alpha = delta_map(q, k, beta)
    assert float(((alpha @ v)[1, 2] - delta_scan(q[1, 2], k[1, 2], v[1, 2], beta[1, 2])).abs().max()) < 1e-12
    torch.testing.assert_close(alpha[0, 1], literal_delta_map(q[0, 1], k[0, 1], beta[0, 1]), **EXACT)


def test_convolution_skip_and_gate_fold_into_the_map():
    rand = {"dtype": torch.float64, "generator": seeded(4)}
    x, gate = torch.randn(2, 9, 3, **rand), torch.randn(2, 9, 3, **rand)
    taps, skip = torch.randn(3, 4, **rand), torch.randn(3, **rand)
    a, b, c = torch.randn(3, 2, 9, 3, 1, **rand)
    u = sum(taps[:, lag] * torch.nn.functional.pad(x, (0, 0, lag, 0))[:, :9] for lag in range(4))
    want = gate * (selective_scan(a, b, c, u) + skip * u)
    alpha = fold(selective_map(a, b, c), taps=taps, skip=skip, gate=gate)
    torch.testing.assert_close(torch.einsum("rcts,rsc->rtc", alpha, x), want, **EXACT)
    assert torch.equal(fold(alpha), alpha)
    short = fold(torch.eye(2, dtype=torch.float64).expand(3, 2, 2), taps=taps)
    assert short.shape == (3, 2, 2)
