"""Stability: resampling by hand, seeds, Jaccard indices, frequencies."""

from dataclasses import replace

import pytest
import torch

import circuitkit as ck
from circuitkit.comparisons import Stability
from circuitkit.errors import OptionError, UnknownName
from circuitkit.evaluation.resampling import resampled
from circuitkit.evaluation.stability import cut, jaccard, stability
from circuitkit.functional.significance import expected_jaccard
from circuitkit.methods.base import score
from tests.toys import random_model, random_task


def test_a_resampled_task_scores_as_the_weighted_mean_of_its_examples():
    model = random_model()
    task = random_task(model, n=4)
    index = torch.tensor([2, 0, 2, 3])
    single = [score(model, resampled(task, torch.tensor([i])), "exact", progress=False).values for i in range(4)]
    got = score(model, resampled(task, index), "exact", progress=False).values
    torch.testing.assert_close(got, torch.stack([single[i] for i in index.tolist()]).mean(0), rtol=1e-5, atol=1e-7)


def test_resampling_crosses_batches():
    task = random_task(random_model(), n=4)
    first, second = task.batches[0].rows(slice(0, 3)), task.batches[0].rows(slice(3, 4))
    again = resampled(replace(task, batches=(first, second)), torch.tensor([3, 1, 1]))
    assert [len(batch) for batch in again.batches] == [2, 1]
    assert torch.equal(again.batches[1].clean[0], task.batches[0].clean[3])
    assert len(resampled(replace(task, batches=(first, second)), torch.tensor([0, 2])).batches) == 1


def test_jaccard_by_hand():
    a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    assert (jaccard(a, b), jaccard(a, a), jaccard(a & ~a, b & ~b)) == (1 / 3, 1.0, 1.0)


def test_bootstrap_by_loops():
    model = random_model(seed=7)
    task = random_task(model, n=6)
    found = stability(model, task, "eap", edges=8, times=4, seed=5, progress=False)
    draw = torch.Generator().manual_seed(5)
    circuits = []
    for _ in range(4):
        again = resampled(task, torch.randint(6, (6,), generator=draw))
        circuits.append(set(cut(score(model, again, "eap", progress=False), 8).edge_names()))
    pairs = [len(a & b) / len(a | b) for i, a in enumerate(circuits) for b in circuits[:i]]
    assert found.jaccard == pytest.approx(sum(pairs) / 6)
    assert found.jaccard_quantiles[1] == pytest.approx(float(torch.tensor(pairs).quantile(0.5)))
    reference = set(cut(score(model, task, "eap", progress=False), 8).edge_names())
    assert found.reference_jaccard == pytest.approx(sum(len(a & reference) / len(a | reference) for a in circuits) / 4)
    for name, share, inside in zip(found.edges, found.frequency, found.in_reference, strict=True):
        assert share == pytest.approx(sum(name in circuit for circuit in circuits) / 4)
        assert inside == (name in reference)
    assert set(found.edges) == set().union(*circuits)
    assert set(found.core(1.0)) == set.intersection(*circuits)


def test_what_varies():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=16)
    same = stability(model, task, "exact", edges=3, times=3, vary="method-seed", progress=False)
    assert (same.jaccard, same.reference_jaccard) == (1.0, 1.0)
    assert same.chance == pytest.approx(expected_jaccard(12, 3, 3))
    fresh = stability(model, task, "exact", edges=3, times=3, vary="task-seed", progress=False)
    assert set(fresh.edges) == set(task.known)
    seeds = []

    def make(seed):
        seeds.append(seed)
        return ck.task("induction-letters", model, n=4, seed=seed)

    stability(model, task, "exact", edges=3, times=2, vary="task-seed", fresh=make, seed=10, progress=False)
    assert seeds == [11, 12]


def test_the_file_and_the_figure():
    model = random_model()
    found = stability(model, random_task(model, n=5), "eap", edges=6, times=3, progress=False)
    assert Stability.from_json(found.to_json()) == found
    figure = found.plot()
    assert sum(len(trace.x) for trace in figure.data) == len(found.edges)
    assert f"{found.jaccard:.2f}" in figure.layout.title.text


def test_what_is_refused():
    model = random_model()
    task = random_task(model, n=5)
    with pytest.raises(OptionError, match="times = 1"):
        stability(model, task, "eap", edges=3, times=1)
    with pytest.raises(OptionError, match="vary = 'seed'"):
        stability(model, task, "eap", edges=3, vary="seed")
    with pytest.raises(OptionError, match="at least 2"):
        stability(model, random_task(model, n=1), "eap", edges=3)
    with pytest.raises(OptionError, match="give fresh"):
        stability(model, task, "eap", edges=3, vary="task-seed")
    with pytest.raises(OptionError, match="n = 0"):
        stability(model, task, "eap", edges=0, progress=False)
    with pytest.raises(UnknownName):
        stability(model, task, "eapp", edges=3)
