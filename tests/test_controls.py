"""Controls: what a shuffle moves, and that nothing is found where there is nothing."""

from dataclasses import replace

import pytest
import torch

import circuitkit as ck
from circuitkit.comparisons import Controls
from circuitkit.errors import OptionError
from circuitkit.evaluation.controls import controls
from circuitkit.evaluation.faithfulness import evaluate
from circuitkit.evaluation.resampling import shuffled, shuffles_for
from circuitkit.tasks.base import Task
from tests.toys import random_model, random_task


def letters(model="induction/trained", n=24):
    model = ck.load(model)
    return model, ck.task("induction-letters", model, n=n)


def test_answers_move_together_and_none_stays():
    tokens = torch.arange(12).reshape(6, 2)
    task = Task.from_tokens(tokens, tokens + 1, right=range(6), wrong=range(10, 16))
    batch = shuffled(task, "answers", seed=0).batches[0]
    right, wrong = batch.right.flatten(), batch.wrong.flatten()
    assert sorted(right.tolist()) == list(range(6)) and torch.equal(wrong, right + 10)
    assert not (right == torch.arange(6)).any()
    assert torch.equal(batch.clean, tokens) and torch.equal(batch.corrupt, tokens + 1)


def test_swap_exchanges_right_and_wrong_of_about_half():
    tokens = torch.zeros(400, 2, dtype=torch.long)
    task = Task.from_tokens(tokens, tokens + 1, right=[[1, 2]] * 400, wrong=[3] * 400)
    batch = shuffled(task, "swap", seed=0).batches[0]
    swapped = batch.right[:, 0, 0] == 3
    assert 160 < int(swapped.sum()) < 240
    assert batch.right[swapped][0].tolist() == [[3, -1]] and batch.wrong[swapped][0].tolist() == [[1, 2]]
    assert batch.right[~swapped][0].tolist() == [[1, 2]] and batch.wrong[~swapped][0].tolist() == [[3, -1]]


def test_corrupt_inputs_move_among_rows_of_one_length():
    corrupt = torch.arange(1, 13).reshape(6, 2)
    lengths = [1, 2, 1, 2, 2, 1]
    task = Task.from_tokens(corrupt + 20, corrupt, right=[1] * 6, wrong=[2] * 6, lengths=lengths)
    before, after = task.batches[0].corrupt, shuffled(task, "corrupt", seed=3).batches[0].corrupt
    for length in (1, 2):
        rows = [i for i, n in enumerate(lengths) if n == length]
        assert sorted(after[rows].tolist()) == sorted(before[rows].tolist())
        assert not (after[rows] == before[rows]).all(1).any()


def test_shuffles_fit_the_metric():
    task = random_task(random_model(), n=4)
    assert shuffles_for(task) == ("answers", "swap", "corrupt")
    assert shuffles_for(task.with_metric("kl")) == ("corrupt",)
    assert shuffles_for(task.with_metric("cross-entropy")) == ("answers", "corrupt")
    with pytest.raises(OptionError, match="does not read what 'answers' shuffles; use corrupt"):
        shuffled(task.with_metric("kl"), "answers", seed=0)
    with pytest.raises(OptionError, match="'labels', expected one of"):
        shuffled(task, "labels", seed=0)
    with pytest.raises(OptionError, match="at least 2"):
        shuffled(random_task(random_model(), n=1), "answers", seed=0)
    alone = Task.from_tokens([[1, 2], [3, 4]], [[2, 2], [4, 4]], right=[1, 1], wrong=[2, 2], lengths=[1, 2])
    with pytest.raises(OptionError, match="no two prompts of one length"):
        shuffled(alone, "corrupt", seed=0)


def test_a_behaviour_passes_and_nothing_is_found_without_labels():
    model, task = letters()
    found = controls(model, task, "exact", edges=3, times=2, progress=False)
    assert found.passed and found.verdict == "better than chance"
    labels = [control for control in found.controls if control.shuffled != "corrupt"]
    assert len(labels) == 4 and len(found.controls) == 6
    assert all(control.verdict.startswith("no better than chance") for control in labels)
    assert max(control.strength for control in labels) < 0.6
    assert found.faithfulness == evaluate(model, task, ck.score(model, task, "exact").top(3), curve=False).faithfulness


def test_nothing_is_found_where_nothing_is():
    """Zeroed position embeddings leave no induction: neither the task nor its controls give a circuit."""
    model, task = letters("induction/damaged")
    found = controls(model, task, "exact", edges=3, times=2, progress=False)
    assert not found.passed
    assert found.verdict.startswith("no better than chance")
    assert all(control.verdict.startswith("no better than chance") for control in found.controls)


def test_a_control_is_measured_on_the_real_task():
    model, task = letters(n=12)
    found = controls(model, task, "exact", edges=3, shuffles=["answers"], times=1, seed=4, progress=False)
    other = ck.score(model, shuffled(task, "answers", seed=4), "exact", progress=False).top(3)
    control = found.controls[0]
    want = evaluate(model, replace(task, known=None), other, curve=False, progress=False)
    assert control.faithfulness == pytest.approx(want.faithfulness, abs=1e-9)
    real = ck.score(model, task, "exact", progress=False).top(3)
    assert control.jaccard == len(real & other) / len(real | other)
    assert control.strength == pytest.approx(float(other.score.abs().sum() / real.score.abs().sum()))


def test_the_file_and_the_figure():
    model, task = letters(n=12)
    found = controls(model, task, "exact", edges=3, times=1, progress=False)
    assert Controls.from_json(found.to_json()) == found
    names = [trace.name for trace in found.plot().data]
    assert names[0] == "the real task" and names[-1] == "random circuits" and "swap shuffled" in names


def test_no_shuffles_are_refused():
    model, task = letters(n=8)
    with pytest.raises(OptionError, match="times = 0"):
        controls(model, task, "exact", edges=3, times=0)
