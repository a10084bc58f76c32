"""Laws that every registered method of edge level obeys, on tiny random transformers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.errors import MetricError
from circuitkit.functional.attribution import QUADRATURES, quadrature
from circuitkit.functional.metrics import METRICS, Metric
from circuitkit.methods.base import edge_methods
from circuitkit.methods.base import score as plain_score
from circuitkit.tasks.base import Task
from tests.laws.exceptions import EXCEPTIONS, OPTIONS
from tests.oracles.literal import literal_exact, literal_gradient
from tests.toys import SHAPES, random_model, random_task

METHODS = edge_methods()
GRADIENT = {
    "eap": quadrature("left", 1),
    "eap-ig": quadrature("midpoint", 5),
    "clean-corrupted": ([0.0, 1.0], [0.5, 0.5]),
}
GRADIENT["eap"] = ([1.0], [1.0])
few = settings(max_examples=8, deadline=None)


def score(model, task, name, **options):
    """The method with the options that make it quick here."""
    return plain_score(model, task, name, **{**OPTIONS.get(name, {}), **options})


def bound_by(law):
    """The methods that a law is tested on: all but those listed with a reason."""
    return pytest.mark.parametrize("name", [name for name in METHODS if name not in EXCEPTIONS[law]])


def test_exceptions_name_methods_and_say_why():
    for law, methods in EXCEPTIONS.items():
        assert set(methods) <= set(METHODS), f"{law}: {sorted(set(methods) - set(METHODS))} are no edge methods"
        assert all(len(reason) > 20 for reason in methods.values()), law


def assert_close(got, want, rtol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=rtol * max(1e-3, float(want.abs().max())))


@bound_by("identical pairs score zero")
@given(shape=SHAPES)
@few
def test_identical_pairs_score_exactly_zero(name, shape):
    model = random_model(shape)
    scores = score(model, random_task(model, same=True), name, progress=False)
    assert torch.count_nonzero(scores.values) == 0
    assert scores.stderr is None or torch.count_nonzero(scores.stderr) == 0


@pytest.mark.parametrize("name", METHODS)
@given(shape=SHAPES)
@few
def test_impossible_edges_score_zero_and_some_possible_one_does_not(name, shape):
    model = random_model(shape)
    scores = score(model, random_task(model), name, progress=False)
    assert torch.count_nonzero(scores.values[~scores.graph.mask]) == 0
    assert scores.selected is None or not scores.selected[~scores.graph.mask].any()
    if name not in EXCEPTIONS["some possible edge scores"]:
        assert torch.count_nonzero(scores.values) > 0


@bound_by("scores scale with the metric")
@given(shape=SHAPES, factor=st.sampled_from([-2.0, 0.5, 100.0]))
@few
def test_scores_scale_with_the_metric(name, shape, factor):
    model, base = random_model(shape), METRICS["logit-diff"]
    task = random_task(model)
    scaled = replace(task, metric=Metric("scaled", lambda x, b: factor * base.function(x, b), base.needs))
    got = score(model, scaled, name, progress=False).values
    assert_close(got, factor * score(model, task, name, progress=False).values)


@bound_by("cutting the work changes nothing")
@given(shape=SHAPES, size=st.integers(1, 4))
@few
def test_batch_size_and_budget_change_nothing(name, shape, size):
    model = random_model(shape)
    task = random_task(model, n=5)
    whole = score(model, task, name, progress=False)
    for other in (
        score(model, task, name, batch_size=size, progress=False),
        score(model, task, name, budget="1KiB", progress=False),
    ):
        assert_same_scores(other, whole)


@bound_by("order changes nothing")
@given(shape=SHAPES)
@few
def test_the_order_of_examples_and_batches_changes_nothing(name, shape):
    model = random_model(shape)
    task = random_task(model, n=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = replace(task, batches=(task.batches[0].rows(order[:2]), task.batches[0].rows(order[2:])))
    assert_same_scores(score(model, shuffled, name, progress=False), score(model, task, name, progress=False))


def assert_same_scores(got, want):
    assert_close(got.values, want.values)
    assert (got.stderr is None) == (want.stderr is None)
    if want.stderr is not None:
        assert_close(got.stderr, want.stderr, 1e-5)
    assert got.n_examples == 5


@bound_by("padding changes nothing")
@given(shape=SHAPES)
@few
def test_padding_of_a_causal_model_changes_nothing(name, shape):
    model = random_model(shape, causal=True)
    lengths = torch.tensor([6, 3, 4, 6])
    padded = random_task(model, lengths=lengths)
    alone = [_only(padded, i, int(n)) for i, n in enumerate(lengths)]
    got = score(model, padded, name, progress=False).values
    want = torch.stack([score(model, t, name, progress=False).values for t in alone]).double().mean(0)
    assert_close(got, want)


def _only(task, i, length):
    batch = task.batches[0].rows(torch.tensor([i]))
    batch = replace(batch, clean=batch.clean[:, :length], corrupt=batch.corrupt[:, :length])
    return replace(task, batches=(batch,))


@bound_by("exact where the model is linear")
@given(seed=st.integers(0, 99), causal=st.booleans(), layers=st.integers(1, 3))
@few
def test_every_method_is_exact_where_the_model_is_linear(name, seed, causal, layers):
    model = random_model(linear=True, seed=seed, causal=causal, n_layers=layers)
    task = random_task(model, seed=seed)
    assert_close(score(model, task, name, progress=False).values, literal_exact(model, task))


@given(shape=SHAPES)
@few
def test_exact_equals_patching_one_edge_at_a_time(shape):
    model = random_model(shape)
    task = random_task(model, n=2)
    assert_close(score(model, task, "exact", progress=False).values, literal_exact(model, task))


@pytest.mark.parametrize("name", sorted(GRADIENT))
@given(shape=SHAPES)
@few
def test_gradient_methods_equal_autograd_on_split_readers(name, shape):
    model = random_model(shape)
    task = random_task(model, n=2)
    assert_close(score(model, task, name, progress=False).values, literal_gradient(model, task, *GRADIENT[name]))


def test_quadratures_approach_one_limit_and_the_default_does_so_faster_than_left():
    model = random_model(norm=None, scale=0.25)  # gentle weights, so that the integrand is smooth
    task = random_task(model)

    def scores(rule, steps):
        return score(model, task, "eap-ig", steps=steps, rule=rule, progress=False).values

    limit = scores("gauss-legendre", 40)
    error = {(rule, n): float((scores(rule, n) - limit).abs().max()) for rule in QUADRATURES for n in (4, 16)}
    for rule in QUADRATURES:
        assert error[rule, 16] < error[rule, 4] / 2 or error[rule, 4] < 1e-6
    assert error["midpoint", 4] < error["left", 4] / 4
    assert error["gauss-legendre", 4] < error["midpoint", 4]


@pytest.mark.parametrize("value", ["mean", "zero", "position-mean"])
def test_corrupt_values_are_used_by_every_method(value):
    model = random_model(linear=True)
    task = random_task(model)
    exact = score(model, task, "exact", corrupt_value=value, progress=False).values
    for name in GRADIENT:
        assert_close(score(model, task, name, corrupt_value=value, progress=False).values, exact)
    assert not torch.allclose(exact, score(model, task, "exact", progress=False).values)


def test_mean_ablation_is_the_mean_over_examples_and_real_positions():
    model = random_model(linear=True, n_layers=1)
    lengths = torch.tensor([6, 3, 4, 6])
    task = random_task(model, lengths=lengths)
    batch = task.batches[0]
    rows = [model.record(batch.clean[i : i + 1, :n]).writes[0][0, :, 0] for i, n in enumerate(lengths)]
    mean = torch.cat(rows).mean(0)
    unembed = model.module.unembed.W_U
    want = torch.stack(
        [(rows[i][-1] - mean) @ (unembed[:, batch.right[i, 0, 0]] - unembed[:, batch.wrong[i, 0, 0]]) for i in range(4)]
    )
    scores = score(model, task, "exact", corrupt_value="mean", progress=False)
    row, column = model.graph.edge("input->logits")
    assert float(scores.values[row, column]) == pytest.approx(float(want.detach().mean()), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_found(name, fails):
    if fails and name in EXCEPTIONS["a broken metric is refused"]:
        return
    model = random_model()
    task = random_task(model)
    seen = []
    hook = model.module.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model.module.train()
    model.module.blocks[1].eval()
    model.module.blocks[0].attn.W_Q.requires_grad_(False)
    before = _state(model.module)
    if fails:
        task = replace(task, metric=Metric("broken", lambda x, b: x.sum(), ("right",)))
        with pytest.raises(MetricError, match="one number per example"):
            score(model, task, name, progress=False)
    else:
        score(model, task, name, progress=False)
    assert _state(model.module) == before
    assert seen, "the user's own hook must keep running"
    hook.remove()


def _state(module):
    return (
        [m.training for m in module.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in module.modules()],
        [(p.requires_grad, p.grad is None, p.dtype, p._version, float(p.detach().sum())) for p in module.parameters()],
        torch.random.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("name", sorted(GRADIENT))
def test_each_readers_scores_add_up_to_its_total_difference_times_its_gradient(name):
    """Summed over writers, a reader's scores are <x(clean) - x(corrupt), gradient>: nothing is lost on the way."""
    model = random_model(heads=(4, 2), gated=True, position="rotary")
    task = random_task(model)
    scores = score(model, task, name, progress=False).values.double()
    batch = task.batches[0]
    streams = [model.record(side).inputs[-1] for side in (batch.clean, batch.corrupt)]
    change = (streams[0] - streams[1]).requires_grad_(False)
    alphas, weights = GRADIENT[name]
    ends = [model.record(side).inputs[0] for side in (batch.clean, batch.corrupt)]
    gradient = torch.zeros_like(change)
    for alpha, weight in zip(alphas, weights, strict=True):
        x = ends[1] + alpha * (ends[0] - ends[1])
        last = model.replay(model.record(batch.clean), 0, x, torch.arange(len(batch))).detach().requires_grad_()
        value = task.metric(model.logits(last, batch.positions), batch).sum()
        gradient += weight * torch.autograd.grad(value, last)[0]
    want = (change * gradient).sum() / len(batch)
    assert float(scores[:, -1].sum()) == pytest.approx(float(want), rel=1e-5)


def test_plain_eap_refuses_a_metric_that_is_flat_at_the_clean_run():
    model = random_model()
    task = random_task(model).with_metric("kl")
    with pytest.raises(MetricError, match="gradient of 'kl' at the clean run is zero"):
        score(model, task, "eap", progress=False)
    assert torch.count_nonzero(score(model, task, "eap-ig", progress=False).values) > 0
    assert float(score(model, task, "exact", progress=False).values.min()) >= -1e-6, "KL never falls below zero"


def test_a_metric_without_a_gradient_is_refused_by_gradient_methods_only():
    model = random_model()
    task = random_task(model).with_metric("accuracy")
    for name in GRADIENT:
        with pytest.raises(MetricError, match="no useful gradient"):
            score(model, task, name, progress=False)
    assert score(model, task, "exact", progress=False).values.isfinite().all()


def test_batch_metrics_and_infinite_metrics_are_refused():
    model = random_model()
    task: Task = random_task(model)
    infinite = replace(task, metric=Metric("infinite", lambda x, b: x[:, 0, 0] / 0, ("right",)))
    with pytest.raises(MetricError, match="not finite on examples"):
        score(model, infinite, "exact", progress=False)


def test_one_flat_example_does_not_make_the_answer_depend_on_the_batch_size():
    """A saturated example alone in its chunk has no gradient; the task as a whole has one."""
    model = random_model()
    task = random_task(model)
    base, first = METRICS["logit-diff"], task.batches[0].clean[0]

    def partly_flat(logits, batch):
        values = base.function(logits, batch)
        return torch.where((batch.clean == first).all(1), values.detach(), values)

    task = replace(task, metric=Metric("partly-flat", partly_flat, base.needs))
    whole, single = (score(model, task, "eap", batch_size=n, progress=False).values for n in (4, 1))
    assert_close(single, whole)
    assert torch.count_nonzero(whole) > 0
