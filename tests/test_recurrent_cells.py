"""Every registered cell: its stages are its module, step by step, and what they declare is what they do."""

import pytest
import torch
from torch import nn

import circuitkit as ck
from circuitkit.models.recurrent.cells.base import Described, Place, cell, cell_of, cells
from circuitkit.models.recurrent.cells.bilinear import DiagonalBilinear, FactoredBilinear, FullBilinear
from circuitkit.models.recurrent.cells.delta_net import DeltaNet
from circuitkit.models.recurrent.cells.gated_linear import GatedLinear
from circuitkit.models.recurrent.cells.inputs import constant, input_links
from circuitkit.models.recurrent.cells.linear_attention import LinearAttention
from circuitkit.models.recurrent.cells.lru import LRU
from circuitkit.models.recurrent.cells.rate import RateRNN
from circuitkit.models.recurrent.cells.selective_ssm import SelectiveSSM
from circuitkit.models.recurrent.net import RecurrentNet
from circuitkit.models.recurrent.parts import FEATURES, Block, Link, Network, Slot, Stage, Write
from circuitkit.models.recurrent.stepper import run_network
from circuitkit.models.recurrent.transition import transition

GAP = {torch.float32: 1e-6, torch.float64: 1e-12}

# Every form of circuitkit's own cells, by the size of their input.
OWN = {
    "lru": lambda size: LRU(size, 4, 2),
    "gated_linear": lambda size: GatedLinear(size, 5, 4, 2),
    "linear_attention": lambda size: LinearAttention(size, 4, 2),
    "delta_net": lambda size: DeltaNet(size, 4, 3),
    "selective_ssm": lambda size: SelectiveSSM(size, 4, 2, dt_rank=2),
    "one_tap": lambda size: SelectiveSSM(size, 4, 3, taps=1),
    "signed": lambda size: DiagonalBilinear(size, 4),
    "non_negative": lambda size: DiagonalBilinear(size, 4, signed=False, normalise=True),
    "full": lambda size: FullBilinear(size, 4),
    "full_normalised": lambda size: FullBilinear(size, 4, normalise=True),
    "factored": lambda size: FactoredBilinear(size, 4, 5),
    "factored_normalised": lambda size: FactoredBilinear(size, 4, 5, normalise=True),
    "rate": lambda size: RateRNN(size, 4, 0.3, nonlinearity="relu", output="h"),
    "rate_low_rank": lambda size: RateRNN(size, 4, 0.3, rank=2),
}
EXAMPLES = {kind.__name__: found.example for kind, found in cells().items()} | {
    name: lambda make=make: make(3) for name, make in OWN.items()
}
each_cell = pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES.keys())


def a_cell(make, dtype=torch.float64, seed=0):
    """A module with random parameters (also those that begin as zeros), ready to run."""
    torch.manual_seed(seed)
    module = make().to(dtype).eval().requires_grad_(False)
    shake(module)
    return module


def shake(module):
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def network_of(module, *, below=()):
    """The network of a module, on top of others."""
    modules = (*below, module)
    write = Write("input", modules[0].input_size)
    blocks, sources, layer = (), (write,), 0
    for each in modules:
        described = cell_of(each).describe(each, Place(layer, sources))
        blocks, layer = blocks + described.blocks, layer + described.n_layers
        sources = tuple(w for name in described.features for b in described.blocks for w in b.writes if w.name == name)
    return Network(write, blocks, described.features)


def outputs_of(module, x):
    """What the module itself gives at every step."""
    if cell_of(module).once:
        states, state = [], None
        for x_t in x.unbind(1):
            state = module(x_t, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states, 1)
    made = module(x if getattr(module, "batch_first", True) else x.transpose(0, 1))
    return made[0] if isinstance(made, tuple) else made


def gap_of(network, module, x):
    want = outputs_of(module, x)
    return float((run_network(network, x)[FEATURES] - want).abs().max() / want.abs().max().clamp(min=1))


@each_cell
@pytest.mark.parametrize("dtype", GAP)
def test_the_stepper_is_the_module(make, dtype):
    module = a_cell(make, dtype)
    network = network_of(module)
    for steps in (1, 2, 12, 30):
        assert gap_of(network, module, torch.randn(3, steps, module.input_size, dtype=dtype)) <= GAP[dtype]


@each_cell
def test_weights_are_the_modules_own(make):
    module = a_cell(make)
    network = network_of(module)
    shake(module)
    assert gap_of(network, module, torch.randn(2, 6, module.input_size, dtype=torch.float64)) <= 1e-12


@each_cell
def test_checkpointing_and_differentiating_change_nothing(make):
    network = network_of(a_cell(make))
    x = torch.randn(2, 9, network.input.size, dtype=torch.float64, requires_grad=True)
    plain, segmented = (run_network(network, x, segment=segment)[FEATURES] for segment in (None, 4))
    assert torch.equal(plain, segmented)
    slopes = [torch.autograd.grad(made.sin().sum(), x)[0] for made in (plain, segmented)]
    assert torch.allclose(*slopes, rtol=0, atol=1e-12)


@each_cell
def test_links_fit_what_they_join(make):
    network = network_of(a_cell(make))
    for _, stage in network.stages:
        for link in stage.links:
            rows = sum(stage.slot(name).size for name in link.slots)
            columns = network.write(link.source).size
            assert rows == columns if link.weight is None else link.weight().shape == (rows, columns)
        for slot in stage.slots:
            assert slot.bias is None or slot.bias().shape == (slot.size,)
            assert any(slot.name in link.slots for link in stage.links), f"nothing reaches {slot.name}"


def influence(stage, slot, write):
    """Which readers of a slot change which writers, found by differentiation at random points."""
    found = torch.zeros(slot.n, write.n, dtype=torch.bool)
    for _ in range(12):
        pre = {s.name: torch.randn(s.size, dtype=torch.float64) for s in stage.slots}

        def made(value, pre=pre):
            return stage.step(pre | {slot.name: value}, lambda _name, x: x)[write.name]

        slope = torch.autograd.functional.jacobian(made, pre[slot.name])  # write, slot
        found |= (slope.T.view(slot.n, slot.width, write.n, write.width) != 0).any(3).any(1)
    return found


def declared(slot, write):
    if write.name in slot.feeds_all:
        return torch.ones(slot.n, write.n, dtype=torch.bool)
    return torch.eye(slot.n, write.n, dtype=torch.bool) & (write.name in slot.feeds)


@each_cell
def test_readers_feed_the_writers_that_they_change_and_no_others(make):
    network = network_of(a_cell(make))
    for block in network.blocks:
        for stage in block.stages:
            for slot in stage.slots:
                assert set(slot.feeds + slot.feeds_all) <= {write.name for write in stage.writes}
                for write in stage.writes:
                    assert torch.equal(influence(stage, slot, write), declared(slot, write)), (slot.name, write.name)


@each_cell
def test_sites_are_what_is_seen(make):
    network = network_of(a_cell(make))
    seen = {}

    def keep(site, value, _step):
        seen.setdefault(site, []).append(value.shape[-1])
        return value

    run_network(network, torch.randn(2, 3, network.input.size, dtype=torch.float64), edit=keep)
    for block in network.blocks:
        listed = [f"{block.stem}.{site}" for stage in block.stages for site in stage.sites]
        assert len(listed) == len(set(listed))
        assert set(listed) <= set(seen)
        for name in listed:
            seen.pop(name)
    # torch's cells leave out what a reader that copies its own past reads: the site of h or c one step later.
    left = {site.partition(".")[2] for site in seen if not site.startswith(FEATURES)}
    assert left <= {"carry_pre", "proj_pre", "pre"}, left


@pytest.mark.parametrize("make", OWN.values(), ids=OWN.keys())
def test_own_cells_list_every_site_once(make):
    network = network_of(a_cell(lambda: make(3)))
    seen = set()
    run_network(network, torch.randn(2, 3, 3, dtype=torch.float64), edit=lambda site, x, _: (seen.add(site), x)[1])
    listed = [f"{block.stem}.{site}" for block in network.blocks for stage in block.stages for site in stage.sites]
    assert {site for site in seen if not site.startswith(FEATURES)} == set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("make", OWN.values(), ids=OWN.keys())
def test_own_cells_read_several_sources_and_each_other(make):
    below = a_cell(lambda: nn.GRU(3, 2, bidirectional=True, batch_first=True))
    first, second = a_cell(lambda: make(4)), None
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    want = outputs_of(first, outputs_of(below, x))
    second = a_cell(lambda: make(want.shape[-1]))
    network = network_of(second, below=(below, first))
    want = outputs_of(second, want)
    assert float((run_network(network, x)[FEATURES] - want).abs().max()) <= 1e-12 * max(1, float(want.abs().max()))


@pytest.mark.parametrize("make", OWN.values(), ids=OWN.keys())
def test_own_cells_are_functions_of_their_state(make):
    module = a_cell(lambda: make(3))
    step = transition(network_of(module))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    state = step.start(x).expand(2, -1)
    for x_t in x.unbind(1):
        features, state = step.features(state, x_t), step(state, x_t)
    assert torch.allclose(features, outputs_of(module, x)[:, -1], rtol=0, atol=1e-12)
    assert step.jacobians(state, x_t)[0].isfinite().all()


@pytest.mark.parametrize("dtype", GAP)
@pytest.mark.parametrize("make", OWN.values(), ids=OWN.keys())
def test_own_cells_load(make, dtype):
    """With all laws that are tested at load, on units and with time cut."""
    module = a_cell(lambda: RecurrentNet(make(3), 2), dtype)
    model = ck.load(module)
    assert f"{model.network.features[0]}0" in model.graph.sources
    assert model.viewed("expanded", steps=4).graph.mask.any()
    x = torch.randn(2, 5, 3, dtype=dtype)
    trace = model.trace(x)
    assert all(value.shape[:2] == (2, 5) for value in trace.values())
    want = module(x)
    gap = (model.read_out(trace[model.network.features[0]]) - want).abs().max() / want.abs().max().clamp(min=1)
    assert float(gap) <= GAP[dtype]


def test_a_users_cell_is_one_function():
    """As in docs/cells.md, with the laws above."""

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_size = 3
            self.W, self.keep = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.rand(4))

        def forward(self, x):
            h, out = x.new_zeros(len(x), 4), []
            for x_t in x.unbind(1):
                h = self.keep * h + torch.tanh(x_t @ self.W.T) * h.cos()
                out.append(h)
            return torch.stack(out, 1)

    @cell(Leaky, example=Leaky)
    def leaky(module, place):
        h = Write(f"{place.stem()}.h", 4)

        def step(pre, see):
            new = see("new", torch.tanh(pre["in"]) * pre["carry"].cos())
            return {h.name: see("h", constant(module.keep, pre["carry"]) * pre["carry"] + new)}

        slots = (Slot("in", 4, feeds=(h.name,)), Slot("carry", 4, feeds=(h.name,)))
        links = (*input_links(place, ("in",), lambda: module.W), Link(h.name, ("carry",), lag=1))
        stage = Stage(slots, (h,), links, step, ("in_pre", "carry_pre", "new", "h"))
        return Described((Block(place.layer, (stage,), stem=place.stem()),), (h.name,))

    try:
        assert cell_of(Leaky()) is cells()[Leaky]
        for dtype in GAP:
            test_the_stepper_is_the_module(Leaky, dtype)
        test_readers_feed_the_writers_that_they_change_and_no_others(Leaky)
        test_links_fit_what_they_join(Leaky)
        test_weights_are_the_modules_own(Leaky)
        test_sites_are_what_is_seen(Leaky)
    finally:
        del cells()[Leaky]
    assert cell_of(Leaky()) is None


def test_a_subclass_is_not_taken_for_its_parent():
    class Other(LRU):
        pass

    assert cell_of(Other(2, 3)) is None
