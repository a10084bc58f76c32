"""Networks that settle into attractors: what single-edge scores say of them, what circuits do, what is warned of."""

import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import circuitkit as ck
from circuitkit.circuit import Circuit
from circuitkit.evaluation.attractors import over_time_cut, shows_repair
from circuitkit.methods.base import corrupt_writes
from circuitkit.methods.path_completeness import input_effects
from circuitkit.methods.plan import Plan
from circuitkit.result import Result

STEPS, SEEDS = 12, (0, 1, 2)
EXPANDED = {"time": "expanded", "steps": STEPS, "read_at": [STEPS - 1]}
PLAN = Plan.of("auto", None, False, 0)


@cache
def net(name):
    return ck.load(f"toys/{name}")


@cache
def pairs(name, n=16):
    return ck.task(name.split("_")[0], net(name), n=n, length=STEPS)


@cache
def scored(name, method, time="collapsed", **options):
    model = net(name).viewed(**(EXPANDED if time == "expanded" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, ck.score(model, pairs(name), method, progress=False, **options)


def measured(name, method, share, time="collapsed", **options):
    model, scores = scored(name, method, time, **options)
    circuit = scores.top(round(share * model.graph.n_edges))
    return circuit, ck.evaluate(model, pairs(name), circuit, curve=False, progress=False)


def messages(seen):
    return [str(warning.message) for warning in seen if issubclass(warning.category, UserWarning)]


def ranks(values):
    _, number, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[number]


def spearman(a, b):
    return float(torch.corrcoef(torch.stack((ranks(a.abs()).double(), ranks(b.abs()).double())))[0, 1])


@pytest.mark.parametrize("seed", SEEDS)
def test_collapsed_circuits_of_a_fifth_of_the_edges_are_faithful(seed):
    name = f"flip-flop_tanh_s{seed}"
    circuit, result = measured(name, "eap-ig", 0.2, steps=8)
    assert len(circuit) <= 0.2 * circuit.graph.n_edges
    assert 0.9 <= result.faithfulness <= 1.1
    model, scores = scored(name, "eap-ig", steps=8)
    whole = ck.evaluate(model, pairs(name), scores.top(model.graph.n_edges), curve=False, progress=False)
    assert whole.faithfulness == pytest.approx(1.0, abs=5e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_single_edges_of_single_steps_rank_like_exact_patching(seed):
    name = f"flip-flop_tanh_s{seed}"
    model, eap = scored(name, "eap", "expanded")
    _, exact = scored(name, "exact", "expanded")
    mask = model.graph.mask
    assert spearman(eap.values[mask], exact.values[mask]) > 0.99


@pytest.mark.parametrize(("method", "share"), [("eap", 0.1), ("exact", 0.1), ("exact", 0.2)])
def test_and_still_give_circuits_that_keep_nothing_of_which_evaluate_warns(method, share):
    name = "flip-flop_tanh_s2"
    with pytest.warns(UserWarning, match=r"next to nothing of flip-flop .*'eap-ig'.*time='collapsed'.*windows") as seen:
        circuit, result = measured(name, method, share, "expanded")
    assert len(circuit) >= 0.05 * circuit.graph.n_edges
    assert abs(result.faithfulness) < 0.1 and result.clean > 0.9 and result.corrupt < -0.9
    assert seen[0].filename == __file__  # the user's own line, or nobody finds it


@pytest.mark.parametrize("method", ["eap", "exact", "eap-ig"])
def test_scores_over_a_cut_in_time_hardly_add_up_to_the_effect(method):
    options = {"steps": 8} if method == "eap-ig" else {}
    name = "flip-flop_tanh_s2"
    model, scores = scored(name, method, "expanded", **options)
    rows = [i for i, node in enumerate(model.graph.source_nodes) if node.span == "5"]
    columns = [i for i, node in enumerate(model.graph.destination_nodes) if node.span == "6"]
    assert abs(float(scores.values[rows][:, columns].sum())) < 0.2 * 2  # clean is 1, corrupt -1


@pytest.mark.parametrize(("name", "method"), [("flip-flop_tanh_s2", "eap"), ("flip-flop_lstm_s1", "exact")])
def test_where_time_is_collapsed_edges_out_of_the_input_come_last_of_which_evaluate_warns(name, method):
    with pytest.warns(UserWarning, match=r"edges out of the input come last. Score it by 'eap-ig'") as seen:
        _, result = measured(name, method, 0.2)
    assert abs(result.faithfulness) < 0.1 and "collapsed" not in str(seen[0].message)


def test_circuits_that_keep_something_are_passed_in_silence():
    name = "flip-flop_tanh_s2"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        measured(name, "eap-ig", 0.2, steps=8)
        measured(name, "eap-ig", 0.1, "expanded", steps=8)
        measured(name, "exact", 0.01, "expanded")  # too small a circuit to wonder
    assert messages(seen) == []


def test_transformers_are_passed_in_silence():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scores = ck.score(model, task, "eap-ig", steps=1, progress=False)
        wrong = Circuit.from_edges(model.graph, ["input->logits", "input->a1.h0<v>", "a1.h0->logits"])
        ck.evaluate(model, task, wrong, progress=False)
        spans = ck.score(model, task, "peap", progress=False)
        ck.evaluate(
            model, task, spans.top(round(0.1 * spans.graph.n_edges), absolute=False), curve=False, progress=False
        )
    assert messages(seen) == [] and scores.values.any()


def result_of(**fields):
    whole = Result("t", "m", "counterfactual", 1.0, 0.0, 0.0, 0.0, None, None, None, 10, 100, 16, (0.9, 1.1))
    return replace(whole, **fields)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, True),
        ({"faithfulness": 0.099}, True),
        ({"faithfulness": -0.099}, True),
        ({"faithfulness": 0.101}, False),
        ({"faithfulness": -0.2}, False),
        ({"faithfulness": None}, False),
        ({"n_edges": 5}, True),
        ({"n_edges": 4}, False),
        ({"gap_interval": (-0.1, 0.4)}, False),
        ({"gap_interval": None}, False),
    ],
)
def test_the_symptom_has_three_parts(fields, shown):
    graph = net("flip-flop_tanh_s0").viewed([(0, 6), (6, 12)]).graph
    assert shows_repair(whole(graph), result_of(**fields)) is shown
    assert shows_repair(whole(net("flip-flop_tanh_s0").graph), result_of(**fields)) is shown


def whole(graph, scores=None):
    return replace(Circuit.from_edges(graph, list(graph.edge_names())), scores=scores)


@pytest.mark.parametrize("name", ["integrator_tanh_s0", "integrator_gru_s1"])
def test_a_network_that_repairs_nothing_is_not_blamed(name):
    # Its circuits of 5 % keep little too, but its scores add up over time: it is dense, not an attractor.
    model, scores = scored(name, "eap", "expanded")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, result = measured(name, "eap", 0.05, "expanded")
    assert abs(result.faithfulness) < 0.2 and messages(seen) == []
    assert over_time_cut(scores) == pytest.approx(result.clean - result.corrupt, rel=0.05)
    nothing = result_of(clean=result.clean, corrupt=result.corrupt)
    assert shows_repair(whole(model.graph), nothing) and not shows_repair(whole(model.graph, scores), nothing)


@pytest.mark.parametrize("windows", [[(0, 1), (1, 4)], [(0, 2), (2, 3), (3, 4)]])
@pytest.mark.parametrize("answers", [[3], [0, 3]])
def test_first_order_scores_over_a_cut_in_time_are_all_of_a_linear_networks_effect(windows, answers):
    # Inputs differ at every step and are added up by two layers that are linear where they are: relu of large numbers.
    layer = nn.RNN(1, 3, 2, nonlinearity="relu", batch_first=True).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.abs_()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(3, 2).double()

        def forward(self, x):
            return self.head(self.layer(x)[0])

    model = ck.load(Net()).viewed(windows)
    clean, corrupt = 1 + torch.rand(2, 5, 4, 1, generator=torch.Generator().manual_seed(0)).double()
    right = torch.zeros(5, len(answers), 1).long()
    task = ck.Task.from_tokens(clean, corrupt, right, 1 + right, positions=torch.tensor(answers).expand(5, -1))
    batch = task.batches[0]
    ends = [task.metric(model.logits(model.record(x).inputs[-1], batch.positions), batch) for x in (clean, corrupt)]
    effect = float((ends[0] - ends[1]).mean())
    scores = ck.score(model, task, "eap", progress=False)
    assert over_time_cut(scores) == pytest.approx(effect, rel=1e-5)
    assert over_time_cut(replace(scores, signed=False)) is None
    assert over_time_cut(ck.score(model.viewed(), task, "eap", progress=False)) is None


def test_there_is_no_cut_in_time_where_it_runs_both_ways():
    layer, head = nn.GRU(1, 2, batch_first=True, bidirectional=True), nn.Linear(4, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, head

        def forward(self, x):
            return self.head(self.layer(x)[0])

    model = ck.load(Net()).viewed("expanded", steps=3)
    clean, corrupt = torch.randn(2, 4, 3, 1)
    task = ck.Task.from_tokens(clean, corrupt, torch.zeros(4).long(), torch.ones(4).long())
    assert over_time_cut(ck.score(model, task, "eap", progress=False)) is None


def test_too_few_steps_of_integrated_gradients_are_told_by_both_numbers():
    name = "flip-flop_tanh_s0"
    with pytest.warns(UserWarning, match=r"add up to .*changes signed-output by .*more steps \(steps=64\)") as seen:
        scores = ck.score(net(name), pairs(name), "eap-ig", steps=8, progress=False)
    found, effect = map(float, _numbers(messages(seen)[0]))
    assert found == pytest.approx(float(scores.values[0:3].sum()), rel=0.01)
    assert effect == pytest.approx(2.0, abs=0.02)
    assert seen[0].filename == __file__


def _numbers(text):
    found = text.replace(",", "").replace(":", "").split()
    return [word for word in found if word.replace(".", "").replace("-", "").isdigit()][:2]


def test_enough_steps_add_up_and_are_passed_in_silence():
    name = "flip-flop_tanh_s0"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scores = ck.score(net(name), pairs(name, 4), "eap-ig", steps=400, progress=False)
    total = float(input_effects(net(name), pairs(name, 4), pairs(name, 4).batches[0], None).mean())
    assert float(scores.values[0:3].sum()) == pytest.approx(total, rel=0.1)
    assert messages(seen) == []


@pytest.mark.parametrize("corrupt_value", ["counterfactual", "zero", "mean"])
@pytest.mark.parametrize("group", ["unit", "gate", "layer"])
def test_the_sum_over_the_inputs_edges_is_the_effect_of_the_input(corrupt_value, group):
    # An untrained network is smooth: few steps integrate it well, in any grouping and for any corrupt value.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, head = nn.GRU(2, 5, batch_first=True, num_layers=2, bidirectional=True), nn.Linear(10, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, head

        def forward(self, x):
            return self.head(self.layer(x)[0])

    model = ck.load(Net().double()).viewed(group=group)
    clean, corrupt = torch.randn(2, 6, 4, 2, generator=torch.Generator().manual_seed(1)).double()
    task = ck.Task.from_tokens(clean, corrupt, torch.zeros(6).long(), torch.ones(6).long())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scores = ck.score(model, task, "eap-ig", steps=8, corrupt_value=corrupt_value, progress=False)
    rows = [i for i, node in enumerate(model.graph.source_nodes) if node.kind == "input"]
    corrupt_of = corrupt_writes(model, task, PLAN, corrupt_value)
    effects = input_effects(model, task, task.batches[0], corrupt_of)
    assert effects.abs().min() > 1e-3
    assert float(scores.values[rows].sum()) == pytest.approx(
        float(effects.mean()), abs=0.02 * float(effects.abs().mean())
    )
    assert messages(seen) == []
