"""Shares of what readers read: against plain loops over a literal run, and what must hold of any shares."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import circuitkit as ck
from circuitkit.errors import OptionError
from tests.families import build, every_family
from tests.oracles.literal import literal_writes
from tests.toys import SHAPES, random_model, random_task

METHOD = "information-flow-routes"
few = settings(max_examples=10, deadline=None)


def literal_shares(model, task):
    """For every example, reader, position and writer by itself: mean over positions, then over examples."""
    module, graph = model.module, model.graph
    total, n = torch.zeros(graph.mask.shape, dtype=torch.float64), 0
    for batch in task.batches:
        for i in range(len(batch)):
            length = int(batch.lengths[i])
            writes = literal_writes(module, batch.clean[i, :length], graph)
            for v, reader in enumerate(graph.destination_nodes):
                writers = graph.mask[:, v].nonzero().flatten().tolist()
                biases = sum(b.attn.b_O.detach() for b in module.blocks[: reader.layer + (reader.kind == "mlp")])
                for p in range(length):
                    y = sum(writes[u, p] for u in writers) + biases
                    near = [max(0.0, float(y.abs().sum() - (y - writes[u, p]).abs().sum())) for u in writers]
                    for u, value in zip(writers, near, strict=True):
                        total[u, v] += value / (sum(near) or 1) / length
            n += 1
    return total / n


@given(shape=SHAPES)
@few
def test_scores_equal_plain_loops(shape):
    model = random_model(shape)
    lengths = torch.tensor([6, 3]) if shape["causal"] else None
    task = random_task(model, n=2, lengths=lengths)
    got = ck.score(model, task, METHOD, progress=False).values.double()
    torch.testing.assert_close(got, literal_shares(model, task), rtol=1e-5, atol=1e-7)


@every_family
def test_each_readers_shares_add_up_to_one(family):
    model = ck.load(build(family))
    scores = ck.score(model, random_task(model, n=3), METHOD, progress=False).values
    torch.testing.assert_close(scores.sum(0), torch.ones(scores.shape[1]), rtol=0, atol=1e-5)
    assert float(scores.min()) >= 0


def test_a_reader_to_which_no_writer_is_near_gets_zeros():
    """Writers that cancel, and a bias far from all of them."""
    model = random_model(n_layers=1, attn_only=True, norm=None)
    module = model.module
    module.embed.W_E.data.zero_()
    module.pos_embed.W_pos.data.zero_()
    scores = ck.score(model, random_task(model), METHOD, progress=False)
    into = scores.values[:, scores.graph.destinations.index("a0.h0<q>")]
    assert torch.count_nonzero(into) == 0 and scores.values.isfinite().all()
    assert torch.count_nonzero(scores.values[:, -1]) > 0


def test_corrupt_inputs_answers_and_metric_are_of_no_account():
    model = random_model()
    task = random_task(model)
    batch = task.batches[0]
    other = replace(task, batches=(replace(batch, corrupt=batch.clean.flip(1), right=batch.wrong, wrong=batch.right),))
    a, b = (ck.score(model, t, METHOD, progress=False).values for t in (task, other.with_metric("cross-entropy")))
    assert torch.equal(a, b)


def test_circuits_are_grown_from_the_logits():
    model = random_model()
    task = random_task(model)
    scores = ck.score(model, task, METHOD, progress=False)
    assert not scores.signed and not scores.comparable
    with pytest.raises(OptionError, match=r"use \.grow\(n\)"):
        scores.top(5)
    found = ck.find(model, task, method=METHOD, edges=8, progress=False)
    assert found.edge_names() == scores.grow(8).edge_names()
    assert found.result is not None and found.result.corrupt_value == "counterfactual"


def test_memory_is_bounded_by_the_budget(monkeypatch):
    """With a budget of a few examples, no more than those are run at once."""
    model = random_model()
    task = random_task(model, n=6)
    sizes, record = [], type(model).record

    def counted(self, tokens):
        sizes.append(len(tokens))
        return record(self, tokens)

    monkeypatch.setattr(type(model), "record", counted)
    from circuitkit.methods.base import matrix_bytes

    budget = int(4.5 * matrix_bytes(model, task.batches[0]))
    ck.score(model, task, METHOD, budget=budget, progress=False)
    assert sizes == [2, 2, 2]
