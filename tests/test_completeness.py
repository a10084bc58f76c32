"""Completeness against explicit loops with one dial per edge."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.completeness import completeness
from circuitkit.measures import Completeness
from circuitkit.scores import Scores
from tests.oracles.literal import literal_circuit
from tests.toys import random_model, random_task


def random_circuit(model, n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Scores(torch.randn(model.graph.mask.shape, generator=draw) * model.graph.mask, model.graph, "random").top(n)


def literal(model, task, base, removed):
    keep = base.clone()
    for name in removed:
        keep[model.graph.sources.index(name)] = False
    return float(literal_circuit(model, task, keep).mean())


@given(seed=st.integers(0, 99), edges=st.integers(4, 30))
@settings(max_examples=5, deadline=None)
def test_every_knock_out_is_what_loops_give(seed, edges):
    model = random_model(seed=seed)
    task, circuit = random_task(model, n=2), random_circuit(model, edges, seed)
    assume(circuit.mask[1:].any())  # a component besides the input
    found = completeness(model, task, circuit, sets=3, restarts=1, steps=2, candidates=2, seed=seed, progress=False)
    for knockout in found.knockouts:
        assert knockout.circuit == pytest.approx(literal(model, task, circuit.mask, knockout.removed), abs=1e-9)
        assert knockout.model == pytest.approx(literal(model, task, model.graph.mask, knockout.removed), abs=1e-9)
    assert found.circuit == pytest.approx(literal(model, task, circuit.mask, ()), abs=1e-9)
    assert found.worst.incompleteness == max(abs(k.circuit - k.model) for k in found.knockouts)


def test_which_sets_are_knocked_out():
    model = random_model(n_layers=2, heads=(2, 2))
    task, circuit = random_task(model, n=2), random_circuit(model, 30)
    parts = {model.graph.sources[row] for row in circuit.mask.any(1).nonzero().flatten().tolist()} - {"input"}
    found = completeness(model, task, circuit, sets=5, restarts=2, steps=3, candidates=99, progress=False)
    assert all(set(knockout.removed) <= parts for knockout in found.knockouts)
    counts = {how: sum(k.how == how for k in found.knockouts) for how in ("nothing", "random", "layer", "greedy")}
    assert counts == {"nothing": 1, "random": 5, "layer": 2, "greedy": 6}
    layers = [set(k.removed) for k in found.knockouts if k.how == "layer"]
    assert layers == [{p for p in parts if p[1] == "0"}, {p for p in parts if p[1] == "1"}]


def test_a_greedy_step_takes_the_worst_of_all_candidates():
    model = random_model(seed=4)
    task, circuit = random_task(model, n=2), random_circuit(model, 12, seed=4)
    found = completeness(model, task, circuit, sets=0, layers=False, restarts=1, steps=2, candidates=99, progress=False)
    parts = [model.graph.sources[row] for row in circuit.mask[1:].any(1).nonzero().flatten().add(1).tolist()]

    def gap(removed):
        return abs(literal(model, task, circuit.mask, removed) - literal(model, task, model.graph.mask, removed))

    first = max(parts, key=lambda part: gap([part]))
    second = max((part for part in parts if part != first), key=lambda part: gap([first, part]))
    assert [k.removed for k in found.knockouts[1:]] == [(first,), (first, second)]


def test_the_whole_model_is_complete():
    model = random_model(heads=(4, 2), position="rotary", gated=True)
    whole = Circuit.from_edges(model.graph, list(model.graph.edge_names()))
    assert completeness(model, random_task(model), whole, progress=False).worst.incompleteness == 0


def test_means_by_kind_and_the_file():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=8)
    found = completeness(model, task, Circuit.from_edges(model.graph, list(task.known)), sets=3, progress=False)
    assert Completeness.from_json(found.to_json()) == found
    chosen = [k.incompleteness for k in found.knockouts if k.how == "random"]
    assert found.mean("random") == pytest.approx(sum(chosen) / 3)
    figure = found.plot()
    drawn = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in drawn) == len(found.knockouts)
    assert drawn[0].x[0] == found.knockouts[0].model and drawn[0].y[0] == found.knockouts[0].circuit


def test_what_is_refused():
    model, other = random_model(), random_model(n_layers=1)
    task = random_task(model)
    with pytest.raises(GraphError, match="not of random"):
        completeness(model, task, random_circuit(other, 3), progress=False)
    with pytest.raises(OptionError, match="no edges"):
        completeness(model, task, random_circuit(model, 3) - random_circuit(model, 3), progress=False)
    with pytest.raises(OptionError, match="besides the input"):
        completeness(model, task, Circuit.from_edges(model.graph, ["input->logits"]), progress=False)
    with pytest.raises(OptionError, match="sets = -1"):
        completeness(model, task, random_circuit(model, 3), sets=-1, progress=False)


def test_the_corrupt_value_is_the_circuits_own():
    model = random_model()
    task, circuit = random_task(model, n=3), random_circuit(model, 10)
    circuit = replace(circuit, scores=None, meta={"options": {"corrupt_value": "zero"}})
    found = completeness(model, task, circuit, sets=1, restarts=0, progress=False)
    assert found.corrupt_value == "zero"
    assert completeness(model, task, circuit, sets=1, restarts=0, corrupt_value="mean", progress=False) != found
