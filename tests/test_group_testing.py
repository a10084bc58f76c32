"""Group testing against itself with one whole run per test, what it promises, what it costs and where it fails."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.methods.base import fidelity
from circuitkit.testing import tiny_model
from tests.oracles.sequential import literal_group_testing
from tests.test_acdc import run_metric
from tests.toys import SHAPES, random_model, random_task


def group_testing(model, task, tau, **options):
    return ck.score(model, task, "group-testing", **{"tau": tau, "objective": "task", "progress": False} | options)


def sparse_model(important):
    """Six layers of eight heads of which only the named ones write anything to speak of."""
    model = tiny_model(n_layers=6, n_heads=8, attn_only=True)
    for layer, block in enumerate(model.module.blocks):
        for head in range(8):
            block.attn.W_O.data[head] *= 3.0 if (layer, head) in important else 1e-4
    return model


@given(shape=SHAPES, tau=st.sampled_from([0.02, 0.1]))
@settings(max_examples=5, deadline=None)
def test_the_same_edges_and_tests_as_one_after_the_other_whatever_the_width(shape, tau):
    model = random_model(shape | {"n_layers": min(2, shape["n_layers"])})
    task = random_task(model, n=2)
    want, tests = literal_group_testing(model, task, tau)
    for width in (1, 5, "auto"):
        scores = group_testing(model, task, tau, width=width)
        assert torch.equal(scores.selected, want)
        assert scores.provenance["evaluations"] == tests


@given(seed=st.integers(0, 99), tau=st.sampled_from([0.005, 0.05, 0.5]))
@settings(max_examples=5, deadline=None)
def test_kept_edges_met_the_threshold_and_the_whole_fall_is_bounded_by_the_drops(seed, tau):
    model = random_model(n_layers=3, seed=seed)
    task = random_task(model, seed=seed)
    scores = group_testing(model, task, tau, objective=None)
    assert (scores.values[scores.selected] >= tau).all()
    judged = fidelity(task, None)
    whole, left = (float(run_metric(model, judged, m).double().mean()) for m in (model.graph.mask, scores.selected))
    assert whole - left < tau * scores.provenance["drops"] + 1e-9
    assume(scores.selected.any())
    assert scores.provenance["drops"] <= int((model.graph.mask & ~scores.selected).sum())


def test_few_runs_find_a_small_circuit_in_a_large_graph():
    model = sparse_model({(1, 6), (4, 3)})
    task = random_task(model, n=8)
    whole = float(run_metric(model, fidelity(task, None), torch.zeros_like(model.graph.mask)).abs().mean())
    tau = 0.03 * whole
    groups = group_testing(model, task, tau, objective=None)
    each = ck.score(model, task, "acdc", tau=tau, progress=False)
    assert torch.equal(groups.selected, each.selected)
    kept, counts = int(groups.selected.sum()), groups.provenance["evaluations"]
    tested = each.provenance["evaluations"]
    assert kept >= 3
    assert counts < tested / 2.5
    # At most about twice k log2(E / k), and one test for each stage.
    assert counts <= 2 * kept * (math.log2(tested / kept) + 1) + 7


def test_many_runs_are_needed_where_every_edge_matters():
    model = random_model(n_layers=1)
    task = random_task(model)
    scores = group_testing(model, task, 1e-7, magnitude=True)
    edges = int((scores.values != 0).sum())
    assert edges == int(scores.selected.sum())
    assert edges <= scores.provenance["evaluations"] <= 2 * edges


def test_edges_that_cancel_in_a_group_are_dropped_together():
    """The failure that its page warns of: two edges of opposite effect, each of them above tau."""
    model = random_model(linear=True, n_layers=1, heads=(2, 2))
    task = random_task(model)

    def into_logits(method, **options):
        scores = ck.score(model, task, method, progress=False, **options)
        rows = [model.graph.sources.index(f"a0.h{i}") for i in (0, 1)]
        return (scores.values if method == "exact" else scores.selected)[rows, -1]

    first, second = into_logits("exact").tolist()
    model.module.blocks[0].attn.W_O.data[0] *= -second / first
    assert into_logits("exact").tolist() == pytest.approx([-second, second])
    options = {"objective": "task", "magnitude": True, "tau": abs(second) / 2}
    assert into_logits("acdc", **options).all()
    assert not into_logits("group-testing", **options).any()


@pytest.mark.parametrize("name", ["hist", "reverse"])
def test_compiled_circuits_are_found(name):
    model = ck.load(f"tracr/{name}")
    task = ck.task("tracr", model, n=32, seed=0)
    groups, each = (
        ck.score(model, task, method, tau=1e-3, corrupt_value="zero", progress=False).own()
        for method in ("group-testing", "acdc")
    )
    assert set(groups.edge_names()) <= set(task.known)
    assert set(groups.edge_names()) == set(each.edge_names())


def test_scores_are_of_edges_that_were_tested_alone():
    model = random_model(n_layers=2, heads=(4, 4))
    scores = group_testing(model, random_task(model), 0.05, objective=None)
    alone = scores.values != 0
    assert bool((scores.selected <= alone).all())
    assert int(alone.sum()) < int(model.graph.mask.sum()) / 2
    assert (scores.stderr[~alone] == 0).all()
