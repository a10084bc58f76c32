"""Minimality against explicit loops with one dial per edge."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.minimality import minimality
from circuitkit.measures import Minimality
from tests.oracles.literal import literal_circuit
from tests.test_completeness import random_circuit
from tests.toys import random_model, random_task


def value(model, task, circuit, removed):
    keep = circuit.mask.clone()
    for name in removed:
        keep[model.graph.edge(name) if "->" in name else model.graph.sources.index(name)] = False
    return float(literal_circuit(model, task, keep).mean())


def change(model, task, circuit, part, others):
    return abs(value(model, task, circuit, [*others, part]) - value(model, task, circuit, others))


@given(seed=st.integers(0, 99), level=st.sampled_from(["nodes", "edges"]))
@settings(max_examples=5, deadline=None)
def test_scores_are_what_loops_give(seed, level):
    model = random_model(seed=seed)
    task, circuit = random_task(model, n=2), random_circuit(model, 8, seed)
    assume(circuit.mask[1:].any())  # a component besides the input
    found = minimality(model, task, circuit, level=level, sets=2, steps=1, candidates=2, seed=seed, progress=False)
    for part in found.contributions:
        assert part.alone == pytest.approx(change(model, task, circuit, part.name, ()), abs=1e-9)
        assert part.score == pytest.approx(change(model, task, circuit, part.name, part.without), abs=1e-9)
        assert part.score >= part.alone and part.name not in part.without
    assert [p.score for p in found.contributions] == sorted((p.score for p in found.contributions), reverse=True)


def test_a_greedy_step_over_all_candidates_finds_the_best_pair():
    model = random_model(seed=2)
    task, circuit = random_task(model, n=2), random_circuit(model, 6, seed=2)
    found = minimality(model, task, circuit, level="edges", sets=0, steps=1, candidates=99, progress=False)
    for part in found.contributions:
        tried = [(), *((other,) for other in circuit.edge_names() if other != part.name)]
        best = max(change(model, task, circuit, part.name, others) for others in tried)
        assert part.score == pytest.approx(best, abs=1e-9)


def test_given_sets_are_tried():
    model = random_model(seed=5)
    task, circuit = random_task(model, n=2), random_circuit(model, 20, seed=5)
    plain = minimality(model, task, circuit, sets=0, steps=0, progress=False)
    first, second = (part.name for part in plain.contributions[:2])
    found = minimality(model, task, circuit, sets=0, steps=0, given=[[second]], progress=False)
    score = next(part.score for part in found.contributions if part.name == first)
    wanted = max(change(model, task, circuit, first, others) for others in ((), (second,)))
    assert score == pytest.approx(wanted, abs=1e-9)
    with pytest.raises(GraphError, match=r"'a9\.h9' is not a part"):
        minimality(model, task, circuit, given=[["a9.h9"]], progress=False)


def test_an_edge_that_leads_nowhere_is_redundant():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=16)
    circuit = Circuit.from_edges(model.graph, [*task.known, "input->logits"])
    found = minimality(model, task, circuit, level="edges", sets=3, progress=False)
    assert found.redundant(0.05) == ("input->logits",)
    assert not minimality(model, task, circuit, sets=3, progress=False).redundant(0.05)
    assert Minimality.from_json(found.to_json()) == found
    bars, marks = found.plot().data
    assert list(bars.y) == [part.score for part in found.contributions]
    assert list(marks.y) == [part.alone for part in found.contributions]


def test_a_single_part_has_no_sets():
    model = random_model()
    circuit = Circuit.from_edges(model.graph, ["input->logits"])
    found = minimality(model, random_task(model), circuit, level="edges", progress=False)
    assert [part.without for part in found.contributions] == [()]


def test_what_is_refused():
    model, other = random_model(), random_model(n_layers=1)
    task, circuit = random_task(model), random_circuit(model, 3)
    with pytest.raises(GraphError, match="not of random"):
        minimality(model, task, random_circuit(other, 3), progress=False)
    with pytest.raises(OptionError, match="no edges"):
        minimality(model, task, circuit - circuit, progress=False)
    with pytest.raises(OptionError, match="'nodes' or 'edges'"):
        minimality(model, task, circuit, level="heads", progress=False)
    with pytest.raises(OptionError, match=r"steps = 1\.5"):
        minimality(model, task, circuit, steps=1.5, progress=False)


def test_the_random_state_is_left_alone():
    model = random_model()
    before = torch.random.get_rng_state()
    minimality(model, random_task(model), random_circuit(model, 8), progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
