"""Certificates of contraction: sound whatever the weights, and what they say of networks that are known."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.analysis.contraction import contraction
from circuitkit.errors import OptionError
from circuitkit.models.recurrent.zoo import build

NAMES = ("spectral-norm", "absolute-value", "diagonal-metric", "symmetric")


def draw(seed, kind, n=4):
    """Weights near the border of every condition."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(n, n, generator=rng, dtype=torch.float64)
    size = 0.5 + torch.rand((), generator=rng, dtype=torch.float64)
    if kind == "symmetric":
        w = w + w.T
        return w * (size * 1.2 / torch.linalg.eigvalsh(w).max().abs().clamp_min(0.2))
    if kind == "scaled":
        stretch = torch.exp(torch.randn(n, generator=rng, dtype=torch.float64))
        w = stretch[:, None] * w / stretch[None, :]
    return w * size / (torch.linalg.matrix_norm(w, 2) if kind == "plain" else torch.linalg.eigvals(w).abs().max() * 2)


def slopes(n, rng, low):
    """Slopes of the nonlinearity, most of them at their limits."""
    d = low + (1 - low) * torch.rand(200, n, generator=rng, dtype=torch.float64)
    corner = torch.rand(200, n, generator=rng) < 0.7
    return torch.diag_embed(torch.where(corner, torch.where(d > (1 + low) / 2, 1.0, float(low)).double(), d))


def measure(j, norm):
    """The logarithmic norm: how fast a vector can grow under dh/dt = J h."""
    if norm == "euclidean":
        return torch.linalg.eigvalsh((j + j.mT) / 2).max(-1).values
    off = j.abs() - torch.diag_embed(j.diagonal(dim1=-2, dim2=-1).abs())
    return (j.diagonal(dim1=-2, dim2=-1) + off.sum(-1)).max(-1).values


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["plain", "scaled", "symmetric"]),
    leak=st.sampled_from([None, 1.0, 0.3, 0.02]),
)
@settings(max_examples=20, deadline=None)
def test_no_jacobian_breaks_a_certificate(seed, kind, leak):
    w = draw(seed, kind)
    n, rng = len(w), torch.Generator().manual_seed(seed)
    for certificate in contraction(w, leak=leak).certificates:
        if not certificate.holds:
            continue
        d = slopes(n, rng, low=0 if certificate.name == "symmetric" else -1)
        eye, inverse = torch.eye(n).double(), torch.linalg.inv(certificate.scale)
        j = certificate.scale @ (d @ w - eye) @ inverse
        if leak is None:
            assert float(measure(j, certificate.norm).max()) <= -certificate.rate + 1e-9
            continue
        one = eye + leak * j
        size = one.abs().sum(-1).max(-1).values if certificate.norm == "max" else torch.linalg.matrix_norm(one, 2)
        assert float(size.max()) <= certificate.factor + 1e-9 and certificate.factor < 1


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_the_symmetric_certificate_holds_for_the_other_form_in_the_inverse_metric(seed):
    w = draw(seed, "symmetric")
    certificate = contraction(w)["symmetric"]
    if certificate.holds:
        metric = torch.linalg.inv(2 * torch.eye(4).double() - w)
        d = slopes(4, torch.Generator().manual_seed(seed), low=0)
        j = w @ d - torch.eye(4).double()
        worst = torch.linalg.eigvalsh(metric @ j + j.mT @ metric + 2 * certificate.rate * metric).max()
        assert float(worst) <= 1e-9 * float(metric.abs().max())


@given(seed=st.integers(0, 10_000), n=st.integers(1, 5), top=st.sampled_from([-3.0, -0.5, 0.5, 0.9, 0.99]))
@settings(max_examples=40, deadline=None)
def test_the_symmetric_certificate_holds_at_every_corner(seed, n, top):
    """The inequality is linear in the slopes, so their corners decide."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q
    values = top - 4 * torch.rand(n, generator=rng, dtype=torch.float64).square()
    values[0] = top
    w = basis @ torch.diag(values) @ basis.T
    certificate = contraction((w + w.T) / 2)["symmetric"]
    eye, metric = torch.eye(n).double(), certificate.scale.T @ certificate.scale
    torch.testing.assert_close(metric, 2 * eye - w)
    assert certificate.holds and certificate.margin == pytest.approx(1 - top)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    j = torch.diag_embed(corners) @ w - eye
    worst = torch.linalg.eigvalsh(metric @ j + j.mT @ metric + 2 * certificate.rate * metric)
    assert float(worst.max()) <= 1e-9


def test_a_shrunk_orthogonal_weight_passes():
    w = 0.9 * torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    for leak in (None, 1.0, 0.1):
        found = contraction(w, leak=leak)
        assert found.certified and found["spectral-norm"].holds and found["diagonal-metric"].holds
        assert found["spectral-norm"].margin == pytest.approx(0.1, abs=1e-6)
        assert not found["absolute-value"].holds  # 32 dense units: |W| has a far larger radius


@pytest.mark.parametrize("leak", [None, 1.0])
def test_a_trained_flip_flop_fails_because_it_has_many_attractors(leak):
    w = build("toys/flip-flop_tanh_s0")[0].cell.weight_hh_l0
    found = contraction(w, leak=leak)
    assert not found.certified and all(c.margin < 0 or math.isnan(c.margin) for c in found.certificates)


def test_each_condition_passes_where_the_others_fail():
    chain = torch.tensor([[0.0, 5.0], [0.0, 0.0]])  # long gains, no loop
    found = contraction(chain)
    assert not found["spectral-norm"].holds and found["absolute-value"].holds and found["diagonal-metric"].holds
    inhibited = torch.tensor([[0.0, -3.0], [-3.0, 0.0]]) - 3 * torch.eye(2)  # symmetric, top eigenvalue 0
    assert [inner.holds for inner in contraction(inhibited).certificates] == [False, False, False, True]
    stretch = torch.tensor([1.0, 20.0])
    turn = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    skewed = stretch[:, None] * turn / stretch
    assert [inner.holds for inner in contraction(skewed).certificates] == [False, False, True, False]
    assert contraction(skewed)["diagonal-metric"].margin == pytest.approx(0.1, abs=0.01)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_the_diagonal_metric_is_at_least_as_good_as_the_two_it_contains(seed):
    found = contraction(draw(seed, "scaled"))
    best = max(found["spectral-norm"].margin, 1 - float(torch.linalg.eigvals(draw(seed, "scaled").abs()).abs().max()))
    assert found["diagonal-metric"].margin >= best - 1e-4


def test_bad_input_is_named_and_the_figure_says_what_was_shown():
    with pytest.raises(OptionError, match="square"):
        contraction(torch.ones(2, 3))
    with pytest.raises(OptionError, match="leak=0"):
        contraction(torch.eye(2), leak=0.0)
    assert "not a proof" in contraction(2 * torch.eye(2)).plot().layout.title.text
    figure = contraction(torch.tensor([[0.1, 0.2], [0.0, 0.1]]), leak=1.0).plot()
    assert "leak 1" in figure.layout.title.text and "symmetric (does not apply)" in figure.data[0].y
    assert tuple(c.name for c in contraction(torch.zeros(3, 3)).certificates) == NAMES
    assert contraction(torch.zeros(3, 3)).certified
