"""The suite that third parties run: it passes what is registered and catches planted faults."""

import pytest
import torch

from circuitkit.errors import UnsupportedModel
from circuitkit.methods.base import METHODS, edge_methods, method, score
from circuitkit.scores import Scores
from circuitkit.testing import LawBroken, check_method, check_model
from tests.laws.exceptions import EXCEPTIONS, OPTIONS

CHECKED = ("identical pairs score zero", "scores scale with the metric", "cutting the work changes nothing")


@pytest.mark.parametrize("name", [n for n in edge_methods() if not any(n in EXCEPTIONS[law] for law in CHECKED)])
def test_registered_methods_pass(name):
    check_method(name, **OPTIONS.get(name, {}))


def faulty(change):
    """A method that scores by `exact` and then does something wrong."""

    @method("faulty")
    def run(model, task, *, plan):
        right = score(model, task, "exact", batch_size=plan.batch_size, progress=False)
        return Scores(change(right, model, task, plan), right.graph, "faulty", n_examples=right.n_examples)


@pytest.mark.parametrize(
    ("law", "change"),
    [
        ("impossible edges", lambda s, *_: s.values + 1e-3),
        ("identical pairs", lambda s, *_: s.values + 1e-3 * s.graph.mask),
        ("batch size", lambda s, m, t, p: s.values * (1 if p.batch_size == "auto" else 2)),
        ("memory budget", lambda s, m, t, p: s.values * (1 if p.budget is None else 2)),
        ("scale with the metric", lambda s, *_: s.values.square()),
        ("left as found", lambda s, m, *_: (m.module.train(), s.values)[1]),
        ("left as found", lambda s, *_: (torch.rand(1), s.values)[1]),
    ],
)
def test_planted_faults_are_caught(law, change):
    METHODS._load()
    faulty(change)
    try:
        with pytest.raises(LawBroken, match=law):
            check_method("faulty")
    finally:
        del METHODS._entries["faulty"]


def test_check_model_refuses_what_load_refuses():
    assert check_model("tracr/hist").graph.n_edges == 8
    with pytest.raises(UnsupportedModel):
        check_model(torch.nn.Linear(1, 1))
