"""The laws of edge methods on tiny random recurrent networks, for every method that says that it takes them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import circuitkit as ck
from circuitkit.errors import MetricError
from circuitkit.functional.metrics import METRICS, Metric
from circuitkit.methods.base import edge_methods
from circuitkit.models.recurrent.cells.lru import LRU
from circuitkit.models.recurrent.net import RecurrentNet
from tests.laws.exceptions import EXCEPTIONS
from tests.laws.test_method_laws import assert_close, assert_same_scores, score

METHODS = edge_methods("recurrent")
LAYERS = {
    "tanh": lambda: nn.RNN(2, 3, batch_first=True),
    "gru": lambda: nn.GRU(2, 3, num_layers=2, batch_first=True),
    "lstm": lambda: nn.LSTM(2, 3, batch_first=True),
    "both": lambda: nn.LSTM(2, 2, bidirectional=True, batch_first=True),
    "lru": lambda: LRU(2, 3),
}
VIEWS = {"collapsed": {}, "windows": {"time": [(0, 2), (2, 4)]}, "gates": {"group": "gate"}}
NETS = st.fixed_dictionaries(
    {"layer": st.sampled_from(list(LAYERS)), "view": st.sampled_from(list(VIEWS)), "seed": st.integers(0, 999)}
)
STEPS = 4
few = settings(max_examples=4, deadline=None)


def random_net(layer="gru", view="collapsed", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cell = LAYERS[layer]()
        width = cell.hidden_size * (2 if getattr(cell, "bidirectional", False) else 1)
        width = 2 if layer == "lru" else width
        module = RecurrentNet(cell, 3).double() if layer != "lru" else nn.Sequential(cell, nn.Linear(width, 3)).double()
    return ck.load(module).viewed(**VIEWS[view])


def random_pairs(n=3, seed=0, same=False):
    clean, corrupt = torch.randn(2, n, STEPS, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    task = ck.Task.from_tokens(clean, corrupt, torch.zeros(n).long(), torch.ones(n).long())
    return replace(task, batches=(replace(task.batches[0], corrupt=clean.clone()),)) if same else task


def bound_by(law):
    """The methods that a law is tested on: all but those listed with a reason."""
    return pytest.mark.parametrize("name", [name for name in METHODS if name not in EXCEPTIONS[law]])


@bound_by("identical pairs score zero")
@given(net=NETS)
@few
def test_identical_pairs_score_exactly_zero(name, net):
    assert torch.count_nonzero(score(random_net(**net), random_pairs(same=True), name, progress=False).values) == 0


@pytest.mark.parametrize("name", METHODS)
@given(net=NETS)
@few
def test_impossible_edges_score_zero_and_some_possible_one_does_not(name, net):
    scores = score(random_net(**net), random_pairs(), name, progress=False)
    assert torch.count_nonzero(scores.values[~scores.graph.mask]) == 0
    assert scores.selected is None or not scores.selected[~scores.graph.mask].any()
    assert torch.count_nonzero(scores.values) > 0


@bound_by("scores scale with the metric")
@given(net=NETS, factor=st.sampled_from([-2.0, 0.5, 100.0]))
@few
def test_scores_scale_with_the_metric(name, net, factor):
    model, base, task = random_net(**net), METRICS["logit-diff"], random_pairs()
    scaled = replace(task, metric=Metric("scaled", lambda x, b: factor * base.function(x, b), base.needs))
    got = score(model, scaled, name, progress=False).values
    assert_close(got, factor * score(model, task, name, progress=False).values)


@bound_by("cutting the work changes nothing")
@given(net=NETS, size=st.integers(1, 4))
@few
def test_batch_size_and_budget_change_nothing(name, net, size):
    model, task = random_net(**net), random_pairs(n=5)
    whole = score(model, task, name, progress=False)
    assert_same_scores(score(model, task, name, batch_size=size, progress=False), whole)
    assert_same_scores(score(model, task, name, budget="1KiB", progress=False), whole)


@bound_by("order changes nothing")
@given(net=NETS)
@few
def test_the_order_of_examples_and_batches_changes_nothing(name, net):
    model, task = random_net(**net), random_pairs(n=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = replace(task, batches=(task.batches[0].rows(order[:2]), task.batches[0].rows(order[2:])))
    assert_same_scores(score(model, shuffled, name, progress=False), score(model, task, name, progress=False))


@bound_by("padding changes nothing")
@pytest.mark.parametrize("layer", ["tanh", "gru", "lstm", "lru"])
def test_steps_behind_the_last_answer_change_nothing(name, layer):
    model, task = random_net(layer), random_pairs(n=5)
    batch = task.batches[0]
    longer = [
        torch.cat((side, torch.full((5, 2, 2), 7.0, dtype=side.dtype)), 1) for side in (batch.clean, batch.corrupt)
    ]
    padded = replace(task, batches=(replace(batch, clean=longer[0], corrupt=longer[1]),))
    assert_same_scores(score(model, padded, name, progress=False), score(model, task, name, progress=False))


@bound_by("exact where the model is linear")
def test_all_methods_agree_where_the_network_is_linear(name):
    # An LRU with a linear read-out, and an edge for each step: a weight-tied edge takes part in products with itself.
    model, task = random_net("lru").viewed("expanded", steps=STEPS), random_pairs()
    want = score(model, task, "exact", progress=False).values
    assert want.abs().max() > 0.01
    assert_close(score(model, task, name, progress=False).values, want, rtol=1e-5)


@bound_by("a broken metric is refused")
def test_a_metric_that_is_not_finite_is_refused(name):
    model, task = random_net(), random_pairs()
    broken = replace(task, metric=Metric("broken", lambda x, b: x[:, 0, 0] * torch.nan, ()))
    with pytest.raises(MetricError):
        score(model, broken, name, progress=False)
