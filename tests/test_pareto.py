"""Sweeps of an option of a method that chooses its own edges, and their figure."""

import pytest
import torch

import circuitkit as ck
from circuitkit.errors import OptionError, UnknownName
from circuitkit.evaluation.pareto import pareto
from circuitkit.figures.pareto import pareto_figure
from circuitkit.graph import chain_graph
from circuitkit.result import ParetoPoint
from tests.oracles.literal import literal_circuit
from tests.toys import random_model, random_task


def test_points_are_what_each_search_and_each_measurement_gives_by_itself():
    model = random_model(heads=(2, 1))
    task = random_task(model, n=2)
    values = [0.02, 0.2, 0.005]
    points = pareto(model, task, "acdc", values=values, corrupt_value="zero", progress=False)
    assert [point.value for point in points] == values
    for point in points:
        alone = ck.score(model, task, "acdc", tau=point.value, corrupt_value="zero", progress=False).own()
        assert torch.equal(point.circuit.mask, alone.mask)
        result = ck.evaluate(model, task, alone, curve=False, progress=False)
        assert point.faithfulness == pytest.approx(result.faithfulness, rel=1e-6)
        assert point.n_edges == result.n_edges and point.objective == "kl" and point.option == "tau"
    assert len({point.n_edges for point in points}) > 1


def test_fidelity_is_the_mean_of_the_metric_that_judged():
    model = random_model()
    task = random_task(model, n=3)
    for objective, judged in ((None, task.with_metric("kl")), ("task", task)):
        (point,) = pareto(model, task, "group-testing", values=[0.05], objective=objective, progress=False)
        if objective is None:
            judged = _with_reference(model, judged)
        want = literal_circuit(model, judged, point.circuit.mask).mean()
        assert point.fidelity == pytest.approx(float(want), rel=1e-6)


def _with_reference(model, task):
    from dataclasses import replace

    (batch,) = task.batches
    logits = model.logits(model.record(batch.clean).inputs[-1], batch.positions)
    return replace(task, batches=(replace(batch, reference=logits.detach()),))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "acdc", "values": []}, OptionError, "got no values of tau"),
        ({"method": "acdc", "values": [-1.0]}, OptionError, "got tau = -1.0"),
        ({"method": "acdc", "option": "tua", "values": [0.1]}, OptionError, "has no option 'tua'"),
        ({"method": "acdx", "values": [0.1]}, UnknownName, "acdc"),
        ({"method": "path-patching", "option": "receivers", "values": ["logits"]}, OptionError, "scores components"),
        ({"method": "eap-ig", "option": "steps", "values": [2]}, OptionError, "ranks edges and chooses none"),
    ],
)
def test_what_cannot_be_swept_is_refused(arguments, error, message):
    model = random_model()
    with pytest.raises(error, match=message):
        pareto(model, random_task(model), progress=False, **arguments)


def _point(n_edges, value, faithfulness, fidelity=-0.5, objective="kl"):
    graph = chain_graph(2)
    names = ["input->logits", "input->m0", "m0->logits", "input->m1"][:n_edges]
    return ParetoPoint("tau", value, ck.Circuit.from_edges(graph, names), fidelity, objective, faithfulness)


def test_the_figure_orders_circuits_by_size_and_leaves_out_what_has_no_place():
    points = [_point(3, 0.1, 0.9, -0.2), _point(1, 1.0, 0.4, -2.0), _point(2, 0.5, None, -1.0), _point(0, 9.0, 0.0)]
    figure = pareto_figure(points)
    faithful, divergence = figure.data
    assert (faithful.x, faithful.y) == ((1, 3), (0.4, 0.9))
    assert (divergence.x, divergence.y) == ((1, 2, 3), (2.0, 1.0, 0.2))
    assert faithful.customdata == ("tau = 1", "tau = 0.1")
    assert figure.layout.xaxis.type == figure.layout.xaxis2.type == "log"
    assert "KL" in figure.layout.yaxis2.title.text


def test_the_figure_shows_other_metrics_as_they_are_and_says_when_there_is_nothing():
    figure = pareto_figure([_point(2, 0.5, 0.5, 1.25, "logit-diff")])
    assert figure.data[1].y == (1.25,) and figure.layout.yaxis2.title.text == "logit-diff"
    for points in ([], [_point(0, 1.0, 0.0)]):
        figure = pareto_figure(points)
        assert not figure.data and any("nothing to draw" in note.text for note in figure.layout.annotations)
