"""What the formulas of circuitkit's own cells promise, each against another way of computing the same."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from circuitkit.errors import OptionError
from circuitkit.models.recurrent.cells.bilinear import DiagonalBilinear, FactoredBilinear, FullBilinear
from circuitkit.models.recurrent.cells.delta_net import DeltaNet
from circuitkit.models.recurrent.cells.gated_linear import GatedLinear
from circuitkit.models.recurrent.cells.inputs import stability
from circuitkit.models.recurrent.cells.linear_attention import LinearAttention
from circuitkit.models.recurrent.cells.lru import LRU
from circuitkit.models.recurrent.cells.rate import RateRNN
from circuitkit.models.recurrent.cells.selective_ssm import SelectiveSSM
from circuitkit.models.recurrent.parts import FEATURES
from circuitkit.models.recurrent.stepper import run_network
from circuitkit.models.recurrent.transition import transition
from tests.test_recurrent_cells import OWN, a_cell, network_of


def test_lru_is_a_convolution_with_powers_of_its_eigenvalues():
    module = a_cell(lambda: LRU(3, 5, 2))
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    lags = torch.arange(8)
    back = lags[:, None] - lags  # t - s
    powers = module.lam() ** back.clamp(min=0)[..., None] * (back >= 0)[..., None]
    C, B = torch.complex(module.C_re, module.C_im), module.drive()
    want = torch.einsum("on, tsn, ni, bsi -> bto", C, powers, B, x.to(C.dtype)).real + x @ module.D.T
    assert torch.allclose(module(x), want, rtol=0, atol=1e-12)


def test_lru_starts_on_its_ring_with_states_of_the_size_of_its_input():
    torch.manual_seed(0)
    module = LRU(16, 400, radius=(0.5, 0.9), phase=0.3)
    radius, angle = module.lam().abs(), module.lam().angle()
    assert 0.5 <= radius.min() and radius.max() <= 0.9 and 0 <= angle.min() and angle.max() <= 0.3 + 1e-6
    network = network_of(module)
    h = run_network(network, torch.randn(8, 100, 16))["l0.h"][:, 50:].detach()
    assert 0.9 < float(h.unflatten(-1, (-1, 2)).square().sum(-1).mean()) < 1.1


def linear_attention_by_hand(d):
    """Linear attention with W_v = W_k = W_q = 1: products x_i x_j kept for ever, and x itself for one step."""
    pairs = [(i, j) for i in range(d) for j in range(d)]
    module = GatedLinear(d + 1, hidden_size=d * d + d, gate_size=d * d, output_size=d).double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.zero_()
    module.lam[: d * d] = 1.0
    for unit, (i, j) in enumerate(pairs):  # key times value
        module.A[unit, i] = module.B[unit, j] = 1.0
        module.C1[unit, unit] = module.C2[unit, d * d + j] = module.D[i, unit] = 1.0
    for j in range(d):  # query times the constant input
        module.A[d * d + j, j] = module.B[d * d + j, d] = 1.0
    return module


def test_a_gated_linear_recurrence_built_by_hand_is_linear_attention():
    d = 4
    gated = linear_attention_by_hand(d)
    attention = LinearAttention(d, d, d).double().requires_grad_(False)
    for weight in attention.parameters():
        weight.copy_(torch.eye(d))
    x = torch.randn(3, 30, d, dtype=torch.float64)
    one = torch.ones(3, 30, 1, dtype=torch.float64)
    x_one = torch.cat((x, one), -1)
    assert float((gated(x_one) - attention(x)).abs().max()) < 1e-10
    stepped = run_network(network_of(gated), x_one)[FEATURES]
    assert float((stepped - attention(x)).abs().max()) < 1e-10
    assert stability(gated) == stability(attention) == 1.0


def test_linear_attention_is_attention_without_softmax():
    module = a_cell(lambda: LinearAttention(3, 4, 2))
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    k, v, q = x @ module.W_k.T, x @ module.W_v.T, x @ module.W_q.T
    assert torch.allclose(module(x), (q @ k.mT).tril() @ v, rtol=0, atol=1e-10)


def test_delta_net_replaces_what_it_stored_under_a_key():
    module = a_cell(lambda: DeltaNet(2, 2, 3))
    module.W_k.copy_(200 * torch.eye(2))  # one-hot keys: two places
    module.W_q.copy_(200 * torch.eye(2))
    module.w_beta.zero_()
    module.b_beta.fill_(50.0)  # write with full strength
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]], dtype=torch.float64)
    assert torch.allclose(module(x), x @ module.W_v.T, rtol=0, atol=1e-9)
    module.b_beta.fill_(-2.0)
    strength = torch.sigmoid(torch.tensor(-2.0, dtype=torch.float64))
    first, last = module(x)[0, 0], module(x)[0, 2]
    v = (x @ module.W_v.T)[0]
    assert torch.allclose(first, strength * v[0], rtol=0, atol=1e-9)
    assert torch.allclose(last, strength * v[2] + (1 - strength) * first, rtol=0, atol=1e-9)


def test_selective_ssm_is_a_sum_over_earlier_steps():
    module = a_cell(lambda: SelectiveSSM(3, 4, 2, dt_rank=2, taps=3))
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    seen = {}

    def keep(site, value, _step):
        seen.setdefault(site.partition(".")[2], []).append(value if value.dim() > 1 else value.expand(len(x), -1))
        return value

    run_network(network_of(module), x, edit=keep)
    whole = {site: made[0] if len(made) == 1 else torch.stack(made, 1) for site, made in seen.items()}
    a_bar, new, C = whole["a_bar"].unflatten(-1, (4, 2)), whole["new"].unflatten(-1, (4, 2)), whole["C_pre"]
    for t in range(7):
        passed = [a_bar[:, s + 1 : t + 1].prod(1) * new[:, s] for s in range(t + 1)]
        read = (torch.stack(passed).sum(0) * C[:, t, None]).sum(-1) + module.D * whole["u"][:, t]
        want = (read * whole["gate"][:, t]) @ module.out_proj.weight.T
        assert torch.allclose(module(x)[:, t], want, rtol=0, atol=1e-12)


def test_selective_ssm_is_the_mixer_of_mamba():
    """As another library has written it, from the same parameters by the same names."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=6, state_size=3, conv_kernel=4, expand=2, time_step_rank=2)
    mixer = a_cell(lambda: MambaMixer(config, layer_idx=0))
    for parameter in mixer.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    module = a_cell(lambda: SelectiveSSM(6, 12, state_size=3, dt_rank=2))
    module.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    want = mixer(x)
    want = want[0] if isinstance(want, tuple) else want
    # It computes its step sizes in single precision, whatever the dtype.
    assert float((module(x) - want).abs().max() / want.abs().max()) < 1e-6


def test_a_tap_carries_its_own_lag_only():
    module = a_cell(lambda: SelectiveSSM(3, 4, 2, taps=3))
    network = network_of(module)
    clean, other = torch.randn(2, 1, 6, 3, dtype=torch.float64)
    x = run_network(network, clean)["l0.x"]
    different = run_network(network, other)["l0.x"]
    for lag in range(3):
        weight = module.conv1d.weight[:, 0, 2 - lag]

        def edit(site, value, _step, lag=lag):
            return different.roll(lag, 1) if site == f"l0.tap{lag}_pre" else value

        sums = []

        def keep(site, value, step, sums=sums, edit=edit):
            value = edit(site, value, step)
            return (sums.append(value), value)[1] if site == "l0.conv" else value

        run_network(network, clean, edit=keep)
        plain = module.conv1d(x.mT)[..., :6].mT
        assert torch.allclose((sums[0] - plain)[:, 2:], (weight * (different - x).roll(lag, 1))[:, 2:], atol=1e-12)


def test_bilinear_forms_are_special_cases_of_the_full_one():
    diagonal = a_cell(lambda: DiagonalBilinear(3, 4))
    factored = a_cell(lambda: FactoredBilinear(3, 4, 6))
    full = a_cell(lambda: FullBilinear(3, 4))
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    for other, tensor in (
        (diagonal, torch.einsum("ik, ij -> ijk", diagonal.W, torch.eye(4, dtype=torch.float64))),
        (factored, torch.einsum("ir, rk, rj -> ijk", factored.U, factored.V, factored.R)),
    ):
        full.W.copy_(tensor)
        full.start.copy_(other.start)
        assert torch.allclose(full(x), other(x), rtol=0, atol=1e-12)


def test_a_word_is_the_product_of_its_letters_matrices():
    module = a_cell(lambda: FullBilinear(3, 4, normalise=True))
    word = torch.tensor([[2, 0, 1, 1, 0]])
    h = module.start
    for letter in word[0]:
        h = module.W[:, :, letter] @ h
    got = module(nn.functional.one_hot(word, 3).double())[0, -1]
    assert torch.allclose(got, h / h.norm(), rtol=0, atol=1e-12)


def test_a_non_negative_diagonal_never_changes_a_sign_and_a_signed_one_counts_parity():
    x = torch.randn(4, 20, 3, dtype=torch.float64)
    module = a_cell(lambda: DiagonalBilinear(3, 5, signed=False))
    assert (module(x).sign() == module.start.sign()).all()
    parity = a_cell(lambda: DiagonalBilinear(2, 1))
    parity.W.copy_(torch.tensor([[1.0, -1.0]]))
    bits = torch.randint(0, 2, (4, 400))
    states = parity(nn.functional.one_hot(bits, 2).double())[..., 0] / parity.start
    assert torch.equal(states < 0, bits.cumsum(1) % 2 == 1)


def test_low_rank_rates_are_those_of_the_product():
    low = a_cell(lambda: RateRNN(3, 8, 0.2, rank=2))
    full = a_cell(lambda: RateRNN(3, 8, 0.2))
    full.W.copy_(low.m @ low.n.T / 8)
    for name in ("W_in", "b", "start"):
        getattr(full, name).copy_(getattr(low, name))
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    assert torch.allclose(low(x), full(x), rtol=0, atol=1e-12)
    # Every edge from unit to unit leads through a latent variable.
    recurrent = [link for stage in network_of(low).blocks[0].stages for link in stage.links if link.source == "l0.r"]
    assert [link.slots for link in recurrent] == [("kappa",)]


def test_rates_relax_with_the_time_constant():
    module = a_cell(lambda: RateRNN(1, 3, 0.1, output="h"))
    module.W.zero_()
    module.b.zero_()
    h = module(torch.zeros(1, 50, 1, dtype=torch.float64))[0]
    for before, after in pairwise(torch.cat((module.start[None], h))):
        assert torch.allclose(after, 0.9 * before, rtol=0, atol=1e-12)


def test_stability_is_the_largest_eigenvalue_of_the_step():
    for make in (OWN["lru"], OWN["gated_linear"], OWN["linear_attention"]):
        module = a_cell(lambda make=make: make(3))
        step = transition(network_of(module))
        zeros = torch.zeros(1, step.size, dtype=torch.float64)
        jacobian = step.jacobians(zeros, torch.randn(1, 3, dtype=torch.float64))[0][0]
        assert abs(float(torch.linalg.eigvals(jacobian).abs().max()) - stability(module)) < 1e-12
    assert stability(RateRNN(2, 3, 0.1)) is None and stability(nn.GRU(2, 3)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RateRNN(2, 3, 0.0),
        lambda: RateRNN(2, 3, 1.5),
        lambda: RateRNN(2, 3, 0.1, nonlinearity="softplus"),
        lambda: RateRNN(2, 3, 0.1, output="x"),
        lambda: LRU(2, 3, radius=(0.9, 0.5)),
        lambda: LRU(2, 3, radius=(0.5, 1.0)),
        lambda: LRU(2, 3, phase=0.0),
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError, match="expected"):
        wrong()
