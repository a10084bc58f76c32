"""Graphs of recurrent networks against autograd through literal frozen steps, and on trained networks."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.recipe import Recipe
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.train import train_on
from circuitkit.errors import GraphError, OptionError, TaskError, UnsupportedModel
from circuitkit.features.recurrent import in_order, recurrent_attribution_graph, total_rows
from circuitkit.features.recurrent_cells import FORMS
from circuitkit.features.recurrent_effects import input_effects, measured_effects
from circuitkit.features.recurrent_local import frozen_recurrence
from circuitkit.features.recurrent_nodes import placed
from circuitkit.features.recurrent_sweep import sweep
from circuitkit.features.recurrent_targets import Output
from circuitkit.features.targets import Direction, Latent
from circuitkit.figures.effects_over_time import effects_over_time
from circuitkit.models.recurrent.cells.base import cells
from circuitkit.models.recurrent.net import RecurrentNet
from circuitkit.models.recurrent.parts import Network
from circuitkit.models.recurrent.stepper import run_network
from tests.oracles.frozen_recurrence import Literal

LAYERS = {
    "GRU": lambda: nn.GRU(3, 5, batch_first=True),
    "GRU, 2 layers": lambda: nn.GRU(3, 5, num_layers=2, batch_first=True),
    "LSTM": lambda: nn.LSTM(3, 5, batch_first=True),
    "LSTM, 2 layers": lambda: nn.LSTM(3, 5, num_layers=2, batch_first=True),
    "tanh": lambda: nn.RNN(3, 5, batch_first=True),
    "relu, 2 layers": lambda: nn.RNN(3, 5, num_layers=2, nonlinearity="relu", batch_first=True),
}
STEPS = 6


def loaded(name, seed=0, n_out=2):
    """A model in float64, its recurrent module and an input."""
    torch.manual_seed(seed)
    net = RecurrentNet(LAYERS[name](), n_out).double().eval()
    return ck.load(net), net, torch.randn(STEPS, 3, dtype=torch.float64)


def close(got, want, tolerance=1e-9):
    scale = max(1e-3, float(want.abs().max()))
    return float((got - want).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("name", LAYERS)
def test_effects_through_all_paths_equal_autograd(name):
    model, net, x = loaded(name)
    found = input_effects(model, x, [Output(1), Output(0, 2)])
    literal = Literal(net.cell, x)
    leaf = x.clone().requires_grad_()
    states = literal.run(leaf)
    for row, (index, step) in enumerate([(1, STEPS - 1), (0, 2)]):
        target = net.readout(states[-1][step]["h"])[index]
        assert abs(float(target.detach() - found.totals[row])) < 1e-9
        flat = [states[layer][t][k] for layer in range(len(states)) for t in range(STEPS) for k in states[layer][t]]
        slopes = torch.autograd.grad(target, [leaf, *flat], retain_graph=True, allow_unused=True)
        assert close(found.inputs[row], slopes[0] * x)
        wanted = iter(zip(flat, slopes[1:], strict=True))
        for layer in range(len(states)):
            for t in range(STEPS):
                for k in states[layer][t]:
                    state, slope = next(wanted)
                    slope = torch.zeros_like(state) if slope is None else slope
                    assert close(found.states[f"l{layer}.{k}"][row, t], (state * slope).detach())


@pytest.mark.parametrize("name", LAYERS)
def test_direct_effects_equal_autograd(name):
    """Every unit's row from one literal step with what it reads as leaves."""
    model, net, x = loaded(name)
    graph = recurrent_attribution_graph(model, [], x)
    literal, numbers = Literal(net.cell, x), {int(n): i for i, n in enumerate(graph.targets)}
    checked = 0
    for layer, t in [(layer, t) for layer in range(net.cell.num_layers) for t in range(STEPS)]:
        keys = list(literal.states[layer][t])
        below = x[t] if layer == 0 else literal.states[layer - 1][t]["h"].detach()
        zeros = dict.fromkeys(keys, torch.zeros(5, dtype=torch.float64))
        past = {k: v.detach() for k, v in (literal.states[layer][t - 1] if t else zeros).items()}
        leaves = [below.clone().requires_grad_(), *(past[k].clone().requires_grad_() for k in keys)]
        names = ["x" if layer == 0 else f"l{layer - 1}.h", *(f"l{layer}.{k}" for k in keys)]
        steps = [t, *(t - 1 for _ in keys)]
        made = literal.frozen(layer, literal.gates[layer][t], leaves[0], dict(zip(keys, leaves[1:], strict=True)))
        for key in keys:
            target, extra = made[key], None
            if key == "h" and "c" in keys:  # h is reached through the cell of its own step
                extra = made["c"].detach().clone().requires_grad_()
                target = literal.gates[layer][t]["o"] * literal.gates[layer][t]["h"] * extra
            for unit in range(5):
                if float(made[key][unit].detach()) == 0:
                    assert f"l{layer}.{key}{unit}@{t}" not in graph._numbers
                    continue
                row = graph.effects[numbers[graph.node(f"l{layer}.{key}{unit}@{t}")]]
                inputs = leaves if extra is None else [extra]
                where = list(zip(names, steps, strict=True)) if extra is None else [(f"l{layer}.c", t)]
                slopes = torch.autograd.grad(target[unit], inputs, retain_graph=True)
                want = torch.zeros_like(row)
                for (stem, step), leaf, slope in zip(where, inputs, slopes, strict=True):
                    for i, value in enumerate((leaf * slope).tolist()):
                        if (node := graph._numbers.get(f"{stem}{i}@{step}")) is not None:
                            want[node] = value
                assert close(torch.where(graph.kind("bias"), 0, row), want)
                checked += 1
    assert checked > STEPS * 4


def frozen_network(local):
    """The network with every step replaced by its frozen linear map."""

    def block_of(block):
        order = list(range(local.steps))[:: -1 if block.reverse else 1] if block.recurrent else [slice(None)]

        def stage_of(stage):
            frozen, calls = local.frozen[stage], iter(order)

            def step(slots, see):
                at, made = next(calls), {}
                for write in stage.writes:
                    like = next(iter(slots.values()))
                    total = frozen.constants[write.name][at] if write.name in frozen.constants else 0
                    for term in (term for term in frozen.terms if term.write == write.name):
                        x = slots[term.source] if term.source in slots else made[term.source]
                        maps = term.maps if len(term.maps) == 1 else term.maps[at]
                        maps = maps if maps.dim() == 4 and isinstance(at, slice) else maps.reshape(maps.shape[-3:])
                        y = (maps @ x.unflatten(-1, (-1, maps.shape[-1]))[..., None])[..., 0].flatten(-2)
                        total = total + (y.sum(-2, keepdim=True).expand_as(y) if term.across else y)
                    made[write.name] = total if total.dim() == like.dim() else total.expand(len(like), -1)
                return made

            return replace(stage, step=step)

        return replace(block, stages=tuple(stage_of(stage) for stage in block.stages))

    return Network(local.network.input, tuple(block_of(b) for b in local.network.blocks), local.network.features)


SEQUENCES = {kind.__name__: cell for kind, cell in cells().items() if not cell.once}


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_registered_cell(name):
    """Inputs' effects equal autograd through the network with its steps replaced; all rows of the graph add up."""
    torch.manual_seed(1)
    module = SEQUENCES[name].example().double().eval()
    model = ck.load(RecurrentNet(module, 2).double().eval())
    x = torch.randn(STEPS, model.numbers, dtype=torch.float64)
    if name == "EncoderDecoderGRU":
        x[:, -1] = torch.arange(STEPS) > 2
    found, local = input_effects(model, x), frozen_recurrence(model, x)
    leaf = x[None].clone().requires_grad_()
    made = run_network(frozen_network(local), leaf)
    features = torch.cat([made[n] for n in local.network.features], -1)
    out = model.ends.leave(features)[0, -1]
    assert close(out.detach(), found.totals)
    for row in range(2):
        # Where the input chooses a matrix and adds nothing, all of the effect is the start vector's.
        (slope,) = torch.autograd.grad(out[row] + 0 * leaf.sum(), leaf, retain_graph=True)
        assert close(found.inputs[row], (slope * leaf)[0].detach())
    graph = recurrent_attribution_graph(model, [], x)
    assert close(graph.effects.sum(1), graph.totals) and float(graph.remainder.abs().max()) < 1e-8
    stages = graph.stages
    rows, columns = graph.effects.nonzero(as_tuple=True)
    assert bool((stages[columns] < stages[graph.targets[rows]]).all())


@pytest.mark.parametrize("name", ["GRU, 2 layers", "LSTM", "tanh"])
def test_ablation_with_gates_held_changes_a_target_by_its_effect(name):
    model, net, x = loaded(name, seed=3)
    found, literal = input_effects(model, x, [Output(0)]), Literal(net.cell, x)
    whole = net.readout(literal.run(x)[-1][-1]["h"])[0]
    for layer in range(net.cell.num_layers):
        for key in literal.states[layer][0]:
            for t in range(STEPS):
                for unit in range(5):
                    left = net.readout(literal.run(x, ablate=(layer, t, key, unit))[-1][-1]["h"])[0]
                    got = found.states[f"l{layer}.{key}"][0, t, unit]
                    assert abs(float((whole - left).detach() - got)) < 1e-9


def test_measured_effects_are_those_of_the_module():
    """Set by hand in a loop of GRU cells."""
    model, net, x = loaded("GRU", seed=2)
    got = measured_effects(model, x, "l0.h", [Output(1)])[0]
    cell = nn.GRUCell(3, 5).double()
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, kind).data.copy_(getattr(net.cell, f"{kind}_l0"))

    def run(step=None, unit=None):
        h = torch.zeros(1, 5, dtype=torch.float64)
        for t in range(STEPS):
            h = cell(x[t : t + 1], h)
            if t == step:
                h = h.clone()
                h[0, unit] = 0
        return net.readout(h)[0, 1].detach()

    want = [[float(run() - run(t, u)) for u in range(5)] for t in range(STEPS)]
    assert close(got, torch.tensor(want, dtype=torch.float64))


ZOO = ["toys/flip-flop_gru_s0", "toys/flip-flop_lstm_s1", "toys/parity_tanh_s0", "2afc/rnn", "second-largest/length_3",
       "toys/parity_signed_s0", "phase-memory/rank1_n512", "word-breaks/thai_h15", "charlm/lstm",
       "g2p/gru"]  # fmt: skip


def zoo_input(model, steps=8):
    torch.manual_seed(0)
    return torch.randint(model.d_vocab, (steps,)) if model.numbers is None else torch.randn(steps, model.numbers)


@pytest.mark.parametrize("name", ZOO)
def test_rows_add_up_on_the_zoo(name):
    model = ck.load(name)
    x = zoo_input(model)
    most = None if model.width < 100 else 60
    graph = recurrent_attribution_graph(model, [], x, max_features=most)
    found = input_effects(model, x)
    assert float((found.inputs.sum((1, 2)) + found.constants - found.totals).abs().max()) < 1e-3
    if most is None:
        scale = torch.maximum(graph.totals.abs(), graph.effects.abs().amax(1)).clamp(min=1e-30)
        assert float((graph.remainder.abs() / scale).max()) <= 1e-4
    small = graph.prune(0.8, 0.9)
    assert 0 < len(small) < len(graph) and small.n_edges > 0


def pulses(*found):
    """An input of twelve steps from (step, channel, value)."""
    x = torch.zeros(12, 3)
    for step, channel, value in found:
        x[step, channel] = value
    return x


def test_a_stored_bit_goes_back_to_its_last_pulse():
    """Two pulses of opposite sign on one channel: the later one has the larger effect and the output's sign."""
    model = ck.load("toys/flip-flop_gru_s0")
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        early, late = sorted(torch.randperm(11, generator=generator)[:2].tolist())
        value = 1.0 if float(torch.rand(1, generator=generator)) < 0.5 else -1.0
        found = input_effects(model, pulses((early, 0, -value), (late, 0, value)), [0])
        effects = found.inputs[0]
        assert float(found.totals[0]) * value > 0.9
        assert int(effects.abs().argmax()) // 3 == late and float(effects[late, 0]) * value > 0.9
        quiet = torch.ones(12, dtype=torch.bool)
        quiet[[early, late]] = False
        assert bool((effects[quiet] == 0).all()) and bool((effects[:, 1:] == 0).all())
        assert float(effects[early, 0]) * value < 0  # what was overwritten is still there, with its sign


def test_a_bit_is_traced_to_its_own_channel():
    """One pulse on each channel, at different steps: most of the effect is that of the channel's own pulse."""
    model = ck.load("toys/flip-flop_tanh_s0")
    generator, shares = torch.Generator().manual_seed(1), []
    for _ in range(20):
        steps = torch.randperm(11, generator=generator)[:3].tolist()
        signs = (2.0 * torch.randint(2, (3,), generator=generator) - 1).tolist()
        found = input_effects(model, pulses(*((steps[c], c, signs[c]) for c in range(3))))
        for c in range(3):
            effects = found.inputs[c].sum(1).abs()
            shares.append(float(effects[steps[c]] / effects.sum()))
    assert min(shares) > 0.5 and sum(shares) / len(shares) > 0.85


def test_later_steps_do_nothing():
    model, _, x = loaded("LSTM, 2 layers")
    found = input_effects(model, x, [Output(0, 2), Output(0)])
    assert bool((found.inputs[0, 3:] == 0).all()) and bool((found.inputs[1, 3:] != 0).all())
    graph = recurrent_attribution_graph(model, [], x, targets=[Output(0, 2)])
    assert max(node.position or 0 for node in graph.nodes) == 2
    shorter = recurrent_attribution_graph(model, [], x[:3], targets=[0])
    assert torch.allclose(graph.effects, shorter.effects, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 20_000, None])
def test_rows_together_are_rows_one_by_one(budget):
    model, _, x = loaded("LSTM, 2 layers")
    whole = recurrent_attribution_graph(model, [], x)
    apart = recurrent_attribution_graph(model, [], x, budget=budget)
    assert torch.allclose(whole.effects, apart.effects, atol=1e-12) and torch.equal(whole.targets, apart.targets)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(list(LAYERS)), steps=st.integers(1, 7), seed=st.integers(0, 99))
def test_total_effects_are_direct_ones_along_all_paths(name, steps, seed):
    """(I - A)^-1 of the graph gives what the sweep without nodes gives."""
    model, _, _ = loaded(name, seed)
    torch.manual_seed(seed)
    x = torch.randn(steps, 3, dtype=torch.float64)
    graph = recurrent_attribution_graph(model, [], x, targets=[0])
    n = len(graph)
    values = torch.tensor([node.value for node in graph.nodes], dtype=torch.float64)
    share = torch.zeros(n, n, dtype=torch.float64)
    share[graph.targets] = graph.effects / values[graph.targets][:, None]
    paths = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - share)
    row = paths[graph.node(f"logits.0@{steps - 1}")] * float(graph.totals[graph.targets == n - 1])
    found = input_effects(model, x, [0])
    for i, node in enumerate(graph.nodes):
        if node.kind in ("token", "unit"):
            where = found.inputs if node.kind == "token" else found.states[node.site.removeprefix("state.")]
            assert abs(float(row[i] - where[0, node.position, node.index])) < 1e-8


@pytest.mark.parametrize("name", ["GRU", "LSTM, 2 layers"])
def test_a_window_keeps_rows_whole(name):
    model, _, x = loaded(name)
    whole, part = (recurrent_attribution_graph(model, [], x, window=w) for w in (None, 3))
    assert float(part.remainder.abs().max()) < 1e-9
    assert min(n.position for n in part.nodes if n.kind in ("unit", "token")) == STEPS - 3
    before = [i for i, node in enumerate(part.nodes) if node.kind == "error"]
    assert all(part.nodes[i].position == STEPS - 4 for i in before) and float(part.effects[:, before].abs().max()) > 0
    for i, number in enumerate(part.targets.tolist()):
        target = part.nodes[number].name
        for j in part.effects[i].nonzero().flatten().tolist():
            if part.nodes[j].kind in ("unit", "token"):
                assert math.isclose(float(part.effects[i, j]), whole.effect(part.nodes[j].name, target), abs_tol=1e-12)


def random_sae(d, seed=0, site=None, **options):
    generator = torch.Generator().manual_seed(seed)
    coder = SparseCoder(d, 12, d, **options).double().requires_grad_(False)
    for p in coder.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    site = site or Site("state", 0, "l0.h")
    return Dictionary(coder, site, (site,))


OPTIONS = [{"activation": "relu"}, {"activation": "topk", "k": 3, "subtract_b_dec": True}, {"activation": "gated"}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["activation"])
@pytest.mark.parametrize("name", ["GRU", "LSTM", "tanh"])
def test_latents_over_time_equal_autograd(name, options):
    """The row of a latent: the state behind its encoder, with every earlier state made of leaves."""
    model, net, x = loaded(name)
    sae = random_sae(5, **options)
    graph = recurrent_attribution_graph(model, [sae], x, targets=[0])
    assert {node.kind for node in graph.nodes} >= {"token", "latent", "error", "bias", "direction"}
    assert not any(node.kind == "unit" for node in graph.nodes)
    assert float(graph.remainder.abs().max()) < 1e-9
    literal = Literal(net.cell, x)
    states = torch.stack([s["h"].detach() for s in literal.states[0]])
    scales = torch.ones(STEPS, 12, dtype=torch.float64, requires_grad=True)
    leaf, latents = x.clone().requires_grad_(), sae.coder.encode(states)
    error = (states - sae.coder.decode(latents)[:, 0]).requires_grad_()
    before, inner = {k: torch.zeros(5, dtype=torch.float64) for k in literal.states[0][0]}, []
    for t in range(STEPS):
        before = literal.frozen(0, literal.gates[0][t], leaf[t], before)
        inner.append(before["h"])
        before = before | {"h": sae.coder.decode(latents[t] * scales[t])[0] + error[t]}
    outer = before["h"]
    for row, number in zip(graph.effects, graph.targets.tolist(), strict=True):
        node = graph.nodes[number]
        if node.kind == "latent":
            gate = sae.coder.r_mag.exp()[node.index] if sae.coder.r_mag is not None else 1.0
            target = inner[node.position] @ sae.coder.W_enc[:, node.index] * gate
        else:
            target = net.readout(outer)[0]
        slopes = torch.autograd.grad(target, [leaf, scales, error], retain_graph=True, allow_unused=True)
        x_, s_, e_ = (
            torch.zeros_like(v) if g is None else g for v, g in zip((leaf, scales, error), slopes, strict=True)
        )
        wanted = {"token": (x_ * x).detach(), "latent": s_, "error": (e_ * error).sum(1).detach()}
        for i, source in enumerate(graph.nodes):
            if source.kind in wanted:
                place = (source.position,) if source.index is None else (source.position, source.index)
                assert abs(float(row[i] - wanted[source.kind][place])) < 1e-9


def test_a_trained_dictionary_of_a_state():
    """A small SAE on the flip-flop's state: a graph of its latents over time."""
    model = ck.load("toys/flip-flop_gru_s0")
    torch.manual_seed(0)
    inputs = (torch.rand(64, 12, 3) < 0.15) * (2.0 * torch.randint(2, (64, 12, 3)) - 1)
    site = Site("state", 0, "l0.h")
    recipe = Recipe(32, "topk", k=6, steps=300)
    sae = train_on(model, recipe, inputs, site, batch_size=256, progress=False).dictionary
    graph = recurrent_attribution_graph(model, [sae], pulses((2, 0, 1), (6, 1, -1)), targets=[0])
    scale = torch.maximum(graph.totals.abs(), graph.effects.abs().amax(1)).clamp(min=1e-30)
    assert float((graph.remainder.abs() / scale).max()) <= 1e-4
    latents = [node for node in graph.nodes if node.kind == "latent"]
    assert len({node.position for node in latents}) == 12 and len(latents) <= 6 * 12
    small = graph.prune(0.7, 0.9)
    assert 0 < graph.replacement_score <= 1 and any(n.kind == "latent" for n in small.nodes)
    # The bit is carried: latents at the last step are made of latents one step before.
    row = graph.effects[graph.targets == graph.node("logits.0@11")][0]
    last = {graph.nodes[i].position for i in row.nonzero().flatten().tolist() if graph.nodes[i].kind == "latent"}
    assert last == {11}


def test_targets_inside_the_network():
    model, _, x = loaded("GRU")
    state = frozen_recurrence(model, x).values["l0.h"]
    site, vector = Site("state", 0, "l0.h"), torch.randn(5, dtype=torch.float64)
    graph = recurrent_attribution_graph(
        model, [], x, targets=[Direction(site, 3, vector, "mode"), Latent(site, 2, 1)]
    )  # fmt: skip
    assert graph.nodes[-1].name == "mode@3" and graph.weights[graph.node("l0.h1@2")] == 1
    row = graph.effects[graph.targets == len(graph) - 1][0]
    assert math.isclose(float(row.sum()), float(state[3] @ vector), abs_tol=1e-9)
    assert {graph.nodes[i].position for i in row.nonzero().flatten().tolist()} <= {2, 3, None}
    found = input_effects(model, x, [Direction(site, 3, vector), Latent(site, 2, 1)])
    assert math.isclose(float(found.totals[1]), float(state[2, 1]), abs_tol=1e-12)


def test_most_effect_first():
    model, _, x = loaded("GRU")
    whole, part = (recurrent_attribution_graph(model, [], x, targets=[0], max_features=m) for m in (None, 6))
    kept = {node.name for node in part.nodes if node.kind == "unit"}
    effects = input_effects(model, x, [0]).states["l0.h"][0].abs()
    assert kept == {f"l0.h{int(effects[t].argmax())}@{t}" for t in range(STEPS)}
    assert all(
        math.isclose(part.effect(a, b), whole.effect(a, b), abs_tol=1e-12) for a in kept for b in kept
    )  # fmt: skip


def test_start_vectors_are_constants():
    torch.manual_seed(0)

    class Started(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2)
            self.start = nn.Parameter(torch.randn(1, 1, 5))

        def forward(self, x):
            return self.head(self.cell(x, self.start.expand(1, len(x), 5).contiguous())[0])

    model = ck.load(Started().double().eval())
    x = torch.randn(STEPS, 3, dtype=torch.float64)
    graph = recurrent_attribution_graph(model, [], x)
    node = graph.nodes[graph.node("l0.h.start")]
    assert node.kind == "bias" and float(graph.effects[:, graph.node(node.name)].abs().max()) > 0.01
    assert float(graph.remainder.abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_are_attributed_in_float64(dtype):
    torch.manual_seed(0)
    model = ck.load(RecurrentNet(nn.GRU(3, 5, batch_first=True), 2).eval())
    model.module.to(dtype)
    target = Direction(Site("state", 0, "l0.h"), 3, torch.ones(5))
    graph = recurrent_attribution_graph(model, [], torch.randn(STEPS, 3).to(dtype), targets=[target])
    assert graph.effects.dtype == torch.float64 and float(graph.remainder.abs().max()) < 1e-12


BAD = {
    "a number that is not one": (lambda x: x.index_fill(0, torch.tensor(1), math.nan), {}, TaskError, "NaN"),
    "no steps": (lambda x: x[:0], {}, OptionError, "at least one step"),
    "a batch": (lambda x: x[None], {}, OptionError, "one sequence"),
    "too few channels": (lambda x: x[:, :2], {}, TaskError, "numbers"),
    "no such step": (lambda x: x, {"targets": [Output(0, 9)]}, OptionError, "step 9"),
    "no such output": (lambda x: x, {"targets": [7]}, OptionError, "output 7"),
    "no targets": (lambda x: x, {"targets": []}, OptionError, "no targets"),
    "no such site": (lambda x: x, {"targets": [Latent(Site("state", 0, "l0.c"), 1, 1)]}, OptionError, "no site"),
    "no such unit": (lambda x: x, {"targets": [Latent(Site("state", 0, "l0.h"), 1, 50)]}, OptionError, "unit 50"),
    "a short direction": (lambda x: x, {"targets": [Direction(Site("state", 0, "l0.h"), 1, torch.ones(4))]},
                          OptionError, "shape"),
    "the input": (lambda x: x, {"targets": [Direction(Site("state", 0, "x"), 1, torch.ones(3))]}, OptionError, "input"),
    "twice the same": (lambda x: x, {"targets": [Latent(Site("state", 0, "l0.h"), 1, 1)] * 2}, OptionError, "twice"),
    "no window": (lambda x: x, {"window": 0}, OptionError, "window"),
    "no features": (lambda x: x, {"max_features": 0}, OptionError, "max_features"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, options, error, says = BAD[case]
    model, _, x = loaded("GRU")
    with pytest.raises(error, match=says):
        recurrent_attribution_graph(model, [], change(x), **options)


def test_dictionaries_that_do_not_fit():
    model, _, x = loaded("GRU")
    fits = random_sae(5)
    bad = {
        "5 numbers|has 5": random_sae(4),
        "no site": random_sae(5, site=Site("state", 0, "l0.c")),
        "the input": random_sae(3, site=Site("state", 0, "x")),
        "trained on": replace(fits, model="another"),
    }
    wide = SparseCoder(5, 12, 3).double().requires_grad_(False)
    bad["SAEs"] = Dictionary(wide, Site("state", 0, "l0.h"), (Site("state", 0, "x"),))
    for says, dictionary in bad.items():
        with pytest.raises(OptionError, match=says):
            recurrent_attribution_graph(model, [dictionary], x)
    with pytest.raises(OptionError, match="two dictionaries"):
        recurrent_attribution_graph(model, [fits, fits], x)
    silent = random_sae(5)
    silent.coder.b_enc.fill_(-1e3)
    with pytest.raises(OptionError, match="active latent"):
        recurrent_attribution_graph(model, [silent], x)
    silent.coder.b_enc.fill_(math.nan)
    with pytest.raises(OptionError, match="NaN or infinite"):
        recurrent_attribution_graph(model, [silent], x)


def test_what_is_not_linear_is_refused(monkeypatch):
    class Rectified(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x):
            return torch.sigmoid(self.head(self.cell(x)[0]))

    torch.manual_seed(0)
    x = torch.randn(STEPS, 3)
    with pytest.raises(UnsupportedModel, match="read-out"):
        recurrent_attribution_graph(ck.load(Rectified().eval()), [], x)
    site = Site("state", 0, "l0.h")
    inside = recurrent_attribution_graph(ck.load(Rectified().eval()), [], x, targets=[Latent(site, 3, 1)])
    assert float(inside.remainder.abs().max()) < 1e-5
    with pytest.raises(UnsupportedModel, match="transformer"):
        from circuitkit.testing import tiny_model

        recurrent_attribution_graph(tiny_model(), [], torch.arange(4))
    model, _, x = loaded("GRU")
    form = FORMS[frozenset(("r", "z", "n", "hn", "carry"))]
    monkeypatch.setitem(FORMS, frozenset(("r", "z", "n", "hn", "carry")), lambda here: form(here)[:2])
    with pytest.raises(UnsupportedModel, match="not linear"):
        recurrent_attribution_graph(model, [], x)
    monkeypatch.delitem(FORMS, frozenset(("r", "z", "n", "hn", "carry")))
    with pytest.raises(UnsupportedModel, match="frozen form"):
        recurrent_attribution_graph(model, [], x)


def test_both_directions_have_no_window():
    torch.manual_seed(0)
    model = ck.load(RecurrentNet(nn.LSTM(3, 4, bidirectional=True, batch_first=True), 2).double().eval())
    x = torch.randn(STEPS, 3, dtype=torch.float64)
    found = input_effects(model, x, [Output(0, 2)])
    assert bool((found.inputs[0] != 0).all())  # later steps too
    with pytest.raises(OptionError, match="window"):
        recurrent_attribution_graph(model, [], x, window=2)


def test_the_order_of_rows_is_theirs():
    model, _, x = loaded("GRU")
    local = frozen_recurrence(model, x)
    made = placed(local, {}, 0, STEPS - 1)
    rows = [made.rows[1], made.rows[4], made.rows[2]]
    got = total_rows(local, made, rows, STEPS - 1)
    for i, group in enumerate(rows):
        alone = sweep(local, replace(made.standing, cut=frozenset()), [group], STEPS - 1)
        assert torch.allclose(got[5 * i : 5 * i + 5], alone, atol=1e-12)
    assert in_order(local, rows) == [1, 2, 0]


def test_figure():
    model, _, x = loaded("GRU")
    figure = input_effects(model, x).plot(1)
    heights = sum(sum(bar.y) for bar in figure.data)
    assert math.isclose(heights, float(input_effects(model, x).totals[1]), abs_tol=1e-9)
    assert figure.layout.yaxis.title.text and figure.layout.xaxis.title.text == "step"
    with pytest.raises(GraphError, match="labels"):
        effects_over_time(torch.ones(3, 1), 0.0, ["a"], "effect")
