"""Laws of running and judging circuits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError
from circuitkit.evaluation.curve import MIB_FRACTIONS, curve_circuits
from circuitkit.evaluation.faithfulness import circuit_metrics, evaluate
from circuitkit.functional.select import prune_dangling
from circuitkit.functional.stats import auroc, bootstrap_ratio, trapezoid
from circuitkit.methods.base import score
from circuitkit.methods.plan import Plan
from circuitkit.models.wiring import transformer_graph
from circuitkit.scores import Scores
from tests.oracles.literal import literal_circuit
from tests.toys import SHAPES, random_model, random_task

few = settings(max_examples=10, deadline=None)


def random_scores(model, seed=0):
    values = torch.randn(model.graph.mask.shape, generator=torch.Generator().manual_seed(seed)) * model.graph.mask
    return Scores(values, model.graph, "random")


@given(shape=SHAPES, share=st.floats(0, 1), seed=st.integers(0, 99))
@few
def test_a_circuit_runs_as_the_literal_one_does(shape, share, seed):
    model = random_model(shape)
    task = random_task(model, n=2)
    draw = torch.rand(3, *model.graph.mask.shape, generator=torch.Generator().manual_seed(seed))
    keep = (draw < share) & model.graph.mask
    _, got = circuit_metrics(model, task, keep, plan=Plan(progress=False), corrupt_value="counterfactual")
    for values, mask in zip(got, keep, strict=True):
        torch.testing.assert_close(values, literal_circuit(model, task, mask), rtol=1e-7, atol=1e-9)


@given(shape=SHAPES)
@few
def test_the_full_circuit_is_faithful_and_the_empty_one_is_not(shape):
    model = random_model(shape)
    task = random_task(model)
    whole = random_scores(model).top(model.graph.n_edges)
    empty = random_scores(model).threshold(1e9)
    assert evaluate(model, task, whole, progress=False).faithfulness == pytest.approx(1, abs=1e-6)
    result = evaluate(model, task, empty, progress=False)
    assert (result.faithfulness, result.n_edges) == (pytest.approx(0, abs=1e-9), 0)
    assert result.corrupt == pytest.approx(result.circuit)


@given(shape=SHAPES, value=st.sampled_from(["counterfactual", "mean", "zero", "position-mean"]))
@few
def test_budget_and_batch_size_change_nothing(shape, value):
    model = random_model(shape)
    task = random_task(model)
    circuit = random_scores(model).top(max(1, model.graph.n_edges // 2))
    one = evaluate(model, task, circuit, corrupt_value=value, progress=False)
    two = evaluate(model, task, circuit, corrupt_value=value, batch_size=1, budget=1, progress=False)
    assert two.faithfulness == pytest.approx(one.faithfulness, rel=1e-6)
    assert [p.faithfulness for p in two.curve_points] == pytest.approx([p.faithfulness for p in one.curve_points])


def test_counterfactual_nothing_is_the_corrupt_run():
    model = random_model(heads=(4, 2), position="rotary", gated=True)
    task = random_task(model)
    batch = task.batches[0]
    with torch.no_grad():
        want = task.metric(model.logits(model.record(batch.corrupt).inputs[-1], batch.positions), batch)
    result = evaluate(model, task, random_scores(model).top(5), progress=False)
    assert result.corrupt == pytest.approx(float(want.mean()))


def test_equal_clean_and_corrupt_metrics_leave_faithfulness_undefined():
    model = random_model()
    result = evaluate(model, random_task(model, same=True), random_scores(model).top(5), progress=False)
    assert result.faithfulness is None and not result.defined
    assert result.cpr is None and "undefined" in result.verdict


def test_curve_follows_mibs_sizes_and_areas():
    model = random_model(n_layers=3)
    task = random_task(model)
    scores = score(model, task, "exact", progress=False)
    result = evaluate(model, task, scores.top(20), progress=False)
    signed = [p for p in result.curve_points if not p.absolute]
    assert [p.fraction for p in signed] == list(MIB_FRACTIONS)
    assert signed[-1].faithfulness == pytest.approx(1, abs=1e-6)
    assert result.cpr == pytest.approx(trapezoid([p.faithfulness for p in signed], [p.fraction for p in signed]))
    assert all(p.n_edges <= p.fraction * model.graph.n_edges for p in result.curve_points)


def test_the_curve_takes_mibs_numbers_of_edges():
    """Of 1,701 edges: 1, 3, 8, 17, 34, 85, 170, 340, 850 and all, taken from the ranking and then pruned."""
    graph = transformer_graph(5, 8, 4)
    assert graph.n_edges == 1701
    scores = Scores(torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(0)) * graph.mask, graph, "r")
    ranked = sorted(graph.mask.nonzero().tolist(), key=lambda e: -float(scores.values[e[0], e[1]]))
    sizes = curve_circuits(scores)[: len(MIB_FRACTIONS)]
    for size, n in zip(sizes, [1, 3, 8, 17, 34, 85, 170, 340, 850, 1701], strict=True):
        chosen = torch.zeros_like(graph.mask)
        for u, v in ranked[:n]:
            chosen[u, v] = True
        assert torch.equal(size.mask, prune_dangling(chosen, graph.feeds))


@pytest.mark.parametrize(("edges", "n", "reason"), [(0, 12, "empty"), (20, 4, "too few"), (-1, 12, "no other circuit")])
def test_no_verdict_without_grounds(edges, n, reason):
    model = random_model(seed=3)
    task = random_task(model, n=n, metric="cross-entropy")
    scores = score(model, task, "exact", progress=False)
    circuit = scores.threshold(1e9) if edges == 0 else scores.top(edges if edges > 0 else model.graph.n_edges)
    result = replace(evaluate(model, task, circuit, progress=False), gap_interval=(0.1, 0.2))
    assert reason in result.verdict and not result.better_than_chance


def test_random_rankings_have_a_quarter_of_the_area():
    """The weight of the whole model alone is 0.25, MIB's figure for random circuits."""
    fractions = list(MIB_FRACTIONS)
    assert trapezoid([0.0] * 9 + [1.0], fractions) == pytest.approx(0.25)


def test_another_models_circuit_is_refused():
    model, other = random_model(), random_model(n_layers=1)
    with pytest.raises(GraphError, match="not of random"):
        evaluate(model, random_task(model), random_scores(other).top(2), progress=False)


def test_known_circuit_gives_precision_recall_and_auroc():
    model = random_model(n_layers=1)
    names = list(model.graph.edge_names())
    task = replace(random_task(model), known=tuple(names[:3]))
    known = evaluate(model, task, Circuit.from_edges(model.graph, names[:2]), progress=False).known
    assert (known["precision"], known["recall"]) == (1.0, pytest.approx(2 / 3))
    values = torch.zeros(model.graph.mask.shape)
    for i, name in enumerate(names[:3]):
        values[model.graph.edge(name)] = 1.0 + i
    assert evaluate(model, task, Scores(values, model.graph, "oracle").top(3), progress=False).known["auroc"] == 1.0


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=12))
def test_auroc_is_the_mean_over_pairs(items):
    values = torch.tensor([float(v) for v, _ in items])
    positive = torch.tensor([p for _, p in items])
    pairs = [(a > b) + 0.5 * (a == b) for a in values[positive] for b in values[~positive]]
    want = None if not pairs else float(sum(pairs) / len(pairs))
    assert auroc(values, positive) == (want if want is None else pytest.approx(want))


def test_bootstrap_interval_covers_a_constant_ratio_and_widens_with_noise():
    bottom = torch.ones(50)
    assert bootstrap_ratio(0.5 * bottom, bottom, seed=0) == (0.5, 0.5)
    noisy = 0.5 + torch.randn(50, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_ratio(noisy, bottom, seed=0)
    assert low < float(noisy.mean()) < high
