"""Optimal constants: least of all constants, the same however the work is cut, and a corrupt value like any other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import circuitkit as ck
from circuitkit.errors import MetricError, OptionError
from circuitkit.evaluation.faithfulness import circuit_metrics
from circuitkit.functional.metrics import METRICS
from circuitkit.methods import optimal_constants
from circuitkit.methods.base import corrupt_writes, fidelity
from circuitkit.methods.optimal_constants import learn_constants, optimal_writes
from circuitkit.methods.plan import Plan
from tests.families import build
from tests.oracles.literal import literal_metric, literal_run
from tests.toys import SHAPES, random_model, random_task

QUIET = Plan(progress=False)
few = settings(max_examples=4, deadline=None)


def written(model, batch, value):
    """What each writer carries under a corrupt value, on the stream: [src, batch, pos, d]."""
    run = model.record(batch.clean)
    carried = corrupt_writes(model, ck.Task("t", (batch,), METRICS["kl"]), QUIET, value)(run)
    return torch.cat([site.expand(c) for site, c in zip(model.wiring.write_sites, carried, strict=True)])


def literal_gaps(model, task, carried):
    """loss(one writer's write replaced for all readers) - loss(clean), one example and writer at a time."""
    module, graph, batch = model.module, model.graph, task.batches[0]
    total = torch.zeros(len(graph.sources), dtype=torch.float64)
    with torch.no_grad():
        for i in range(len(batch)):
            length = int(batch.lengths[i])
            still = torch.zeros(graph.mask.shape, dtype=torch.float64)
            logits, _ = literal_run(module, batch.clean[i, :length], None, still)
            known = replace(batch, reference=logits[batch.positions[i]][None].expand(len(batch), -1, -1))
            for u in range(len(graph.sources)):
                dial = still.clone()
                dial[u] = 1
                total[u] -= literal_metric(module, task, known, i, carried[:, i, :length], dial)
    return total / len(batch)


@given(shape=SHAPES)
@few
def test_scores_are_the_loss_of_a_literal_run_with_the_constants(shape):
    model = random_model(shape)
    task = random_task(model, n=2, lengths=torch.tensor([6, 4]) if shape["causal"] else None)
    scores = ck.score(model, task, "optimal-ablation", steps=4, compare=True, progress=False)
    judged = fidelity(task, None)
    carried = optimal_writes(model, task, QUIET, steps=4)(model.record(task.batches[0].clean))
    optimal = torch.cat([site.expand(c) for site, c in zip(model.wiring.write_sites, carried, strict=True)])
    for column, values in ((0, optimal), (1, written(model, task.batches[0], "mean"))):
        want = literal_gaps(model, judged, values.detach())
        torch.testing.assert_close(scores.values[:, column].double(), want, rtol=1e-4, atol=1e-6)
    assert (scores.rows, scores.columns) == (model.graph.sources, ("optimal", "mean", "zero", "counterfactual"))


@given(shape=SHAPES)
@few
def test_the_best_constant_is_never_worse_than_mean_or_zero(shape):
    model = random_model(shape)
    scores = ck.score(model, random_task(model), "optimal-ablation", steps=3, compare=True, progress=False).values
    assert (scores[:, 0] <= scores[:, 1:3].min(1).values + 1e-6).all()
    assert float(scores.min()) >= -1e-6, "KL is never below zero"


def test_adam_finds_the_least_squares_constant():
    """Of a linear model judged by squared error the last head's best constant solves a linear system."""
    model = random_model(linear=True, n_layers=1)
    task = random_task(model, n=6)
    batch = task.batches[0]
    run = model.record(batch.clean)
    logits = model.logits(run.inputs[-1], batch.positions)
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    batch = replace(batch, target=target)
    task = replace(task, batches=(batch,), metric=METRICS["squared-error"])
    (constant,) = learn_constants(model, task, QUIET, 300)[1][:1]
    out = model.module.blocks[0].attn.W_O[0] @ model.module.unembed.W_U  # from z of head 0 to logits
    rest = (logits - target)[:, 0] - run.writes[1][:, -1, 0] @ out
    best = torch.linalg.lstsq(out.T, -rest.mean(0)[:, None]).solution[:, 0].detach()
    torch.testing.assert_close(constant, best, rtol=2e-2, atol=2e-2 * float(best.abs().max()))


def test_cutting_the_work_and_repeating_it_change_nothing():
    model = random_model()
    results = []
    for options in ({}, {}, {"batch_size": 1}, {"budget": "2KiB"}):
        task = random_task(model, n=4)  # a new task each time, for which nothing is learned yet
        results.append(ck.score(model, task, "optimal-ablation", steps=10, progress=False, **options).values)
    assert torch.equal(results[0], results[1])
    for other in results[2:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_padding_is_of_no_account():
    model = random_model()
    task = random_task(model, n=3, lengths=torch.tensor([6, 4, 3]))
    batch = task.batches[0]
    real = torch.arange(6) < batch.lengths[:, None]
    other = replace(batch, clean=torch.where(real, batch.clean, 0), corrupt=torch.where(real, batch.corrupt, 0))
    a, b = (
        ck.score(model, replace(task, batches=(x,)), "optimal-ablation", steps=5, progress=False).values
        for x in (batch, other)
    )
    torch.testing.assert_close(a, b)


def test_every_way_of_taking_information_away_costs_more_on_the_induction_model():
    """Also the paired corrupt value, which misleads here: it moves what the model looks for."""
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=16, seed=0)
    values = ck.score(model, task, "optimal-ablation", steps=30, compare=True, progress=False).values
    assert (values[:, :1] < values[:, 1:]).all()


@pytest.mark.parametrize("method", ["exact", "eap"])
def test_every_method_takes_optimal_constants(method):
    model = random_model(linear=True)
    task = random_task(model)
    scores = ck.score(model, task, method, corrupt_value="optimal", progress=False)
    keep = model.graph.mask.expand(model.graph.n_edges, -1, -1).clone()
    edges = model.graph.mask.nonzero()
    keep[torch.arange(len(edges)), edges[:, 0], edges[:, 1]] = False
    clean, values = circuit_metrics(model, task, keep, plan=QUIET, corrupt_value="optimal")
    want = (clean - values).mean(1).float()
    torch.testing.assert_close(scores.values[edges[:, 0], edges[:, 1]], want, rtol=1e-4, atol=1e-5)
    mean = ck.score(model, task, method, corrupt_value="mean", progress=False).values
    assert not torch.allclose(scores.values, mean, rtol=1e-2)


def test_evaluation_uses_the_constants_that_scoring_learned(monkeypatch):
    model = random_model()
    task = random_task(model, n=8)
    calls, learn = [], optimal_constants.learn_constants
    monkeypatch.setattr(optimal_constants, "learn_constants", lambda *args: (calls.append(1), learn(*args[:3], 5))[1])
    circuit = ck.find(model, task, method="eap", edges=8, corrupt_value="optimal", progress=False)
    assert circuit.result.corrupt_value == "optimal" and len(calls) == 1
    again = ck.evaluate(model, task, circuit, curve=False, progress=False)
    assert again.faithfulness == circuit.result.faithfulness and len(calls) == 1
    model.module.blocks[0].attn.W_Q.data.mul_(1.5)  # other weights: what was learned does not count
    ck.evaluate(model, task, circuit, curve=False, progress=False)
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["Gemma2", "Phi", "Llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_and_narrow_types(family, dtype):
    """Behind post-norms a write is what was kept with the run's scale; in parallel blocks heads skip their MLP."""
    model = ck.load(build(family, dtype=dtype))
    task = random_task(model, n=3)
    values = ck.score(model, task, "optimal-ablation", steps=3, compare=True, progress=False).values
    assert values.isfinite().all()
    assert (values[:, 0] <= values[:, 1:3].min(1).values + (1e-5 if dtype == torch.float32 else 2e-3)).all()
    keep = model.graph.mask.expand(2, -1, -1).clone()
    keep[0, 2], keep[1, -1] = False, False
    clean, cut = circuit_metrics(model, task.with_metric("kl"), keep, plan=QUIET, corrupt_value="counterfactual")
    want = (clean - cut).mean(1).float()
    torch.testing.assert_close(values[[2, -1], 3], want, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 2e-3)


def test_activation_patching_refuses_optimal_constants():
    model = random_model()
    with pytest.raises(OptionError, match="learned for what whole components write"):
        ck.score(model, random_task(model), "activation-patching", site="head", corrupt_value="optimal", progress=False)


def test_options_out_of_range_are_refused():
    model = random_model()
    task = random_task(model)
    with pytest.raises(OptionError, match="got steps = 0"):
        ck.score(model, task, "optimal-ablation", steps=0, progress=False)
    with pytest.raises(MetricError, match="no useful gradient"):
        ck.score(model, task, "optimal-ablation", objective="accuracy", progress=False)
