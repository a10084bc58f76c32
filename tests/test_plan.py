"""Cutting work: memory budgets, running out of memory, and refusals."""

import pytest
import torch

import circuitkit as ck
from circuitkit.errors import OptionError, TaskError
from circuitkit.methods.plan import Plan, parse_bytes
from circuitkit.models import edits as edits_file
from tests.toys import random_model, random_task

CPU = torch.device("cpu")


def test_out_of_memory_halves_the_chunk_and_goes_on_with_the_same_answer(monkeypatch):
    model = random_model()
    task = random_task(model, n=6)
    want = ck.score(model, task, "exact", progress=False)
    real, sizes = edits_file.patch_edges, []

    def hungry(model, run, delta, site, edges, positions):
        sizes.append(len(edges) * run.batch)
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, run, delta, site, edges, positions)

    monkeypatch.setattr(edits_file, "patch_edges", hungry)
    got = ck.score(model, task, "exact", budget="64MiB", progress=False)
    torch.testing.assert_close(got.values, want.values)
    assert max(sizes) > 4 >= sizes[-1]


def test_memory_that_never_suffices_is_reported():
    task = random_task(random_model(), n=2)

    def never(_batch, _plan):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(OptionError, match="out of memory with one example"):
        list(Plan(progress=False).over(task, CPU, "", lambda b: 1e6, never))


def test_other_errors_pass_through_unchanged():
    task = random_task(random_model(), n=2)

    def broken(_batch, _plan):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(Plan(progress=False).over(task, CPU, "", lambda b: 1.0, broken))


def test_chunks_cover_every_example_once_and_respect_the_batch_size():
    task = random_task(random_model(), n=7)
    plan = Plan(batch_size=3, progress=False)
    parts = list(plan.over(task, CPU, "", lambda b: 1.0, lambda b, _: b.clean))
    assert [len(p) for p in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), task.batches[0].clean)


@pytest.mark.parametrize(("text", "want"), [("1KiB", 1024), ("2 MB", 2_000_000), (5, 5), ("3B", 3), (None, None)])
def test_budgets_are_read(text, want):
    assert parse_bytes(text) == want


@pytest.mark.parametrize("bad", ["lots", "-1GiB", 0, "GiB"])
def test_budgets_that_make_no_sense_are_refused(bad):
    with pytest.raises(OptionError, match="expected bytes such as"):
        parse_bytes(bad)


@pytest.mark.parametrize("bad", [0, -2, 1.5, "big"])
def test_batch_sizes_that_make_no_sense_are_refused(bad):
    model = random_model()
    with pytest.raises(OptionError, match="expected 'auto' or a whole number"):
        ck.score(model, random_task(model), "eap", batch_size=bad, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"rule": "simpson"}, "midpoint"),
        ({"corrupt_value": "noise"}, "counterfactual"),
        ({"stepz": 3}, "no option 'stepz'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    model = random_model()
    with pytest.raises(OptionError, match=message):
        ck.score(model, random_task(model), "eap-ig", progress=False, **options)


def test_tasks_of_another_model_are_refused():
    model, task = ck.load("induction/trained"), random_task(random_model(), length=12)
    with pytest.raises(TaskError, match="reads at most 8"):
        ck.score(model, task, "eap", progress=False)
    small = random_model(causal=False)
    ragged = random_task(small, lengths=torch.tensor([6, 3, 4, 6]))
    with pytest.raises(TaskError, match="one batch per length"):
        ck.score(small, ragged, "eap", progress=False)
    wide = ck.task("modular-addition", ck.load("modadd/two_layer"), n=8)
    with pytest.raises(TaskError, match="token ids from"):
        ck.score(small, wide, "eap", progress=False)


def test_memory_grows_with_the_budget_not_with_the_examples():
    """Chunks of the same size whatever the number of examples: cost per example cannot grow."""
    model = random_model()
    seen = {}
    for n in (8, 64):
        sizes = []
        plan = Plan(budget=20_000, progress=False)
        list(plan.over(random_task(model, n=n), CPU, "", lambda b: 5_000.0, lambda b, _, s=sizes: s.append(len(b))))
        seen[n] = max(sizes)
    assert seen[8] == seen[64] == 4
