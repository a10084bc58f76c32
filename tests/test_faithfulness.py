"""Two ways to average faithfulness over examples, and the curve of a ranking against a known circuit."""

import json
import math

import pytest
import torch

import circuitkit as ck
from circuitkit.circuit import Circuit
from circuitkit.errors import GraphError
from circuitkit.evaluation.faithfulness import evaluate
from circuitkit.figures.roc import roc_figure
from circuitkit.functional.stats import auroc, trapezoid
from circuitkit.schema import result_from_dict, result_to_dict
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task
from tests.oracles.literal import literal_circuit
from tests.test_completeness import random_circuit
from tests.toys import random_model, random_task


def test_both_averages_by_loops():
    model = random_model(seed=2)
    task, circuit = random_task(model, n=6), random_circuit(model, 25, seed=2)
    mask = model.graph.mask
    clean, nothing, kept = (literal_circuit(model, task, keep) for keep in (mask, mask & False, circuit.mask))
    result = evaluate(model, task, circuit, progress=False)
    assert result.faithfulness == pytest.approx(float((kept - nothing).mean() / (clean - nothing).mean()))
    assert result.mean_of_ratios == pytest.approx(float(((kept - nothing) / (clean - nothing)).mean()))
    assert result.ratios_left_out == 0 and result.mean_of_ratios != pytest.approx(result.faithfulness)


@pytest.mark.filterwarnings("ignore:clean and corrupt are the same")
def test_examples_without_a_gap_are_left_out_and_counted():
    model = random_model(seed=2)
    batch = random_task(model, n=5).batches[0]
    corrupt = batch.corrupt.clone()
    corrupt[1:3] = batch.clean[1:3]
    pairs = Task.from_tokens(batch.clean, corrupt, batch.right[:, 0], batch.wrong[:, 0])
    circuit = random_circuit(model, 25, seed=2)
    result = evaluate(model, pairs, circuit, progress=False)
    rest = torch.tensor([0, 3, 4])
    there = Task.from_tokens(batch.clean[rest], corrupt[rest], batch.right[rest, 0], batch.wrong[rest, 0])
    assert result.ratios_left_out == 2
    assert result.mean_of_ratios == pytest.approx(evaluate(model, there, circuit, progress=False).mean_of_ratios)
    same = evaluate(model, random_task(model, n=3, same=True), circuit, progress=False)
    assert (same.mean_of_ratios, same.ratios_left_out) == (None, 3)


def test_results_come_back_also_from_files_that_have_no_such_mean():
    model = random_model()
    result = evaluate(model, random_task(model), random_circuit(model, 9), progress=False)
    data = result_to_dict(result)
    assert result_from_dict(data) == result
    old = {k: v for k, v in json.loads(json.dumps(data)).items() if k not in ("mean_of_ratios", "ratios_left_out")}
    assert result_from_dict(old).mean_of_ratios is None


def test_the_roc_figure_is_anchored_and_its_area_is_auroc():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=8)
    scores = ck.score(model, task, "exact", progress=False)
    tied = Scores(scores.values.abs().round(), model.graph, "tied")
    figure = roc_figure({"exact": scores, "tied": tied}, task.known)
    mask, truth = model.graph.mask, model.graph.edge_mask(task.known)
    for curve, ranking in zip(figure.data, (scores, tied), strict=False):
        assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
        area = trapezoid(list(curve.y), list(curve.x))
        assert area == pytest.approx(auroc(ranking.values[mask].abs(), truth[mask]), abs=1e-12)
        assert f"({area:.3f})" in curve.name
    assert math.isinf(figure.data[0].customdata[0])
    with pytest.raises(GraphError, match="known and other edges"):
        roc_figure({"exact": scores}, [])
    assert len(Circuit.from_edges(model.graph, list(task.known))) == int(truth.sum())
