"""A user's own behaviour: what is accepted, and every way to state it badly, with the row named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitkit.errors import FormatError, TaskError, UnknownName
from circuitkit.functional.metrics import METRICS
from circuitkit.tasks.base import Task
from circuitkit.tasks.text import answer_ids, encode
from tests.stub_models import StubModel, gpt2, stories, zoo

CLEAN, CORRUPT = [[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 9, 6]]
GIRL, BOY = "There was a girl named Lily.", "There was a boy named Tim."


def tokens(**changes: Any) -> Task:
    given: dict[str, Any] = {
        "clean": CLEAN,
        "corrupt": CORRUPT,
        "right": [7, 8],
        "wrong": [8, 7],
        "vocab": StubModel(d_vocab=10, n_ctx=3),
    }
    return Task.from_tokens(**given | changes)


@pytest.mark.parametrize(
    "right, wrong, expected",
    [
        ([7, 8], [8, 7], [[[7]], [[8]]]),
        (torch.tensor([7, 8], dtype=torch.int32), np.array([8, 7]), [[[7]], [[8]]]),
        ([[7, 6], [8, 5]], [8, 7], [[[7, 6]], [[8, 5]]]),
        ([[7, 6], [8]], [[8], [7, 5]], [[[7, 6]], [[8, -1]]]),
        ([[[7, 7, 6]], [[8, -1, 8]]], [8, 7], [[[7, -1, 6]], [[8, -1, -1]]]),
    ],
)
def test_answers_take_one_shape(right: Any, wrong: Any, expected: list[Any]) -> None:
    batch = tokens(right=right, wrong=wrong).batches[0]
    assert batch.right.tolist() == expected and batch.right.dtype == torch.long


def test_several_answer_positions() -> None:
    batch = tokens(
        positions=[[0, 2], [1, 2]], right=[[[7], [6, 5]], [[7], [6]]], wrong=[[[1], [2]], [[3], [4]]]
    ).batches[0]
    assert batch.positions.tolist() == [[0, 2], [1, 2]]
    assert batch.right.tolist() == [[[7, -1], [6, 5]], [[7, -1], [6, -1]]]


def test_what_lies_in_the_padding_does_not_matter() -> None:
    first = tokens(lengths=[2, 3]).batches[0]
    other = tokens(lengths=[2, 3], clean=[[1, 2, -100], [4, 5, 6]], corrupt=[[1, 9, 10**6], [4, 9, 6]]).batches[0]
    assert torch.equal(first.clean, other.clean) and torch.equal(first.corrupt, other.corrupt)
    assert first.positions.tolist() == [[1], [2]] and first.clean[0, 2] == 0
    assert tokens(lengths=[1, 2], corrupt=[[2, 9, 3], [4, 9, 6]]).batches[0].clean.shape == (2, 2)


@pytest.mark.parametrize(
    "says", [{"causal": False}, {"card": {"hooked_transformer_config": {"attention_dir": "bidirectional"}}}]
)
def test_models_that_are_not_causal_get_one_batch_per_length(says: dict[str, Any]) -> None:
    task = tokens(lengths=[2, 3], vocab=StubModel(d_vocab=10, n_ctx=3, **says))
    assert [b.clean.tolist() for b in task.batches] == [[[1, 2]], [[4, 5, 6]]]
    assert [b.right.flatten().tolist() for b in task.batches] == [[7], [8]]


def test_metrics_that_need_no_wrong_answer_or_no_answer() -> None:
    assert tokens(wrong=None, metric="cross-entropy").batches[0].wrong.shape == (2, 1, 0)
    assert tokens(right=None, wrong=None, metric="kl").metric.name == "kl"
    assert tokens(right=None, wrong=None, target=[0.5, 1], metric="squared-error").batches[0].target.shape == (2, 1, 1)
    assert tokens(metric=METRICS["accuracy"]).metric.name == "accuracy"
    with pytest.raises(TaskError, match="row 0: metric 'logit-diff' needs a wrong answer"):
        tokens(wrong=None, metric="cross-entropy").with_metric("logit-diff")


def test_output_classes_can_differ_from_input_ids() -> None:
    model = zoo("tracr/hist")
    one = [[0, 2], [0, 3]], [[0, 3], [0, 2]]
    assert Task.from_tokens(*one, [6, 6], [5, 5], vocab=model).batches[0].right[0, 0, 0] == 6
    with pytest.raises(TaskError, match="row 1: right has id 7, expected between 0 and 6"):
        Task.from_tokens(*one, [6, 7], [5, 5], vocab=model)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clean": [], "corrupt": []}, "clean"),
        ({"clean": torch.zeros(0, 3, dtype=torch.long)}, "clean is empty"),
        ({"clean": torch.zeros(2, 0, dtype=torch.long)}, "clean is empty"),
        ({"clean": [1, 2]}, r"clean has shape \(2,\), expected \[n, pos\]"),
        ({"clean": [[1, 2, 3], [4, 5]]}, "row 1: clean has 2 entries, row 0 has 3"),
        ({"clean": [[1.0, 2, 3], [4, 5, 6]]}, "clean has dtype torch.float32"),
        ({"corrupt": torch.ones(2, 3, dtype=torch.bool)}, "corrupt has dtype torch.bool"),
        ({"clean": "text"}, "clean is not a tensor of whole numbers"),
        ({"corrupt": [[1, 9], [4, 9]]}, r"clean is \(2, 3\) and corrupt \(2, 2\)"),
        ({"corrupt": CORRUPT[:1]}, r"corrupt \(1, 3\)"),
        ({"clean": [[1, 2, 3], [4, -5, 6]]}, "row 1: clean has id -5"),
        ({"corrupt": [[1, 2, 9], [4, 10, 6]]}, "row 1: corrupt has id 10, expected between 0 and 9"),
        ({"vocab": StubModel("small", 10, 2)}, "row 0: 3 tokens, but 'small' reads at most 2"),
        ({"lengths": [3]}, r"lengths has shape \(1,\)"),
        ({"lengths": [3, 0]}, "row 1: got length 0"),
        ({"lengths": [4, 3]}, "row 0: got length 4, expected between 1 and 3"),
        ({"lengths": [2.0, 3.0]}, "lengths has dtype"),
        ({"positions": [0, 3]}, "row 1: got answer position 3, expected between 0 and 2"),
        ({"positions": [0, -1]}, "row 1: got answer position -1"),
        ({"positions": [0, 2], "lengths": [3, 2]}, "row 1: got answer position 2, expected between 0 and 1"),
        ({"positions": [[0]]}, "positions has shape"),
        ({"right": [7]}, r"right has shape \(1,\), expected \[n\], \[n, k\]"),
        ({"right": [[7, 8]], "positions": [[0, 1], [0, 1]]}, r"expected \[n, answer, k\]"),
        ({"right": [7, 11]}, "row 1: right has id 11"),
        ({"wrong": [[8], [-2]]}, "row 1: wrong has id -2"),
        ({"right": [7.0, 8.0]}, "right has dtype"),
        ({"right": [7, 7]}, "row 1: token id 7 is given as right and as wrong"),
        ({"right": [[7, 6], [8, 5]], "wrong": [[1, 6], [2, 3]]}, "row 0: token id 6"),
        ({"right": [7, -1]}, "row 1: metric 'logit-diff' needs a right answer"),
        ({"right": [[], []]}, "row 0: metric 'logit-diff' needs a right answer"),
        ({"wrong": None}, "row 0: metric 'logit-diff' needs a wrong answer"),
        ({"metric": "squared-error"}, "needs target numbers"),
        ({"metric": "squared-error", "target": [1.0]}, "target has shape"),
        ({"metric": "squared-error", "target": [1.0, float("nan")]}, "row 1: the target nan"),
        ({"corrupt": CLEAN}, "the same in every row"),
        ({"corrupt": [[1, 2, 9], [4, 5, 9]], "lengths": [2, 2]}, "the same in every row"),
    ],
)
def test_badly_stated_tokens_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tokens(**changes)


def test_some_equal_pairs_are_counted() -> None:
    with pytest.warns(UserWarning, match=r"the same in 1 of 2 rows \(1\)") as caught:
        tokens(corrupt=[[1, 9, 3], [4, 5, 6]])
        Task.from_pairs(stories(), [GIRL, GIRL], [BOY, GIRL], " She", " He")
    assert {warning.filename for warning in caught} == {__file__}, "the warning points at the user's line"


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'logit-diff'"):
        tokens(metric="logit_diff")


def test_texts_become_pairs() -> None:
    model = stories()
    task = Task.from_pairs(model, [GIRL, BOY], [BOY, GIRL], [" She", " He"], [" He", [" She", " he"]], prepend_bos=None)
    (batch,) = task.batches
    strings = model.tokenizer.convert_ids_to_tokens
    assert strings(batch.right.flatten().tolist()) == ["▁She", "▁He"]
    assert strings(batch.wrong[1, 0].tolist()) == ["▁She", "▁he"]
    assert batch.wrong[0, 0, 1] == -1 and (batch.clean[:, 0] == 1).all() and (batch.clean[:, 1:] != 1).all()


def test_one_string_serves_all_rows() -> None:
    task = Task.from_pairs(stories(), [GIRL, GIRL], [BOY, BOY], " She", " He")
    assert task.batches[0].right.shape == (2, 1, 1)


@pytest.mark.parametrize("model", [stories, gpt2])
def test_the_tokenizers_padding_side_changes_nothing(model: Any) -> None:
    batches = []
    for side in ("left", "right"):
        other = copy.copy(model())
        other.tokenizer = copy.deepcopy(other.tokenizer)
        other.tokenizer.padding_side = side
        other.tokenizer.pad_token = other.tokenizer.eos_token
        short = "A girl", "A boy"
        pairs = Task.from_pairs(other, [GIRL, short[0]], [BOY, short[1]], " She", " He")
        batches.append(pairs.batches[0])
    left, right = batches
    for field in ("clean", "corrupt", "lengths", "positions", "right", "wrong"):
        assert torch.equal(getattr(left, field), getattr(right, field)), field
    assert (left.clean[1, left.lengths[1] :] == 0).all() and left.lengths[1] < left.lengths[0]


def test_bos_comes_once_or_not_at_all() -> None:
    assert encode(stories(), ["girl"])[0][:2] == encode(stories(), ["<s>girl"])[0][:2]
    assert encode(stories(), ["girl"], prepend_bos=True) == encode(stories(), ["girl"])
    assert encode(stories(), ["girl"], prepend_bos=False)[0] == encode(stories(), ["girl"])[0][1:]
    assert encode(gpt2(), ["Hello world"]) == [[15496, 995]]
    assert encode(gpt2(), ["Hello world"], prepend_bos=True) == [[50256, 15496, 995]]
    assert encode(gpt2(), ["<|endoftext|>Hello world"], prepend_bos=True) == [[50256, 15496, 995]]


def test_ids_equal_those_stored_with_the_model() -> None:
    check = stories().card["check"]
    assert encode(stories(), [check["text"]]) == [check["ids"]]


def test_an_answer_is_what_follows_its_text() -> None:
    assert answer_ids(gpt2(), ["It was", "the year 17", "the year 18"], [" red", "42", "00"]) == [
        gpt2().tokenizer.encode(text)[0] for text in (" red", "42", "00")
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clean": [], "corrupt": []}, "clean is empty"),
        ({"corrupt": [BOY]}, "got 2 clean and 1 corrupt"),
        ({"clean": [GIRL, ""]}, "row 1: the text is empty"),
        ({"clean": [GIRL, 5]}, "row 1: got int 5"),
        ({"clean": [GIRL, "A girl and a dog"]}, r"row 1: clean has \d+ tokens and corrupt \d+.*'▁do', 'g'.*'▁Tim'"),
        ({"right": [" She", " Elizabeth"]}, r"row 1: the answer ' Elizabeth' is not one token here, it came out as \["),
        ({"right": [" She", "She"]}, r"row 1: the answer 'She' .*leading space"),
        ({"right": [" She", ""]}, "row 1: got '' as an answer"),
        ({"right": [" She"]}, "got 2 pairs and 1 rows of right answers"),
        ({"wrong": [" He", " She"]}, "row 1: token id 338 is given as right and as wrong"),
        ({"wrong": None}, "row 0: metric 'logit-diff' needs a wrong answer"),
        ({"model": StubModel("digits")}, "'digits' has no tokenizer"),
        ({"model": StubModel("tiny", 300, 512, stories().tokenizer)}, "row 0: clean has id"),
        ({"model": StubModel("short", 512, 4, stories().tokenizer)}, "row 0: .* tokens, but 'short' reads at most 4"),
    ],
)
def test_badly_stated_texts_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {
        "model": stories(),
        "clean": [GIRL, GIRL],
        "corrupt": [BOY, BOY],
        "right": [" She", " She"],
        "wrong": " He",
    }
    with pytest.raises(TaskError, match=message):
        Task.from_pairs(**given | changes)


def csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_file_is_pairs(tmp_path: Path) -> None:
    path = csv(tmp_path / "girls.csv", f"clean,corrupt,right,wrong\n{GIRL},{BOY}, She, He| he\n{BOY},{GIRL}, He, She\n")
    task = Task.from_csv(stories(), path, separator="|")
    direct = Task.from_pairs(stories(), [GIRL, BOY], [BOY, GIRL], [" She", " He"], [[" He", " he"], " She"])
    assert task.name == "girls"
    for a, b in zip(vars(task.batches[0]).values(), vars(direct.batches[0]).values(), strict=True):
        assert a is b or torch.equal(a, b)
    path = csv(tmp_path / "other.csv", f"\ufefftext,patched,answer\n{GIRL},{BOY}, She\n")
    other = Task.from_csv(stories(), path, clean="text", corrupt="patched", right="answer", metric="cross-entropy")
    assert len(other) == 1


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("clean,corupt,right,wrong\na,b,c,d\n", TaskError, "no column 'corrupt'; did you mean 'corupt'"),
        ("clean,corrupt,right\na,b,c\n", TaskError, "no column 'wrong'"),
        ("clean,corrupt,right,wrong\n", TaskError, "clean is empty"),
        ("", TaskError, "no column 'clean'"),
        ("clean,corrupt,right,wrong\na,b,c,d\na,b\n", FormatError, "row 1: got 2 cells, expected the header's 4"),
        ('clean,corrupt,right,wrong\n"a,b,c,d\n', FormatError, "cannot read"),
    ],
)
def test_a_bad_csv_file_is_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Task.from_csv(stories(), csv(tmp_path / "bad.csv", text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot read"):
        Task.from_csv(stories(), tmp_path / "none.csv")
