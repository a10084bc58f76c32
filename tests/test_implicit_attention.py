"""Maps that are read off loaded networks: what they weigh must add up to what the layer gave, to 1e-12 in float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import circuitkit as ck
from circuitkit.analysis.frozen_gates import frozen_gates
from circuitkit.analysis.implicit_attention import implicit_attention
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.functional.heads import lag_curve, self_score
from circuitkit.models.recurrent.cells.base import Cell, Described, cells
from circuitkit.models.recurrent.cells.delta_net import DeltaNet
from circuitkit.models.recurrent.cells.gated_linear import GatedLinear
from circuitkit.models.recurrent.cells.linear_attention import LinearAttention
from circuitkit.models.recurrent.cells.lru import LRU
from circuitkit.models.recurrent.cells.selective_ssm import SelectiveSSM
from circuitkit.models.recurrent.parts import Block, Link, Slot, Stage, Write
from tests.oracles.implicit_maps import literal_delta_map, literal_prefix_products, literal_selective_map

LINEAR = {
    "lru": lambda: LRU(3, 4, 2),
    "gated-linear": lambda: GatedLinear(3, 5, 4, 2),
    "linear-attention": lambda: LinearAttention(3, 4, 2),
    "delta-net": lambda: DeltaNet(3, 4, 2),
    "selective-ssm": lambda: SelectiveSSM(3, inner_size=6, state_size=4),
}
GATED = {
    "lstm": lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True),
    "lstm-projected": lambda: nn.LSTM(3, 5, proj_size=2, batch_first=True),
    "gru": lambda: nn.GRU(3, 5, num_layers=2, bidirectional=True, batch_first=True),
}


# A cell that the user's own loop calls step by step is read through the same sites as its layer.
SEQUENCES = [kind for kind, found in cells().items() if not found.once]


def loaded(build, seed=0):
    torch.manual_seed(seed)
    return ck.load(build().double())


def numbers(steps=30, batch=2, size=3, seed=1):
    return torch.randn(batch, steps, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_linear_recurrences_are_attention(name, steps):
    maps = implicit_attention(loaded(LINEAR[name]), numbers(steps))
    assert list(maps) == ["l0"] and maps["l0"].error < 1e-12 and not maps["l0"].local
    assert maps["l0"].pattern.triu(1).abs().max() == 0


def test_the_state_of_an_lru_is_a_power_of_its_eigenvalue():
    model = loaded(LINEAR["lru"])
    pattern = implicit_attention(model, numbers(8))["l0"].pattern[0, 2]
    lam = model.module.lam()[2].detach()
    torch.testing.assert_close(pattern[7], lam ** torch.arange(7, -1, -1), rtol=1e-12, atol=1e-14)


def test_a_gated_linear_recurrence_keeps_lam_to_the_power_of_the_lag_zeros_and_signs_too():
    model = loaded(LINEAR["gated-linear"])
    with torch.no_grad():
        model.module.lam.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5, -0.25]))
    maps = implicit_attention(model, numbers(6))["l0"]
    for unit, lam in enumerate([0.0, 1.0, -1.0, 0.5, -0.25]):
        want = literal_prefix_products(torch.full((6,), lam, dtype=torch.float64))
        torch.testing.assert_close(maps.pattern[1, unit], want, rtol=1e-14, atol=0)
    torch.testing.assert_close(self_score(maps.pattern)[:2], torch.tensor([1.0, 2.45 / 6]).double())


def test_linear_attention_is_the_product_of_queries_and_keys():
    model, x = loaded(LINEAR["linear-attention"]), numbers(7)
    m = model.module
    want = ((x @ m.W_q.T) @ (x @ m.W_k.T).mT).tril()
    torch.testing.assert_close(implicit_attention(model, x)["l0"].pattern[:, 0], want.detach())


def test_the_delta_rule_against_a_loop():
    model, x = loaded(LINEAR["delta-net"]), numbers(7)
    run = model.trace(x)
    want = literal_delta_map(run["l0.q"][1], run["l0.k"][1], run["l0.beta"][1, :, 0])
    torch.testing.assert_close(implicit_attention(model, x)["l0"].pattern[1, 0], want)


def test_a_selective_state_space_against_a_loop():
    model, x = loaded(LINEAR["selective-ssm"]), numbers(9)
    run, m = model.trace(x), model.module
    delta = run["l0.delta"][0]
    a = torch.exp(-delta[..., None] * torch.exp(m.A_log.detach()))
    b = delta[..., None] * run["l0.B_pre"][0, :, None]
    want = literal_selective_map(a, b, run["l0.C_pre"][0, :, None].expand_as(a))
    torch.testing.assert_close(implicit_attention(model, x)["l0"].pattern[0], want)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("steps", [1, 25])
def test_frozen_gates_give_the_state_exactly(name, steps):
    model = loaded(GATED[name])
    maps = frozen_gates(model, numbers(steps))
    assert set(maps) == {block.stem for block in model.network.blocks if block.recurrent}
    for layer in maps.values():
        assert layer.error < 1e-12 and layer.local and layer.pattern.shape[1:] == (5, steps, steps)


def test_frozen_gates_against_the_formula_forward_and_backward():
    model, x = loaded(GATED["lstm"]), numbers(6)
    run, maps = model.trace(x), frozen_gates(model, x)
    for name in ("l0", "l1r"):
        f, i = run[f"{name}.f"][1, :, 3], run[f"{name}.i"][1, :, 3]
        if name == "l1r":
            f, i = f.flip(0), i.flip(0)
        want = literal_prefix_products(f) * i
        want = want.flip(0, 1) if name == "l1r" else want
        torch.testing.assert_close(maps[name].pattern[1, 3], want, rtol=1e-12, atol=0)
    assert maps["l1r"].heads[3] == "l1r.c3"


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_what_is_left_of_the_start_belongs_to_the_chosen_units(kind):
    class Started(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = (torch.nn.GRU if kind == "gru" else torch.nn.LSTM)(3, 5, batch_first=True)
            self.start = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(1, 1, 5)) for _ in range(2))

        def forward(self, x):
            start = tuple(s.expand(-1, len(x), -1).contiguous() for s in self.start)
            return self.layer(x, start if kind == "lstm" else start[0])[0]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Started().double()
    model, x = ck.load(module), numbers(6)
    maps, run = frozen_gates(model, x, units=[3, 1])["l0"], model.trace(x)
    keep = run["l0.z" if kind == "gru" else "l0.f"][..., [3, 1]].cumprod(1)
    first = module.start[0 if kind == "gru" else 1][0, 0, [3, 1]]
    assert maps.error < 1e-12
    torch.testing.assert_close(maps.start[..., 0], keep * first, rtol=0, atol=1e-12)


def test_a_trained_encoder_and_decoder_share_one_map():
    """Over letters and phonemes; the phase is 0 or 1 in every input that the model is given."""
    model = ck.load("g2p/gru")
    ids = torch.tensor([[5, 3, 22, model.card["first_phoneme"] + 1, model.card["first_phoneme"] + 4]])
    maps = frozen_gates(model, ids)["l0"]
    run = model.trace(ids)
    assert maps.error < 1e-5 and maps.pattern.shape[-1] == 5
    want = run["l0.dec_z"][0, 4] * run["l0.dec_z"][0, 3] * (1 - run["l0.enc_z"][0, 2])
    torch.testing.assert_close(maps.pattern[0, :, 4, 2], want)


def test_gates_are_those_of_the_run_so_the_maps_are_local():
    model, x = loaded(GATED["gru"]), numbers(5)
    other = x.clone()
    other[:, 0] += 1.0
    here, there = frozen_gates(model, x)["l0"], frozen_gates(model, other)["l0"]
    gap = here.pattern - there.pattern
    assert gap[..., 4, 4].abs().min() > 0  # a later step's gate changes with an earlier input


def test_some_units_are_rows_of_all():
    for read, build in (
        (frozen_gates, GATED["gru"]),
        *((implicit_attention, LINEAR[n]) for n in ("lru", "selective-ssm")),
    ):
        model, x = loaded(build), numbers(6)
        whole, some = read(model, x)["l0"], read(model, x, units=[3, 1])["l0"]
        assert some.heads == (whole.heads[3], whole.heads[1])
        torch.testing.assert_close(some.pattern, whole.pattern[:, [3, 1]])
        with pytest.raises(OptionError, match="heads 0 to"):
            read(model, x, units=[99])


def test_what_is_not_such_a_network_is_refused():
    with pytest.raises(UnsupportedModel, match="frozen_gates"):
        implicit_attention(loaded(GATED["gru"]), numbers(4))
    with pytest.raises(UnsupportedModel, match="implicit_attention"):
        frozen_gates(loaded(LINEAR["lru"]), numbers(4))
    with pytest.raises(UnsupportedModel):
        frozen_gates(loaded(lambda: nn.RNN(3, 4, batch_first=True)), numbers(4))


@pytest.mark.parametrize("kind", SEQUENCES, ids=lambda kind: kind.__name__)
def test_every_cell_is_read_exactly_or_refused(kind):
    """One of the two reads it, both exactly, or both say that they cannot: never a wrong map."""
    torch.manual_seed(0)
    module = cells()[kind].example().double().eval()
    model = ck.load(module)
    x = numbers(12, size=model.numbers)
    for read in (implicit_attention, frozen_gates):
        try:
            maps = read(model, x)
        except UnsupportedModel as error:
            assert "no LSTM" in str(error) or "linear in its state" in str(error) or "off by" in str(error)
        else:
            assert all(layer.error < 1e-12 for layer in maps.values())


class Leaky(nn.Module):
    """A layer of a user's own: a leak that the input sets."""

    input_size = 2

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))

    def forward(self, x):
        h, out = torch.zeros_like(x[:, 0]), []
        for x_t in x.unbind(1):
            leak = torch.tanh(x_t @ self.w.T)
            h = leak * h + x_t
            out.append(h)
        return torch.stack(out, 1)


def describe_leaky(module, place):
    h = Write(f"{place.stem()}.h", 2)

    def step(pre, see):
        kept = see("kept", torch.tanh(pre["leak"]) * pre["carry"])
        return {h.name: see("h", kept + pre["in"])}

    slots = tuple(Slot(name, 2, feeds=(h.name,)) for name in ("leak", "in", "carry"))
    (x,) = place.sources
    links = (Link(x.name, ("leak",), lambda: module.w), Link(x.name, ("in",)), Link(h.name, ("carry",), lag=1))
    stage = Stage(slots, (h,), links, step, ("leak_pre", "in_pre", "carry_pre", "kept", "h"))
    return Described((Block(place.layer, (stage,), stem=place.stem()),), (h.name,))


def test_a_layer_of_a_user_s_own_is_read_by_its_sites(monkeypatch):
    monkeypatch.setitem(cells(), Leaky, Cell(Leaky, describe_leaky, Leaky))
    torch.manual_seed(0)
    module, x = Leaky(), numbers(9, size=2)
    maps = implicit_attention(ck.load(module), x)["l0"]
    leak = torch.tanh(x[1] @ module.w.detach().T)[:, 0]
    torch.testing.assert_close(maps.pattern[1, 0], literal_prefix_products(leak))


def test_maps_that_do_not_add_up_are_refused():
    maps = frozen_gates(loaded(GATED["lstm"]), numbers(6))["l0"]
    for wrong in (maps.output + 1e-6, maps.output * float("nan")):
        with pytest.raises(UnsupportedModel, match="off by"):
            replace(maps, output=wrong).checked()


def test_contributions_add_up_to_the_state():
    maps = frozen_gates(loaded(GATED["lstm"]), numbers(6))["l0"]
    parts = maps.contributions(1, 4)
    assert parts.shape == (6, 5) and parts[5].abs().max() == 0
    torch.testing.assert_close(parts.sum(0) + maps.start[1, 4, :, 0], maps.output[1, 4, :, 0])


def test_float32_stays_float32():
    torch.manual_seed(0)
    maps = implicit_attention(ck.load(LINEAR["selective-ssm"]()), numbers(50).float())["l0"]
    assert maps.pattern.dtype == torch.float32 and maps.error < 1e-4


def test_figures_have_a_picture_per_head_and_name_their_axes():
    maps = frozen_gates(loaded(GATED["lstm"]), numbers(6))["l0"]
    figure = maps.plot(example=1, heads=[0, 4])
    assert [trace.z.shape for trace in figure.data] == [(6, 6), (6, 6)]
    assert (figure.data[1].z == maps.pattern[1, 4].numpy()).all()
    assert figure.layout.xaxis.title.text == "source step s" and figure.layout.yaxis.title.text == "step t"
    curves = maps.plot_lags(heads=[2])
    assert list(curves.data[0].y) == pytest.approx(lag_curve(maps.pattern)[2].tolist())
    for wrong in ({"example": 2}, {"heads": [5]}, {"heads": []}, {"heads": list(range(7))}):
        with pytest.raises(OptionError):
            maps.plot(**wrong)
    implicit_attention(loaded(LINEAR["lru"]), numbers(4))["l0"].plot()
