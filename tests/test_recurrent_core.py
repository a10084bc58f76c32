"""Recurrent networks: the stepper, circuits, patched edges and first-order scores against literal computations."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import circuitkit as ck
from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError, OptionError, TaskError, UnsupportedModel
from circuitkit.models.recurrent.cells.gated_linear import GatedLinear
from circuitkit.models.recurrent.many import patched_by_circuits
from circuitkit.models.recurrent.view import windows_of
from tests.oracles import recurrent as oracle
from tests.oracles.sequential import literal_acdc

STEPS, N_IN, UNITS, N_OUT = 5, 2, 3, 2


class Net(nn.Module):
    """A recurrent layer and a linear read-out of every step."""

    def __init__(self, layer, width, n_out=N_OUT):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, n_out)

    def forward(self, x):
        return self.head(self.layer(x)[0])


LAYERS = {
    "tanh": lambda **kw: nn.RNN(N_IN, UNITS, batch_first=True, **kw),
    "relu": lambda **kw: nn.RNN(N_IN, UNITS, nonlinearity="relu", batch_first=True, **kw),
    "gru": lambda **kw: nn.GRU(N_IN, UNITS, batch_first=True, **kw),
    "lstm": lambda **kw: nn.LSTM(N_IN, UNITS, batch_first=True, **kw),
}
ONE_DIRECTION = [(name, {}) for name in LAYERS]
STACKS = [
    ("tanh", {"num_layers": 2}),
    ("gru", {"bidirectional": True}),
    ("lstm", {"num_layers": 2, "bidirectional": True}),
    ("lstm", {"proj_size": 2}),
    ("gru", {"bias": False}),
]


class Started(Net):
    """A layer with a state before the first step that is a parameter."""

    def __init__(self, layer, width):
        super().__init__(layer, width)
        n = 2 if isinstance(layer, nn.LSTM) else 1
        self.start = nn.ParameterList(nn.Parameter(torch.randn(1, 1, UNITS)) for _ in range(n))

    def forward(self, x):
        start = tuple(s.expand(-1, len(x), -1).contiguous() for s in self.start)
        return self.head(self.layer(x, start if len(start) > 1 else start[0])[0])


def net(name, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = (options.get("proj_size") or UNITS) * (2 if options.get("bidirectional") else 1)
        return Net(LAYERS[name](**options), width).double()


def pairs(n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = torch.randn(2, n, STEPS, N_IN, generator=generator, dtype=torch.float64)
    return ck.Task.from_tokens(clean, corrupt, torch.zeros(n).long(), torch.ones(n).long())


def literal(model, task, removed):
    """Metric of the literal run with some edges removed."""
    batch, module = task.batches[0], model.module
    with torch.no_grad():
        _, record = oracle.run(
            module.layer, module.head, batch.corrupt, {"h": None, "c": None} | _nothing(batch), lambda *_: False
        )
        out, _ = oracle.run(module.layer, module.head, batch.clean, record, removed)
    return task.metric(out.gather(1, batch.positions[..., None].expand(-1, -1, out.shape[-1])), batch)


def _nothing(batch):
    return {name: torch.zeros(len(batch), STEPS, UNITS, dtype=torch.float64) for name in "hc"} | {"x": batch.clean}


@pytest.mark.parametrize(("name", "options"), ONE_DIRECTION)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.2, 0.5, 0.9]))
def test_circuits_are_those_of_a_literal_run(name, options, seed, share):
    model, task = ck.load(net(name, seed, **options)), pairs(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    keep = model.graph.mask & (torch.rand(model.graph.mask.shape, generator=generator) < share)
    gone = set(model.graph.edge_names(model.graph.mask & ~keep))
    want = literal(model, task, lambda u, v, _t: f"{u}->{v}" in gone)
    batch = task.batches[0]
    run, corrupt = model.record(batch.clean), model.record(batch.corrupt).writes
    got = task.metric(model.run_circuits(run, corrupt, keep[None], batch.positions)[0], batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    soft = model.run_circuits(run, corrupt, keep[None].double(), batch.positions)[0]
    torch.testing.assert_close(task.metric(soft, batch), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), ONE_DIRECTION)
@pytest.mark.parametrize("time", ["collapsed", "expanded", ((0, 2), (2, 5))])
def test_exact_scores_are_those_of_literal_runs_with_one_edge_removed(name, options, time):
    model, task = ck.load(net(name, **options)), pairs()
    view = model.viewed(time, steps=STEPS)
    scores = ck.score(view, task, "exact")
    windows = windows_of(time, STEPS) or ((0, STEPS),)
    whole = literal(model, task, lambda *_: False)

    def one(edge):
        (u, us), (v, vs) = (part.partition("@")[::2] for part in edge.split("->"))

        def removed(source, destination, t):
            back = t if source[0] == "x" or destination == "logits" else t - 1
            at = {name: next((w for w in windows if w[0] <= s < w[1]), None) for name, s in (("u", back), ("v", t))}
            fits = time == "collapsed" or (_label(at["u"]) == us and _label(at["v"]) == vs)
            return (source, destination) == (u, v) and fits

        return float((whole - literal(model, task, removed)).mean())

    edges = list(view.graph.edge_names())
    generator = torch.Generator().manual_seed(0)
    for i in torch.randperm(len(edges), generator=generator)[:25].tolist():
        row, column = view.graph.edge(edges[i])
        assert float(scores.values[row, column]) == pytest.approx(one(edges[i]), abs=1e-7), edges[i]


def _label(window):
    return None if window is None else str(window[0]) if window[1] == window[0] + 1 else f"{window[0]}-{window[1] - 1}"


@pytest.mark.parametrize(("name", "options"), ONE_DIRECTION + STACKS)
@pytest.mark.parametrize("view", [{}, {"time": "expanded", "steps": STEPS}, {"time": [(0, 1), (1, 5)]}])
def test_patched_edges_equal_circuits_of_all_other_edges(name, options, view):
    model, task = ck.load(net(name, **options)).viewed(**view), pairs()
    fast = ck.score(model, task, "exact").values
    batch = task.batches[0]
    run, corrupt = model.record(batch.clean), model.record(batch.corrupt).writes
    clean = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
    slow = torch.zeros_like(fast)
    for edges, logits, _ in patched_by_circuits(model, run, corrupt, batch.positions, 64):
        for (u, v), each in zip(edges, logits, strict=True):
            slow[u, v] = (clean - task.metric(each, batch)).mean()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), ONE_DIRECTION + STACKS)
def test_first_order_scores_are_the_slope_of_soft_masks(name, options):
    # d/d eps of the metric when an edge carries (1 - eps) clean + eps corrupt, by autograd through the masked run.
    model, task = ck.load(net(name, **options)), pairs()
    for view in (model, model.viewed([(0, 3), (3, 5)]), model.viewed(group="gate"), model.viewed(group="direction")):
        batch = task.batches[0]
        run, corrupt = view.record(batch.clean), view.record(batch.corrupt).writes
        keep = view.graph.mask.double()[None].requires_grad_(True)
        with torch.enable_grad():
            value = task.metric(view.run_circuits(run, corrupt, keep, batch.positions)[0], batch).mean()
        want = torch.autograd.grad(value, keep)[0][0]
        got = ck.score(view, task, "eap").values
        torch.testing.assert_close(got, torch.where(view.graph.mask, want, 0).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), ONE_DIRECTION + STACKS)
def test_weight_tied_scores_are_sums_over_time_and_groups_sums_over_units(name, options):
    model, task = ck.load(net(name, **options)), pairs()
    total = ck.score(model, task, "eap-ig").values
    shape = model.view.shape
    for time in ("expanded", [(0, 2), (2, 5)]):
        view = model.viewed(time, steps=STEPS)
        values = (
            ck.score(view, task, "eap-ig").values.unflatten(0, view.view.shape[:2]).unflatten(2, view.view.shape[2:])
        )
        torch.testing.assert_close(values.sum((0, 2)), total, rtol=0, atol=1e-6)
    assert shape[0] == 1
    grouped = ck.score(model.viewed(group="layer"), task, "eap-ig").values
    assert float(grouped.sum()) == pytest.approx(float(total.sum()), abs=1e-6)


def test_all_units_of_a_basis_together_are_the_state():
    model, task = ck.load(net("gru")), pairs()
    basis = torch.linalg.qr(torch.randn(UNITS, UNITS, generator=torch.Generator().manual_seed(1)).double())[0]
    turned = model.viewed(subspaces={"l0.h": basis[:, :2]})
    assert [name for name in turned.graph.sources if name.startswith("l0")] == ["l0.h:0", "l0.h:1", "l0.h:rest"]
    for method in ("exact", "eap"):
        straight = ck.score(model.viewed(group="gate"), task, method).values
        found = ck.score(turned, task, method).values
        assert found.abs().max() > 1e-4
        if method == "eap":  # first-order scores of parts add up to that of the whole
            assert float(found.sum()) == pytest.approx(float(straight.sum()), abs=1e-6)
    # The circuit without one direction carries that direction's corrupt value, and nothing else of it.
    batch = task.batches[0]
    run, corrupt = turned.record(batch.clean), turned.record(batch.corrupt).writes
    same = turned.run_circuits(run, corrupt, turned.graph.mask[None], batch.positions)[0]
    torch.testing.assert_close(same, model.logits(run.inputs[-1], batch.positions))
    with pytest.raises(GraphError, match="not orthonormal"):
        model.viewed(subspaces={"l0.h": torch.ones(UNITS, 1)})
    with pytest.raises(GraphError, match="no write 'h'"):
        model.viewed(subspaces={"h": torch.ones(UNITS, 1)})


@pytest.mark.parametrize(
    "method",
    ["exact", "eap", "eap-ig", "clean-corrupted", "acdc", "group-testing", "edge-pruning", "ugs", "matryoshka"],
)
def test_every_method_that_says_so_takes_recurrent_networks(method):
    model, task = ck.load(net("gru")), pairs(n=8)
    options = {"steps": 3} if method in ("edge-pruning", "ugs") else {}
    scores = ck.score(model, task, method, progress=False, **options)
    assert scores.values.isfinite().all() and scores.graph.same_as(model.graph)
    result = ck.evaluate(model, task, Circuit.from_edges(model.graph, list(model.graph.edge_names())))
    assert result.faithfulness == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("corrupt_value", ["mean", "position-mean", "zero"])
def test_removed_edges_may_carry_means_or_zero(corrupt_value):
    model, task = ck.load(net("lstm")), pairs(n=8)
    scores = ck.score(model, task, "exact", corrupt_value=corrupt_value)
    slope = ck.score(model, task, "eap-ig", corrupt_value=corrupt_value).values
    kept = model.graph.mask
    torch.testing.assert_close(slope[:, -1], scores.values[:, -1], rtol=0, atol=1e-6)  # into the logits all is linear
    batch = task.batches[0]
    run = model.record(batch.clean)
    constant = tuple(w.mean((0, 1), keepdim=True).expand_as(w) for w in run.writes)
    constant = tuple(w.mean(0, keepdim=True).expand_as(w) for w in run.writes) if "-" in corrupt_value else constant
    constant = tuple(torch.zeros_like(w) for w in run.writes) if corrupt_value == "zero" else constant
    edge = "l0.h1->l0.c2<g>"
    keep = kept & ~model.graph.edge_mask([edge])
    clean = task.metric(model.logits(run.inputs[-1], batch.positions), batch)
    gone = task.metric(model.run_circuits(run, constant, keep[None], batch.positions)[0], batch)
    assert float(scores.values[model.graph.edge(edge)]) == pytest.approx(float((clean - gone).mean()), abs=1e-6)


def test_optimal_constants_are_for_transformers():
    with pytest.raises(OptionError, match="optimal constants are learned for transformers"):
        ck.score(ck.load(net("gru")), pairs(), "exact", corrupt_value="optimal")


def test_a_method_for_transformers_says_what_to_use_instead():
    with pytest.raises(OptionError, match=r"path-patching needs a transformer.*use one of.*exact"):
        ck.score(ck.load(net("gru")), pairs(), "path-patching")


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
def test_on_a_linear_readout_of_the_input_gradients_equal_patching(name):
    # Edges into the logits are linear, so eap, eap-ig and exact agree there.
    model, task = ck.load(net(name)), pairs()
    found = [ck.score(model, task, method).values[:, -1] for method in ("exact", "eap", "eap-ig")]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-6)


def test_equal_pairs_score_exactly_zero_and_the_module_is_as_found():
    module = net("lstm").train()
    before = copy.deepcopy(module.state_dict())
    model = ck.load(module)
    task = pairs()
    batch = task.batches[0]
    same = ck.Task("same", (batch.__class__(**{**vars(batch), "corrupt": batch.clean.clone()}),), task.metric)
    for method in ("exact", "eap", "eap-ig"):
        assert not ck.score(model, same, method).values.any()
    assert module.training and all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules())
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_weights_are_used_by_reference():
    module = net("gru")
    model, task = ck.load(module), pairs()
    before = ck.score(model, task, "eap").values
    with torch.no_grad():
        module.layer.weight_hh_l0.mul_(1.5)
    after = ck.score(model, task, "eap").values
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, ck.score(ck.load(module), task, "eap").values)


def test_small_budgets_and_batches_give_the_same_scores():
    model, task = ck.load(net("gru", num_layers=2)), pairs(n=6)
    for method in ("exact", "eap-ig"):
        whole = ck.score(model, task, method).values
        torch.testing.assert_close(ck.score(model, task, method, batch_size=1).values, whole, rtol=0, atol=1e-7)
        torch.testing.assert_close(ck.score(model, task, method, budget="20KiB").values, whole, rtol=0, atol=1e-7)


def test_segments_of_the_backward_pass_do_not_change_scores(monkeypatch):
    from circuitkit.models.recurrent import model as module_of_model

    model, task = ck.load(net("lstm")), pairs()
    whole = ck.score(model, task, "eap").values
    monkeypatch.setattr(module_of_model, "SEGMENTED", 2)
    torch.testing.assert_close(ck.score(model, task, "eap").values, whole, rtol=0, atol=1e-9)


def test_windows_must_tile_the_steps_and_inputs_must_fit_them():
    model, task = ck.load(net("gru")), pairs()
    with pytest.raises(GraphError, match="tile the steps"):
        model.viewed([(0, 2), (3, 5)])
    with pytest.raises(GraphError, match="needs steps"):
        model.viewed("expanded")
    with pytest.raises(GraphError, match="'collapsed', 'expanded' or windows"):
        model.viewed("unrolled")
    with pytest.raises(GraphError, match="got group"):
        model.viewed(group="neuron")
    with pytest.raises(TaskError, match="5 steps, the graph's windows end at 3"):
        ck.score(model.viewed("expanded", steps=3), task, "eap")
    with pytest.raises(GraphError, match="use fewer and longer windows"):
        _ = model.viewed("expanded", steps=10_000).graph


def test_answers_read_at_some_windows_only_leave_no_edges_to_other_logits():
    model = ck.load(net("tanh"))
    graph = model.viewed("expanded", steps=STEPS, read_at=[STEPS - 1]).graph
    read = {edge.rpartition("@")[2] for edge in graph.edge_names() if "->logits" in edge}
    assert read == {str(STEPS - 1)}
    # One edge per pair of units and step, the inputs of every step, and the units read at the end.
    assert graph.n_edges == (STEPS - 1) * UNITS**2 + STEPS * N_IN * UNITS + UNITS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StatefulNet(), "carries its state over|depends on the input or on earlier batches"),
        (lambda: RandomNet(), "drops out at random"),
        (lambda: BetweenNet(), "between the two recurrent layers"),
        (lambda: LastCellState(), "c_n"),
    ],
)
def test_modules_that_cannot_be_told_apart_are_refused(make, message):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.raises(UnsupportedModel, match=message):
            ck.load(make())


class StatefulNet(Net):
    def __init__(self):
        super().__init__(nn.GRU(N_IN, UNITS, batch_first=True), UNITS)
        self.state = None

    def forward(self, x):
        out, state = self.layer(x, self.state)
        self.state = state.detach()
        return self.head(out)


class RandomNet(Net):
    def __init__(self):
        super().__init__(nn.GRU(N_IN, UNITS, batch_first=True), UNITS)

    def forward(self, x):
        return self.head(nn.functional.dropout(self.layer(x)[0], 0.5, training=True))


class BetweenNet(Net):
    def __init__(self):
        super().__init__(nn.GRU(N_IN, UNITS, batch_first=True), UNITS)
        self.second = nn.GRU(UNITS, UNITS, batch_first=True)

    def forward(self, x):
        return self.head(self.second(self.layer(x)[0].relu())[0])


class LastCellState(Net):
    def __init__(self):
        super().__init__(nn.LSTM(N_IN, UNITS, batch_first=True), UNITS)

    def forward(self, x):
        return self.head(self.layer(x)[1][1][-1])


class Words(nn.Module):
    """Embedding, packed recurrent layers, a read-out of the last step."""

    def __init__(self, batch_first=True, cells=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Sequential(nn.Linear(UNITS, 4), nn.ReLU(), nn.Linear(4, 5))
        self.layer = nn.GRUCell(4, UNITS) if cells else nn.GRU(4, UNITS, batch_first=batch_first)
        self.start = nn.Parameter(torch.randn(1, 1, UNITS))
        self.cells, self.batch_first = cells, batch_first

    def forward(self, tokens, lengths=None):
        x = self.embed(tokens)
        if self.cells:
            h = self.start[0].expand(len(x), -1)
            for t in range(x.shape[1]):
                h = self.layer(x[:, t], h)
            return self.head(h)
        start = self.start.expand(-1, len(x), -1).contiguous()
        if lengths is not None:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, _ = self.layer(packed, start)
            return self.head(nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0])
        out, last = self.layer(x if self.batch_first else x.transpose(0, 1), start)
        return self.head(last[-1])


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"cells": True}])
def test_embeddings_starts_and_heads_stay_the_users_own(options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Words(**options).double()
    model = ck.load(module)
    assert model.numbers is None and model.d_vocab == 11
    assert model.graph.sources[0] == "input"
    tokens = torch.randint(11, (4, STEPS), generator=torch.Generator().manual_seed(1))
    other = (tokens + 3) % 11
    task = ck.Task.from_tokens(tokens, other, [0] * 4, [1] * 4, vocab=model)
    run = model.record(tokens)
    torch.testing.assert_close(model.logits(run.inputs[-1], torch.full((4, 1), STEPS - 1))[:, 0], module(tokens))
    result = ck.evaluate(model, task, ck.score(model, task, "exact").top(20))
    assert result.n_edges == 20


def test_packed_sequences_run_where_all_are_of_one_length():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Words()
    model = ck.load(module)
    tokens = torch.randint(11, (3, STEPS), generator=torch.Generator().manual_seed(1))
    lengths = torch.full((3,), STEPS)
    torch.testing.assert_close(model.read_out(model.record(tokens).inputs[1]), module(tokens, lengths))


def test_not_finite_states_name_step_and_layer():
    module = net("tanh", num_layers=2)
    model = ck.load(module)
    with torch.no_grad():
        module.layer.weight_hh_l1.fill_(torch.nan)
    with pytest.raises(UnsupportedModel, match=r"layer 1 \(l1\) makes NaN or infinite values, first at step"):
        ck.score(model, pairs(), "eap")


def test_growing_linear_recurrences_name_the_step():
    layer = nn.RNN(1, 1, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(0.0)
        layer.weight_ih_l0.fill_(1.0)
        layer.weight_hh_l0.fill_(1e6)
    model = ck.load(Net(layer, 1), check=False)
    with pytest.raises(UnsupportedModel, match=r"step 7 of 9.*eigenvalue beyond 1"):
        model.record(torch.ones(1, 9, 1))


def test_unstable_linear_recurrences_are_said_when_loaded_and_refused_when_they_overflow():
    cell = GatedLinear(2, hidden_size=3, gate_size=2, output_size=2)
    with torch.no_grad():
        cell.lam.copy_(torch.tensor([0.5, -1.5, 1.0]))
    with pytest.warns(UserWarning, match=r"unstable linear recurrence: its largest eigenvalue is 1.5 in size"):
        model = ck.load(cell)
    with pytest.raises(UnsupportedModel, match=r"makes NaN or infinite values, first at step .* grows without bound"):
        model.record(torch.ones(1, 400, 2))


@pytest.mark.parametrize(
    ("name", "inputs", "says"),
    [
        ("toys/flip-flop_tanh_s0", torch.zeros(2, 4, 5), r"shape \[2, 4, 5\], expected numbers \[batch, step, 3\]"),
        ("toys/flip-flop_tanh_s0", torch.zeros(2, 4), r"shape \[2, 4\], expected numbers"),
        ("toys/flip-flop_tanh_s0", torch.full((2, 4, 3), torch.nan), "hold NaN .* first in row 0 at step 0"),
        ("toys/parity_tanh_s0", torch.zeros(2, 4), "expected ids .* as whole numbers"),
        ("toys/parity_tanh_s0", torch.full((2, 4), 2), "ids from 2 to 2, expected 0 to 1"),
        ("toys/parity_tanh_s0", torch.zeros(2, 4, 1, dtype=torch.long), r"expected ids \[batch, step\]"),
    ],
)
def test_inputs_that_a_network_cannot_read_are_refused(name, inputs, says):
    model = ck.load(name)
    for use in (model.trace, model.record):
        with pytest.raises(TaskError, match=says):
            use(inputs)


def test_bad_inputs_are_refused():
    model, task = ck.load(net("gru")), pairs()
    batch = task.batches[0]
    with pytest.raises(TaskError, match="at least one"):
        ck.Task.from_tokens(batch.clean[:, :0], batch.corrupt[:, :0], [0] * 3, [1] * 3)
    with pytest.raises(TaskError, match="length zero"):
        model.record(batch.clean[:, :0])
    with pytest.raises(TaskError, match=r"reads numbers \[n, pos, 2\]"):
        ck.score(model, ck.Task.from_tokens(torch.randn(3, 5, 4), torch.randn(3, 5, 4), [0] * 3, [1] * 3), "eap")
    with pytest.raises(TaskError, match=r"reads numbers \[n, pos, 2\]"):
        ck.score(model, ck.Task.from_tokens([[1, 2]], [[1, 3]], [0], [1]), "eap")
    broken = batch.clean.clone()
    broken[1, 2, 0] = torch.nan
    with pytest.raises(TaskError, match="row 1: clean holds NaN or infinite numbers at step 2"):
        ck.Task.from_tokens(broken, batch.corrupt, [0] * 3, [1] * 3)


def test_training_mode_with_dropout_is_said():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net(nn.LSTM(N_IN, UNITS, num_layers=2, dropout=0.5, batch_first=True), UNITS).train()
    with pytest.warns(UserWarning, match="training mode with dropout; it is run in evaluation mode"):
        model = ck.load(module)
    assert module.training and model.graph.n_edges


@pytest.mark.parametrize(("name", "options"), [("tanh", {}), ("gru", {}), ("lstm", {"bidirectional": True})])
@pytest.mark.parametrize("tau", [1e-5, 3e-4])
def test_acdc_is_the_literal_search_through_a_graph_with_cycles(name, options, tau):
    model, task = ck.load(net(name, **options)), pairs()
    batch = task.batches[0]
    run, corrupt = model.record(batch.clean), model.record(batch.corrupt).writes

    def measure(model, task, keep):
        return task.metric(model.run_circuits(run, corrupt, keep[None], batch.positions)[0], batch)

    want, effects = literal_acdc(model, task, tau, measure=measure)
    assert 0 < want.sum() < model.graph.n_edges
    for width in (1, 7, "auto"):
        found = ck.score(model, task, "acdc", tau=tau, objective="task", width=width, progress=False)
        assert torch.equal(found.selected, want)
        torch.testing.assert_close(found.values.double(), effects, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_nan_weights_name_layer_and_step_when_loaded(kind, layer):
    module = net(kind, num_layers=2)
    with torch.no_grad():
        getattr(module.layer, f"weight_hh_l{layer}")[0, 0] = torch.nan
    # The first step reads zeros, which NaN weights make NaN as well.
    with pytest.raises(
        UnsupportedModel, match=rf"layer {layer} \(l{layer}\) makes NaN or infinite values, first at step"
    ):
        ck.load(module)


def test_a_read_out_that_is_not_finite_is_named():
    module = net("gru")
    with torch.no_grad():
        module.head.weight[0, 0] = torch.inf
    with pytest.raises(UnsupportedModel, match=r"outputs of Net hold NaN or infinite values, the states .* do not"):
        ck.load(module)


def test_answers_where_the_graph_reads_none_are_refused():
    model, task = ck.load(net("gru")), pairs()
    with pytest.raises(
        TaskError, match=r"answers are read at step 4, and the graph was made for answers in the windows"
    ):
        ck.score(model.viewed("expanded", steps=STEPS, read_at=[1]), task, "eap")
    assert ck.score(model.viewed("expanded", steps=STEPS, read_at=[-1]), task, "eap").values.any()


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("time", ["collapsed", "expanded"])
def test_circuits_of_networks_that_start_somewhere_are_those_of_a_literal_run(name, time):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Started(LAYERS[name](), UNITS).double()
    model, task = ck.load(module).viewed(time, steps=STEPS), pairs(seed=3)
    generator = torch.Generator().manual_seed(0)
    keep = model.graph.mask & (torch.rand(model.graph.mask.shape, generator=generator) < 0.5)
    gone = set(model.graph.edge_names(model.graph.mask & ~keep))

    def removed(source, destination, t):
        if time == "collapsed":
            return f"{source}->{destination}" in gone
        back = t if source[0] == "x" or destination == "logits" else t - 1
        return f"{source}@{back}->{destination}@{t}" in gone

    batch = task.batches[0]
    start = {site: value[0].detach() for site, value in zip("hc", module.start, strict=False)}
    with torch.no_grad():
        _, record = oracle.run(module.layer, module.head, batch.corrupt, _nothing(batch), lambda *_: False, start)
        out, _ = oracle.run(module.layer, module.head, batch.clean, record, removed, start)
    run, corrupt = model.record(batch.clean), model.record(batch.corrupt).writes
    got = model.run_circuits(run, corrupt, keep[None], batch.positions)[0]
    torch.testing.assert_close(got, out[:, -1:], rtol=0, atol=1e-12)


def test_a_start_is_used_by_reference_too():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Started(nn.LSTM(N_IN, UNITS, batch_first=True), UNITS)
    model, x = ck.load(module), torch.randn(2, 4, N_IN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for start in module.start:
            start.add_(1.0)
        torch.testing.assert_close(model.read_out(model.record(x).inputs[1]), module(x))


def test_subspaces_of_the_input_are_writers_too():
    model, task = ck.load(net("gru")), pairs()
    basis = torch.linalg.qr(torch.randn(N_IN, N_IN, generator=torch.Generator().manual_seed(1)).double())[0]
    view = model.viewed(subspaces={"x": basis[:, :1]})
    assert view.graph.sources[:2] == ("x:0", "x:rest")
    whole = ck.score(model, task, "eap").values[:N_IN].sum(0)
    torch.testing.assert_close(ck.score(view, task, "eap").values[:2].sum(0), whole, rtol=0, atol=1e-7)


class Loop(nn.Module):
    """A cell whose input is changed by what it gave before."""

    def __init__(self, back):
        super().__init__()
        self.cell, self.back, self.head = nn.GRUCell(N_IN, UNITS), nn.Linear(UNITS, N_IN), nn.Linear(UNITS, N_OUT)
        self.scale = back

    def forward(self, x):
        h, outputs = x.new_zeros(len(x), UNITS), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t] + self.scale * self.back(h), h)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


class Pooled(Net):
    """One answer for a whole sequence."""

    def __init__(self, how):
        both = how == "ends"
        super().__init__(nn.LSTM(N_IN, UNITS, batch_first=True, bidirectional=both), UNITS * (1 + both))
        self.how = how

    def forward(self, x):
        out, (h, _) = self.layer(x)
        return self.head(torch.cat((h[-2], h[-1]), -1) if self.how == "ends" else out.mean(1))


class Convolved(Net):
    """Numbers that pass a convolution first."""

    def __init__(self):
        super().__init__(nn.GRU(N_IN, UNITS, batch_first=True), UNITS)
        self.mix = nn.Conv1d(4, N_IN, 3, padding=1)

    def forward(self, x):
        return self.head(self.layer(self.mix(x.transpose(1, 2)).transpose(1, 2))[0])


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def test_a_way_back_outside_the_layer_is_refused():
    assert ck.load(seeded(lambda: Loop(0.0))).graph.n_edges
    with pytest.raises(UnsupportedModel, match="what GRUCell reads depends on what the recurrent layers gave"):
        ck.load(seeded(lambda: Loop(1.0)))


@pytest.mark.parametrize("how", ["mean", "ends"])
def test_one_answer_for_a_whole_sequence(how):
    module = seeded(lambda: Pooled(how)).double()
    model, task = ck.load(module), pairs()
    batch = task.batches[0]
    run = model.record(batch.clean)
    torch.testing.assert_close(model.logits(run.inputs[-1], batch.positions)[:, 0], module(batch.clean))
    scores = ck.score(model, task, "exact")
    result = ck.evaluate(model, task, scores.top(model.graph.n_edges))
    assert result.faithfulness == pytest.approx(1.0, abs=1e-9)


def test_a_convolution_may_come_first():
    model = ck.load(seeded(Convolved))
    assert model.numbers == 4 and model.graph.sources[0] == "x0" and not model.causal


def test_subclasses_and_parametrisations_are_refused_by_name():
    class Other(nn.GRU):
        pass

    for layer in (Other(N_IN, UNITS), nn.utils.parametrizations.weight_norm(nn.GRU(N_IN, UNITS), "weight_hh_l0")):
        with pytest.raises(UnsupportedModel, match="is a subclass of GRU and may compute something else"):
            ck.load(Net(layer, UNITS))


@pytest.mark.parametrize(
    ("time", "read_at", "message"), [("collapsed", [1], "one for all steps"), ("expanded", [50], "below 5")]
)
def test_steps_that_are_read_must_be_steps_of_the_graph(time, read_at, message):
    with pytest.raises(GraphError, match=message):
        ck.load(net("gru")).viewed(time, steps=STEPS, read_at=read_at)
