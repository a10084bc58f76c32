"""Spans of the prompt: schemas, the files of Haklay et al. 2025, and every refusal with the row named."""

import csv

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.errors import TaskError
from circuitkit.functional.spans import by_span
from circuitkit.runs.provenance import data_sha256
from circuitkit.tasks.base import Task
from circuitkit.tasks.own import from_tokens
from circuitkit.tasks.spans import answer_spans, by_position, fitted_to, span_ids, with_spans
from circuitkit.tasks.text import encode
from tests.stub_models import StubModel, gpt2

GIVEN = ("prefix", "IO", "and", "S1", "S1+1", "action1", "S2", "action2", "to")
YEARS = ("The", "NOUN", "lasted", "from", "the_1", "year_1", "XX1", "YY", "to", "the_2", "year_2", "XX2")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_spans_tile_a_prompt_as_one_would_count(sizes, padding):
    length = sum(sizes)
    if not length:
        return
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    names = [f"s{i}" for i in range(len(sizes))]
    got, ids = span_ids({n: [s] for n, s in zip(names, starts, strict=True)}, torch.tensor([length]), length + padding)
    want = [i for i, size in enumerate(sizes) for _ in range(size)]
    assert got == tuple(names)
    assert ids.tolist() == [want + [-1] * padding]


def test_a_bos_outside_all_spans_gets_one_of_its_own():
    names, ids = span_ids({"a": [1, 1], "b": [2, 3]}, torch.tensor([3, 4]), 4)
    assert names == ("BOS", "a", "b") and ids.tolist() == [[0, 1, 2, -1], [0, 1, 1, 2]]
    with pytest.raises(TaskError, match=r"row 1: the first span, 'a', begins at 1, expected 0"):
        span_ids({"a": [0, 1], "b": [2, 3]}, torch.tensor([3, 4]), 4)


def test_a_dataframe_is_a_schema_and_its_lengths_are_checked():
    frame = pd.DataFrame({"a": [0, 0], "b": [2, 1], "length": [3, 2]})
    assert span_ids(frame, torch.tensor([3, 2]), 3)[1].tolist() == [[0, 0, 1], [0, 1, -1]]
    with pytest.raises(TaskError, match=r"row 1: the schema says 2 tokens, the prompt has 3; a BOS counts"):
        span_ids(frame, torch.tensor([3, 3]), 3)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"a": [0, 0], "b": [2, 4], "c": [2, 3]},
            r"row 1: span 'b' begins at 4, behind 'c' at 3; expected spans in the",
        ),
        ({"a": [0, 0], "b": [2, 7]}, r"row 1: span 'b' begins at 7, behind \"the prompt's end\" at 5.*within 5 tokens"),
        ({"a": [2, 0], "b": [3, 3]}, r"row 0: the first span, 'a', begins at 2, expected 0 \(or 1 in every row"),
        ({"a": [0, 0], "b": [-1, 2]}, r"row 0: span 'a' begins at 0, behind 'b' at -1"),
        ({"a": [0, 0], "b": [1, 2.5]}, r"row 1: span 'b' begins at 2.5, expected the index of a token"),
        ({"a": [0, 0], "b": ["1", "two"]}, r"row 1: span 'b' begins at 'two', expected the index"),
        ({"a": [0, 0], "b": [1]}, r"span 'b' has 1 rows, the task has 2; give one index for each pair"),
        ({"length": [5, 5]}, r"got the spans \[\], expected columns by name"),
        ({"a": [1, 1], "BOS": [2, 2]}, r"position 0 is in no span, and 'BOS' begins elsewhere"),
    ],
)
def test_spans_that_do_not_tile_are_refused_and_the_row_is_named(schema, message):
    with pytest.raises(TaskError, match=message):
        span_ids(schema, torch.tensor([5, 5]), 5)


def test_spans_travel_with_a_task():
    tokens = torch.arange(12).reshape(3, 4)
    lengths = [4, 2, 3]
    task = from_tokens(
        tokens, tokens.flip(1), [1, 2, 3], [4, 5, 6], lengths=lengths, spans={"a": [0] * 3, "b": [2, 1, 1]}
    )
    batch = task.batches[0]
    assert task.spans == ("a", "b") and batch.spans.tolist() == [[0, 0, 1, 1], [0, 1, -1, -1], [0, 1, 1, -1]]
    assert batch.rows(torch.tensor([2, 0])).spans.tolist() == [batch.spans[2].tolist(), batch.spans[0].tolist()]
    assert batch.to("meta").spans.device.type == "meta"
    assert answer_spans(task) == {1}
    assert task.with_metric("prob-diff").spans == task.spans
    both = StubModel(d_vocab=12, causal=False)
    parts = from_tokens(
        tokens, tokens.flip(1), [1, 2, 3], [4, 5, 6], lengths=lengths, spans={"a": [0] * 3, "b": [2, 1, 1]}, vocab=both
    ).batches
    assert [part.spans.tolist() for part in parts] == [[[0, 1]], [[0, 1, 1]], [[0, 0, 1, 1]]]


def test_the_hash_of_a_task_tells_schemas_apart_and_knows_old_tasks_again():
    rows = ([[1, 2, 3]], [[1, 5, 3]])
    plain, a, b = (from_tokens(*rows, [1], [2], spans=s) for s in (None, {"x": [0], "y": [1]}, {"x": [0], "y": [2]}))
    assert len({data_sha256(t) for t in (plain, a, b)}) == 3
    assert data_sha256(plain) == data_sha256(from_tokens(*rows, [1], [2]))


def test_positions_can_stand_in_for_a_schema():
    task = from_tokens([[1, 2, 3], [1, 2, 0]], [[1, 5, 3], [1, 4, 0]], [1, 1], [2, 2], lengths=[3, 2])
    assert by_position(task).batches[0].spans.tolist() == [[0, 1, 2], [0, 1, -1]]
    ends = with_spans(task, "end")
    assert ends.spans == ("-3", "-2", "-1") and ends.batches[0].spans.tolist() == [[0, 1, 2], [1, 2, -1]]
    with pytest.raises(TaskError, match="2 to 3 tokens and no schema"):
        with_spans(task)
    same = from_tokens([[1, 2]], [[1, 5]], [1], [2])
    assert with_spans(same).spans == ("0", "1")
    assert fitted_to(same, ("0", "1", "2")).batches[0].spans.tolist() == [[0, 1]]
    assert fitted_to(same, ("-3", "-2", "-1")).batches[0].spans.tolist() == [[1, 2]]
    with pytest.raises(TaskError, match=r"this circuit has the spans a, b, and task 'own' has no schema"):
        fitted_to(same, ("a", "b"))


def test_numbers_come_together_by_span():
    values = torch.tensor([[1.0, -2.0, 4.0], [3.0, 5.0, 9.0]])[..., None].repeat(1, 1, 2)
    spans = torch.tensor([[0, 0, 2], [1, 1, -1]])
    for how, want in {
        "sum": [[-1.0, 0.0, 4.0], [0.0, 8.0, 0.0]],
        "mean": [[-0.5, 0.0, 4.0], [0.0, 4.0, 0.0]],
        "abs": [[3.0, 0.0, 4.0], [0.0, 8.0, 0.0]],
    }.items():
        assert by_span(values, spans, 3, how)[..., 1].tolist() == want


def write(path, rows):
    """A CSV file as pandas writes it, with the rows' numbers in a first column without a name."""
    pd.DataFrame(rows).to_csv(path)
    return path


def names_file(model, folder):
    """Indirect objects in the columns of the authors' files: prompt, a column per span, length, answers, and more."""
    people = [("Mary", "John", "Tom", "Anna"), ("Paul", "Sarah", "Mark", "Lisa")]
    endings = ("went to the store. {s} gave a ring to", "were at the old garden. {s} wanted to give a book to")
    clean, corrupt = [], []
    for (io, s, other, third), ending in zip(people, endings, strict=True):
        prompt = f"Then, {io} and {s} " + ending.format(s=s)
        tokens = ["BOS", *model.tokenizer.tokenize(prompt)]
        where = {name: tokens.index(f"Ġ{name}") for name in (io, s)}
        again = len(tokens) - 1 - tokens[::-1].index(f"Ġ{s}")
        starts = [1, where[io], where[io] + 1, where[s], where[s] + 1, where[s] + 2, again, again + 1, len(tokens) - 1]
        row = {"prompt": prompt, "prompt_id": 3, **dict(zip(GIVEN, starts, strict=True)), "length": len(tokens)}
        row |= {"wrong_token": f" {s}", "correct_token": f" {io}", "split": "circuit"}
        clean.append(row)
        corrupt.append(row | {"prompt": f"Then, {third} and {other} " + ending.format(s="Kevin")})
    return write(folder / "clean.csv", clean), write(folder / "corrupt.csv", corrupt)


def test_the_authors_files_for_indirect_objects_load(tmp_path):
    model = gpt2()
    clean, corrupt = names_file(model, tmp_path)
    columns = {"clean": "prompt", "corrupt": "prompt", "right": "correct_token", "wrong": "wrong_token"}
    task = Task.from_csv(model, clean, corrupt_path=corrupt, spans=GIVEN, prepend_bos=True, **columns)
    assert task.spans == ("BOS", *GIVEN)
    batch = task.batches[0]
    assert sorted(batch.lengths.tolist()) == sorted({*batch.lengths.tolist()}), "two lengths, told apart by the schema"
    for i, (io, s) in enumerate((("Mary", "John"), ("Paul", "Sarah"))):
        words = [model.tokenizer.decode(int(t)) for t in batch.clean[i]]
        at = {name: [words[p] for p in (batch.spans[i] == n).nonzero()] for n, name in enumerate(task.spans)}
        assert (at["IO"], at["and"], at["S1"], at["S2"], at["to"]) == (
            [f" {io}"],
            [" and"],
            [f" {s}"],
            [f" {s}"],
            [" to"],
        )
        assert "".join(word for name in task.spans[1:] for word in at[name]).startswith(f"Then, {io} and {s}")
        assert at["BOS"] == ["<|endoftext|>"]
        assert int(batch.spans[i, int(batch.positions[i])]) == task.spans.index("to")
    with pytest.raises(TaskError, match=r"row 0: the schema says \d+ tokens, the prompt has \d+; a BOS counts"):
        Task.from_csv(model, clean, corrupt_path=corrupt, spans=GIVEN, **columns)
    with pytest.raises(TaskError, match=r"has no column 'S3'; did you mean 'S"):
        Task.from_csv(model, clean, corrupt_path=corrupt, spans=(*GIVEN, "S3"), prepend_bos=True, **columns)


def test_files_that_disagree_on_a_span_are_refused(tmp_path):
    model = gpt2()
    clean, corrupt = names_file(model, tmp_path)
    frame = pd.read_csv(corrupt, index_col=0)
    frame.loc[1, "S2"] += 1
    frame.to_csv(corrupt)
    columns = {"clean": "prompt", "corrupt": "prompt", "right": "correct_token", "wrong": "wrong_token"}
    with pytest.raises(TaskError, match=r"row 1: 'S2' is \d+ in the clean file and \d+ in the corrupt one"):
        Task.from_csv(model, clean, corrupt_path=corrupt, spans=GIVEN, prepend_bos=True, **columns)


def test_the_authors_files_for_greater_than_load(tmp_path):
    """Their answers are sets (every later ending), so the table goes through `from_pairs` with the schema as it is."""
    model = gpt2()
    rows = []
    for noun, century, year in (("war", "17", 42), ("siege", "16", 15)):
        prompt = f"The {noun} lasted from the year {century}{year} to the year {century}"
        rows.append({"prompt": prompt, **{name: i + 1 for i, name in enumerate(YEARS)}, "length": 13, "label": year})
    frame = pd.read_csv(write(tmp_path / "clean.csv", rows), index_col=0)
    later = [[f"{y:02d}" for y in range(label + 1, 100)] for label in frame.label]
    sooner = [[f"{y:02d}" for y in range(label + 1)] for label in frame.label]
    corrupt = [p.replace(str(y), "01", 1) for p, y in zip(frame.prompt, frame.label, strict=True)]
    task = Task.from_pairs(
        model,
        frame.prompt,
        corrupt,
        later,
        sooner,
        spans=frame[[*YEARS, "length"]],
        prepend_bos=True,
        metric="prob-diff",
    )
    batch = task.batches[0]
    assert task.spans == ("BOS", *YEARS)
    assert batch.spans.tolist() == [list(range(13))] * 2
    year = batch.clean[torch.arange(2), (batch.spans == task.spans.index("YY")).int().argmax(1)]
    assert [model.tokenizer.decode(int(t)) for t in year] == ["42", "15"]


def test_a_schema_and_texts_of_different_lengths_are_refused_first():
    model = gpt2()
    assert len(encode(model, ["one two"])[0]) == 2
    with pytest.raises(TaskError, match="row 0: clean has 2 tokens and corrupt 3"):
        Task.from_pairs(model, ["one two"], ["one two three"], " a", " b", spans={"a": [0]})


def test_a_table_without_spans_reads_as_before(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["clean", "corrupt", "right", "wrong"], ["one two", "one six", " a", " b"]])
    task = Task.from_csv(gpt2(), path)
    assert task.spans == () and task.batches[0].spans is None
