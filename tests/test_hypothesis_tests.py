"""Shi et al.'s tests keep their level where the hypothesis holds, and see a planted violation."""

import pytest
import torch

import circuitkit as ck
from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.hypothesis_tests import (
    equivalence_of,
    equivalence_test,
    independence_test,
    minimality_of,
    minimality_test,
)
from circuitkit.measures import HypothesisTest
from tests.oracles.literal import literal_circuit
from tests.test_completeness import random_circuit
from tests.toys import random_model, random_task

EVERY = pytest.mark.parametrize("test", [equivalence_test, independence_test, minimality_test])


def share_rejected(trial, times):
    draw = torch.Generator().manual_seed(0)
    return sum(trial(draw).rejected for _ in range(times)) / times


def test_equivalence_keeps_its_level_at_the_edge_of_the_margin_and_sees_a_worse_circuit():
    def trial(chance):
        def run(draw):
            wins = torch.rand(100, generator=draw) < chance
            return equivalence_of(torch.zeros(100), torch.where(wins, 1.0, -1.0), margin=0.1, alpha=0.05)

        return run

    assert 0.02 < share_rejected(trial(0.6), 1000) < 0.07
    assert share_rejected(trial(0.5), 500) < 0.01
    assert share_rejected(trial(0.85), 200) > 0.95


def test_ties_are_no_win_for_either_side():
    model = torch.arange(1.0, 11.0)
    same = equivalence_of(model, model * (1 + 1e-8), margin=0.0, alpha=0.05)
    assert (same.statistic, same.p_value, same.details["ties"]) == (0.5, 1.0, 10.0)
    worse = equivalence_of(model, model - 1, margin=0.0, alpha=0.05)
    assert (worse.statistic, worse.p_value) == (0.0, pytest.approx(2 / 1024))
    assert worse.rejected and "0 of 10" in worse.sentence


def test_minimality_keeps_its_level_over_all_edges_and_sees_a_useless_one():
    names = [f"e{i}" for i in range(20)]

    def trial(effects):
        def run(draw):
            chance = torch.rand(100, generator=draw)
            return minimality_of(effects, chance, names[: len(effects)], quantile=0.9, alpha=0.05, n=1)

        return run

    assert 0.01 < share_rejected(trial(torch.tensor([0.9])), 600) < 0.07
    alone, many = (trial(torch.full((n,), 0.75))(torch.Generator().manual_seed(1)).p_value for n in (1, 20))
    assert many == pytest.approx(min(1.0, 20 * alone)) and 0 < alone < 0.02  # Bonferroni
    planted = torch.full((20,), 2.0)
    planted[3] = 0.5
    assert share_rejected(trial(planted), 50) == 1.0
    assert trial(planted)(torch.Generator().manual_seed(0)).offenders == ("e3",)


def test_minimality_of_a_real_circuit_finds_the_edge_that_was_added():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=16)
    known = minimality_test(model, task, Circuit.from_edges(model.graph, list(task.known)), progress=False)
    assert not known.rejected and known.statistic == 1.0
    padded = Circuit.from_edges(model.graph, [*task.known, "input->a1.h0<q>"])
    assert set(minimality_test(model, task, padded, quantile=0.5, progress=False).offenders) <= {"input->a1.h0<q>"}


def test_effects_are_what_loops_give():
    model = random_model(seed=1)
    task, circuit = random_task(model, n=3), random_circuit(model, 5, seed=1)
    whole = literal_circuit(model, task, circuit.mask)
    effects = []
    for name in circuit.edge_names():
        keep = circuit.mask.clone()
        keep[model.graph.edge(name)] = False
        effects.append(float((whole - literal_circuit(model, task, keep)).abs().mean()))
    found = minimality_test(model, task, circuit, inflations=3, progress=False)
    assert found.details["median_effect"] == pytest.approx(sorted(effects)[(len(effects) - 1) // 2])


def test_equivalence_and_independence_run_the_right_circuits():
    model = random_model(seed=1)
    task, circuit = random_task(model, n=8), random_circuit(model, 30, seed=1)
    whole, kept, rest = (
        literal_circuit(model, task, keep)
        for keep in (model.graph.mask, circuit.mask, model.graph.mask & ~circuit.mask)
    )
    equal = equivalence_test(model, task, circuit, progress=False)
    assert equal.details["wins"] == int((kept > whole).sum())
    independent = independence_test(model, task, circuit, progress=False, permutations=50)
    assert independent.details["complement"] == pytest.approx(float(rest.mean()))
    assert 1 / 51 <= independent.p_value <= 1


def test_a_circuit_that_leaves_a_path_out_is_not_independent():
    """Without one of 46 edges the model does much as before, so the scores go together."""
    model = random_model(seed=3)
    task = random_task(model, n=24)
    circuit = Circuit.from_edges(model.graph, ["m0->m1"])
    found = independence_test(model, task, circuit, progress=False, permutations=200)
    assert found.rejected and "depends on" in found.sentence


def test_the_whole_model_is_equivalent_and_its_complement_independent():
    model = random_model()
    whole = Circuit.from_edges(model.graph, list(model.graph.edge_names()))
    task = random_task(model, n=12)
    assert equivalence_test(model, task, whole, progress=False).p_value == pytest.approx(1)
    with pytest.raises(OptionError, match="no random path adds an edge"):
        minimality_test(model, task, whole, progress=False)


@EVERY
def test_seeds_repeat_and_files_come_back(test):
    model = random_model()
    task, circuit = random_task(model, n=6), random_circuit(model, 6)
    found = test(model, task, circuit, progress=False)
    assert found == test(model, task, circuit, progress=False)
    assert HypothesisTest.from_json(found.to_json()) == found


@EVERY
def test_what_is_refused(test):
    model, other = random_model(), random_model(n_layers=1)
    task, circuit = random_task(model), random_circuit(model, 6)
    with pytest.raises(GraphError, match="not of random"):
        test(model, task, random_circuit(other, 3), progress=False)
    with pytest.raises(OptionError, match="no edges"):
        test(model, task, circuit - circuit, progress=False)
    with pytest.raises(OptionError, match="at least 2"):
        test(model, random_task(model, n=1), circuit, progress=False)
    with pytest.raises(OptionError, match="alpha = 1"):
        test(model, task, circuit, alpha=1, progress=False)


def test_options_out_of_range_are_refused():
    model = random_model()
    task, circuit = random_task(model), random_circuit(model, 6)
    with pytest.raises(OptionError, match="margin"):
        equivalence_test(model, task, circuit, margin=0.5)
    with pytest.raises(OptionError, match="quantile"):
        minimality_test(model, task, circuit, quantile=1.0)
    with pytest.raises(OptionError, match="permutations"):
        independence_test(model, task, circuit, permutations=-1)


def test_minimality_compares_knock_outs_in_the_circuit_with_knock_outs_of_what_was_added(monkeypatch):
    """By loops: each edge out of C against C; each added edge out of C + path against C + path."""
    from circuitkit.evaluation import hypothesis_tests as module

    model = random_model()
    task = random_task(model, n=4)
    circuit = random_circuit(model, 9)
    inflated, seen = [], []
    plain, judged = module._inflated, module.minimality_of
    monkeypatch.setattr(module, "_inflated", lambda *args: inflated.append(plain(*args)) or inflated[-1])
    monkeypatch.setattr(module, "minimality_of", lambda *args, **more: seen.append(args) or judged(*args, **more))
    minimality_test(model, task, circuit, inflations=4, progress=False)

    def change(mask, edge):
        without = mask.clone()
        without[edge] = False
        return (literal_circuit(model, task, mask) - literal_circuit(model, task, without)).abs().mean()

    effects, chance = seen[0][:2]
    edges = zip(circuit.src.tolist(), circuit.dst.tolist(), strict=True)
    torch.testing.assert_close(effects, torch.stack([change(circuit.mask, e) for e in edges]).double())
    torch.testing.assert_close(chance, torch.stack([change(*added) for added in inflated]).double())
