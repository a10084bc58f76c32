"""The bound on what a ranking may have missed: how often it holds, and a planted node that gradients miss."""

import pytest
import torch

import circuitkit as ck
from circuitkit.errors import OptionError
from circuitkit.evaluation.missed import missed_effect, random_subsets, student_quantile, subset_bounds
from tests import planted
from tests.toys import random_model, random_task

SAME = (["A", "B", "ask A"], ["A", "B", "ask B"])


def missed(model, task, scores, **options):
    return missed_effect(model, task, scores, progress=False, **options)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_bound_covers_the_largest_effect_as_often_as_it_says(share):
    hits, own, loose, times = 0, 0, 0.0, 300
    for seed in range(times):
        generator = torch.Generator().manual_seed(seed)
        effects = torch.randn(12, generator=generator).double()
        inside = random_subsets(12, 120, round(120 * share), generator)
        assert (inside.sum(0) == round(120 * share)).all()
        _, bounds = subset_bounds(inside.double() @ effects, inside, 0.9)
        largest = int(effects.abs().argmax())
        hits += bool(bounds.max() >= effects.abs().max())
        own += bool(bounds[largest] >= effects[largest].abs())
        loose += float(bounds.max() / effects.abs().max()) / times
    assert own / times > 0.87 and hits >= own
    assert loose < 1.6


def test_estimates_are_centred_on_the_effects():
    effects = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    found = []
    for seed in range(200):
        inside = random_subsets(4, 50, 20, torch.Generator().manual_seed(seed))
        found.append(subset_bounds(inside.double() @ effects, inside, 0.95)[0])
    torch.testing.assert_close(torch.stack(found).mean(0), effects, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("confidence", "degrees", "value"), [(0.95, 9, 1.8331), (0.99, 9, 2.8214), (0.95, 60, 1.6706), (0.5, 20, 0.0)]
)
def test_quantiles_are_those_of_the_tables(confidence, degrees, value):
    got = student_quantile(confidence, torch.tensor([float(degrees)]).double())
    assert float(got) == pytest.approx(value, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("ranking", ["atp", "atp-star"])
def test_a_node_behind_a_dead_unit_is_missed_by_gradients_and_bounded(ranking):
    model, task = planted.dead_relu(), planted.pairs(*SAME)
    scores = ck.score(model, task, ranking, progress=False)
    exact = ck.score(model, task, "activation-patching", site="head", per_position=False, progress=False).values
    assert exact[0].tolist() == pytest.approx([0.2, 0.4, 0.6, 2.5], abs=1e-4)
    assert scores.values[0].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.0], abs=1e-4)
    found = missed(model, task, scores, verified=1)
    assert 2.5 <= found.bound < 3 and found.suspect == "a0.h3"
    assert "a0.h3" in repr(found) and found.nodes[:3] == ("a0.h0", "a0.h1", "a0.h3")
    harmless = planted.dead_relu(gain=0.0)
    nothing = missed(harmless, task, ck.score(harmless, task, ranking, progress=False), verified=1)
    assert 0.4 <= nothing.bound < 0.6


def test_subsets_are_patched_as_activation_patching_patches_single_nodes():
    """With one node left, the joint effect is that node's own, so the bound is exact."""
    model = random_model(heads=(4, 4), n_layers=1)
    task = random_task(model, n=3, lengths=torch.tensor([6, 4, 6]))
    for site in ("head", "q", "v", "pattern"):
        exact = ck.score(model, task, "activation-patching", site=site, per_position=False, progress=False)
        found = missed(model, task, exact, verified=3)
        weakest = float(exact.values.flatten()[exact.values.abs().argmin()])
        assert float(found.estimates) == pytest.approx(weakest, rel=1e-5, abs=1e-7)
        assert found.bound == pytest.approx(abs(weakest), rel=1e-5, abs=1e-7)


def test_the_seed_decides_and_the_batch_size_does_not():
    model = random_model(heads=(4, 4))
    task = random_task(model, n=5)
    scores = ck.score(model, task, "atp-star", progress=False)
    first, again, other = (missed(model, task, scores, verified=2, **o) for o in ({}, {"batch_size": 2}, {"seed": 1}))
    torch.testing.assert_close(first.bounds, again.bounds, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(first.bounds, other.bounds, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verified": 8}, "less than all 8"),
        ({"verified": 1, "subsets": 20}, "in and out of 10 subsets"),
        ({"verified": 1, "share": 1.0}, "in and out of 10 subsets"),
        ({"verified": 1, "confidence": 95}, "between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    model = random_model(heads=(4, 4))
    task = random_task(model)
    with pytest.raises(OptionError, match=message):
        missed(model, task, ck.score(model, task, "atp", progress=False), **options)


def test_tables_by_position_and_of_the_stream_are_refused():
    model = random_model()
    task = random_task(model)
    for options in ({"per_position": True}, {"site": "resid"}):
        with pytest.raises(OptionError, match="expected a table of single components"):
            missed(model, task, ck.score(model, task, "atp", progress=False, **options), verified=1)
