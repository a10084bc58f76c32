"""ACDC against itself with one whole run per edge, and what its circuit promises."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.errors import OptionError, UnknownName
from circuitkit.methods.base import fidelity, with_reference
from circuitkit.models.circuits import run_circuits
from circuitkit.models.removals import Removals
from tests.families import build, every_family
from tests.oracles.sequential import literal_acdc
from tests.toys import SHAPES, random_model, random_task

WIDTHS = [1, 2, 7, "auto"]


def acdc(model, task, tau, **options):
    return ck.score(model, task, "acdc", **{"tau": tau, "objective": "task", "progress": False} | options)


def run_metric(model, task, keep):
    """The metric of one circuit on the first batch, from a run of all its blocks."""
    batch = task.batches[0]
    with torch.no_grad(), model.quiet():
        run, corrupt = model.record(batch.clean), model.record(batch.corrupt)
        logits = run_circuits(model, run, corrupt.writes, keep[None], batch.positions)[0]
        return task.metric(logits, with_reference(model, task, batch, run))


@given(
    shape=SHAPES,
    tau=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    order=st.sampled_from(["reverse", "forward"]),
    magnitude=st.booleans(),
)
@settings(max_examples=5, deadline=None)
def test_the_same_edges_as_one_after_the_other_whatever_the_width(shape, tau, order, magnitude):
    model = random_model(shape | {"n_layers": min(2, shape["n_layers"])})
    task = random_task(model, n=2)
    want, effects = literal_acdc(model, task, tau, order=order, magnitude=magnitude)
    tested_by_hand = effects[model.graph.mask]
    size = (tested_by_hand.abs() if magnitude else tested_by_hand) - tau
    # At tau = 0 edges without any effect may go either way, and are dropped without a test.
    assume(tau > 0 or bool((effects[want].abs() > 1e-9).all()))
    assume(float(size[tested_by_hand.abs() > 1e-12].abs().min()) > 1e-9)
    for width in WIDTHS:
        scores = acdc(model, task, tau, order=order, magnitude=magnitude, width=width)
        assert torch.equal(scores.selected, want)
        # Edges that were not tested have no effect; the others have that of their test.
        torch.testing.assert_close(scores.values.double(), effects, rtol=1e-5, atol=1e-7)


@every_family
def test_the_same_edges_in_every_family(family):
    model = ck.load(build(family))
    task = random_task(model, n=2)
    tau = 0.02 * float(run_metric(model, task.with_metric("kl"), torch.zeros_like(model.graph.mask)).abs().mean())
    want, effects = literal_acdc(model, task.with_metric("kl"), tau, measure=run_metric)
    scores = acdc(model, task, tau, objective=None)
    torch.testing.assert_close(scores.values.double(), effects, rtol=1e-3, atol=1e-5)
    assert torch.equal(scores.selected, want)
    assert 0 < int(want.sum()) < model.graph.n_edges


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"budget": "1KiB"}, {"order": "random", "batch_size": 2}])
def test_cutting_the_work_changes_nothing(options):
    model = random_model(heads=(4, 2))
    task = random_task(model, n=5)
    some = {key: value for key, value in options.items() if key == "order"}
    whole, cut = acdc(model, task, 0.05, width=1, **some), acdc(model, task, 0.05, **options)
    assert torch.equal(cut.selected, whole.selected)
    torch.testing.assert_close(cut.values, whole.values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(cut.stderr, whole.stderr, rtol=1e-5, atol=1e-7)
    assert cut.provenance["evaluations"] == whole.provenance["evaluations"]


def test_several_batches_and_their_order_change_nothing():
    model = random_model()
    task = random_task(model, n=5, lengths=torch.tensor([6, 3, 5, 6, 4]))
    (batch,) = task.batches
    parts = (batch.rows(torch.tensor([4, 1, 0])), batch.rows(torch.tensor([2, 3])))
    whole, split = (acdc(model, t, 0.03) for t in (task, replace(task, batches=parts)))
    assert torch.equal(whole.selected, split.selected)
    torch.testing.assert_close(whole.values, split.values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(whole.stderr, split.stderr, rtol=1e-5, atol=1e-7)


def test_a_random_order_is_the_seed_s():
    model = random_model(heads=(4, 4))
    task = random_task(model)
    first, same, other = (acdc(model, task, 0.05, order="random", seed=seed).values for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_what_is_kept_met_the_threshold_and_what_was_dropped_did_not():
    model = random_model(n_layers=3)
    task = random_task(model, n=8)
    scores = acdc(model, task, 0.05)
    mask = model.graph.mask
    assert (scores.values[scores.selected] >= 0.05).all() and (scores.values[mask & ~scores.selected] < 0.05).all()
    whole, left = (float(run_metric(model, task, keep).double().mean()) for keep in (mask, scores.selected))
    assert whole - left < 0.05 * scores.provenance["drops"]
    assert (scores.stderr[scores.values != 0] > 0).all() and not scores.stderr[scores.values == 0].any()
    kept_either_way = acdc(model, task, 0.05, magnitude=True)
    assert (kept_either_way.values[kept_either_way.selected].abs() >= 0.05).all()
    assert (kept_either_way.values[kept_either_way.selected] < 0).any()


def test_edges_that_lead_nowhere_or_carry_nothing_are_dropped_without_a_run():
    model = random_model(heads=(2, 2))
    for head in (0, 1):
        model.module.blocks[1].attn.W_O.data[head] = 0.0
    task = random_task(model)
    scores = acdc(model, task, 0.01)
    graph = model.graph
    into_dead = [v for v, node in enumerate(graph.destination_nodes) if node.layer == 1 and node.kind == "head"]
    assert not scores.selected[:, into_dead].any() and not scores.values[:, into_dead].any()
    alive = graph.mask.clone()
    alive[:, into_dead] = False
    assert scores.provenance["evaluations"] <= int(alive.sum())
    same = replace(task, batches=tuple(replace(b, corrupt=b.clean) for b in task.batches))
    nothing = acdc(model, same, 0.01)
    assert not nothing.selected.any() and nothing.provenance["evaluations"] == 0


def test_few_circuits_are_run_for_nothing():
    model = random_model(n_layers=3, heads=(4, 4))
    task = random_task(model, n=4)
    for tau in (0.02, 0.2):
        for width in (8, "auto"):
            counts = acdc(model, task, tau, width=width, objective=None).provenance
            stages = 2 * 3 + 1
            assert counts["circuits_run"] <= 2 * counts["evaluations"] + stages
        one = acdc(model, task, tau, width=1, objective=None).provenance
        assert one["circuits_run"] <= one["evaluations"] + stages
        assert one["evaluations"] == counts["evaluations"]


def test_the_known_circuit_of_the_induction_model_is_found():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=32)
    circuit = ck.find(model, task, method="acdc", tau=0.1, progress=False)
    assert set(circuit.edge_names()) == set(task.known)
    assert circuit.meta["selection"] == "own" and circuit.result.faithfulness > 0.9


@pytest.mark.parametrize(("name", "kept"), [("hist", 6), ("frac_prevs", 5)])
def test_compiled_circuits_are_found_edge_by_edge_under_zero_ablation(name, kept):
    """Edges of a compiled program that is known, judged by tokens and by numbers."""
    model = ck.load(f"tracr/{name}")
    task = ck.task("tracr", model, n=32, seed=0)
    scores = ck.score(model, task, "acdc", tau=1e-3, corrupt_value="zero", progress=False)
    found = set(scores.own().edge_names())
    assert found == set(task.known) and len(found) == kept


def test_when_memory_runs_out_less_is_done_at_a_time(monkeypatch):
    model = random_model()
    task = random_task(model)
    want = acdc(model, task, 0.05)
    run, sizes = Removals.logits, []

    def tight(self, keep, columns):
        sizes.append(len(keep))
        if len(keep) > 2:
            raise torch.OutOfMemoryError("more than two circuits do not fit")
        return run(self, keep, columns)

    monkeypatch.setattr(Removals, "logits", tight)
    got = acdc(model, task, 0.05)
    assert max(sizes) > 2 and torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.values, want.values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": -0.1}, OptionError, "got tau = -0.1"),
        ({"tau": math.nan}, OptionError, "got tau = nan"),
        ({"tau": math.inf}, OptionError, "got tau = inf"),
        ({"width": 0}, OptionError, "got width = 0"),
        ({"order": "sideways"}, OptionError, "order"),
        ({"corrupt_value": "mode"}, OptionError, "expected one of counterfactual"),
        ({"objective": "kll"}, UnknownName, "kll"),
    ],
)
@pytest.mark.parametrize("method", ["acdc", "group-testing"])
def test_options_out_of_range_are_refused(method, options, error, message):
    if method == "group-testing" and "order" in options:
        message = "has no option 'order'"
    model = random_model()
    with pytest.raises(error, match=message):
        ck.score(model, random_task(model), method, progress=False, **options)


def test_the_default_judge_is_the_divergence_from_the_model():
    model = random_model()
    task = random_task(model)
    by_default, named = acdc(model, task, 0.02, objective=None), acdc(model, task, 0.02, objective="kl")
    assert torch.equal(by_default.selected, named.selected) and torch.equal(by_default.values, named.values)
    assert not torch.equal(by_default.values, acdc(model, task, 0.02).values)
    judged = fidelity(task, None)
    assert float(run_metric(model, judged, model.graph.mask).abs().max()) < 1e-9
