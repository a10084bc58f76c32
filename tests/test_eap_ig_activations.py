"""Every edge along its own writer's path: against literal dials, and against what the whole path must add up to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.errors import MetricError, OptionError
from circuitkit.evaluation.faithfulness import circuit_metrics
from circuitkit.functional.attribution import quadrature
from circuitkit.methods.plan import Plan
from tests.families import build, every_family
from tests.oracles.literal import literal_metric, literal_writes
from tests.toys import SHAPES, random_model, random_task

METHOD = "eap-ig-activations"
few = settings(max_examples=6, deadline=None)


def literal_paths(model, task, alphas, weights):
    """Minus the derivative with respect to a writer's dials where all of them stand at 1 - alpha; one row at a time."""
    module, graph = model.module, model.graph
    total, n = torch.zeros(graph.mask.shape, dtype=torch.float64), 0
    for batch in task.batches:
        for i in range(len(batch)):
            corrupt = literal_writes(module, batch.corrupt[i, : int(batch.lengths[i])], graph)
            for u in range(len(graph.sources)):
                for alpha, weight in zip(alphas, weights, strict=True):
                    dial = torch.zeros(graph.mask.shape, dtype=corrupt.dtype)
                    dial[u] = 1 - alpha
                    dial.requires_grad_(True)
                    value = literal_metric(module, task, batch, i, corrupt, dial)
                    total[u] -= weight * torch.autograd.grad(value, dial)[0][u]
            n += 1
    return total / n * graph.mask


def total_effects(model, task):
    """M(clean) - M(clean, with everything that a writer writes corrupt), for each writer."""
    n = len(model.graph.sources)
    keep = model.graph.mask.expand(n, -1, -1).clone()
    keep[torch.arange(n), torch.arange(n)] = False
    plan = Plan(progress=False)
    clean, values = circuit_metrics(model, task, keep, plan=plan, corrupt_value="counterfactual")
    return (clean - values).mean(1)


@given(shape=SHAPES, rule=st.sampled_from(["left", "midpoint", "gauss-legendre"]))
@few
def test_scores_equal_autograd_on_literal_dials(shape, rule):
    model = random_model(shape)
    task = random_task(model, n=2)
    got = ck.score(model, task, METHOD, steps=3, rule=rule, progress=False).values.double()
    want = literal_paths(model, task, *quadrature(rule, 3))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * max(1e-3, float(want.abs().max())))


@pytest.mark.parametrize("shape", [{}, {"heads": (4, 2), "gated": True, "position": "rotary"}, {"attn_only": True}])
def test_each_writers_scores_add_up_to_its_whole_effect_as_steps_grow(shape):
    model = random_model(shape, scale=0.4)
    task = random_task(model)
    want = total_effects(model, task)

    def gap(steps):
        scores = ck.score(model, task, METHOD, steps=steps, rule="gauss-legendre", progress=False)
        return float((scores.values.sum(1) - want).abs().max())

    assert gap(160) < 1e-5 < gap(4)


@every_family
def test_each_writers_scores_add_up_in_every_family(family):
    """Also behind post-norms, in parallel blocks and under grouped queries."""
    model = ck.load(build(family))
    task = random_task(model, n=2)
    want = total_effects(model, task)
    scores = ck.score(model, task, METHOD, steps=40, rule="gauss-legendre", progress=False)
    torch.testing.assert_close(scores.values.sum(1).double(), want, rtol=0, atol=2e-3 * float(want.abs().max()))


def test_where_the_model_is_linear_it_equals_eap():
    model = random_model(linear=True)
    task = random_task(model)
    paths, eap = (ck.score(model, task, name, progress=False).values for name in (METHOD, "eap"))
    torch.testing.assert_close(paths, eap)
    assert torch.count_nonzero(eap) > 0


def test_a_bfloat16_model_scores_nearly_as_the_same_weights_do_in_float32():
    narrow, wide = ck.load(build("Llama", dtype=torch.bfloat16)), ck.load(build("Llama", dtype=torch.bfloat16).float())
    task = random_task(narrow, n=4)
    got, want = (ck.score(m, task, METHOD, progress=False).values[narrow.graph.mask] for m in (narrow, wide))
    assert got.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "got steps = 0"),
        ({"steps": 2.0}, "got steps = 2.0"),
        ({"rule": "simpson"}, "got rule = 'simpson'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    model = random_model()
    with pytest.raises(OptionError, match=message):
        ck.score(model, random_task(model), METHOD, progress=False, **options)


def test_a_metric_without_a_gradient_is_refused():
    model = random_model()
    with pytest.raises(MetricError, match="no useful gradient"):
        ck.score(model, random_task(model).with_metric("accuracy"), METHOD, progress=False)
