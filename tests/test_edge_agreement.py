"""Scores against single cuts: `exact` predicts itself, first-order scores come near, other graphs are refused."""

from dataclasses import replace

import pytest
import torch

import circuitkit as ck
from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.edge_agreement import MODE, edge_agreement

MODEL = ck.load("stories260k")
TASK = ck.task("gender-pronoun", MODEL, n=4, seed=0)


def test_exact_scores_are_what_cutting_does():
    scores = ck.score(MODEL, TASK, "exact", progress=False)
    found = edge_agreement(MODEL, TASK, scores, n=12, progress=False)
    for part in (found.largest, found.random):
        assert len(part) == 12 and part.r_squared(MODE) > 0.999
        torch.testing.assert_close(
            torch.tensor(part.predicted), torch.tensor(part.measured[MODE]).to(torch.float32), rtol=1e-3, atol=2e-5
        )
    assert not set(found.largest.names) & set(found.random.names)
    order = scores.to_pandas()
    assert list(found.largest.names) == list((order["source"] + "->" + order["destination"]).head(12))


def test_first_order_scores_come_near_and_their_negatives_do_not():
    scores = ck.score(MODEL, TASK, "eap-ig", steps=5, progress=False)
    found = edge_agreement(MODEL, TASK, scores, n=20, progress=False)
    wrong = edge_agreement(MODEL, TASK, replace(scores, values=-scores.values), n=20, progress=False)
    assert found.largest.spearman(MODE) > 0.6 and wrong.largest.spearman(MODE) < -0.6
    assert wrong.largest.r_squared(MODE) < 0 < found.largest.r_squared(MODE)
    figure = found.plot()
    assert len(figure.data) == 3 and "Spearman" in figure.layout.title.text


def test_recurrent_networks_too():
    model = ck.load("toys/parity_gru_s0")
    task = ck.task("parity", model, n=4, seed=0)
    found = edge_agreement(model, task, ck.score(model, task, "exact", progress=False), n=5, progress=False)
    assert found.largest.r_squared(MODE) > 0.999


def test_what_predicts_nothing_is_refused():
    scores = ck.score(MODEL, TASK, "eap", progress=False)
    with pytest.raises(OptionError, match="signed"):
        edge_agreement(MODEL, TASK, replace(scores, signed=False), progress=False)
    with pytest.raises(OptionError, match="n = 0"):
        edge_agreement(MODEL, TASK, scores, n=0, progress=False)
    with pytest.raises(GraphError, match="another graph"):
        edge_agreement(MODEL.split_mlps(43), TASK, scores, progress=False)
