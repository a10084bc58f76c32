"""A behaviour stated by the user: token ids, pairs of texts, or a CSV file. Rows are counted from 0.

Padding stands on the right, whatever side the tokenizer pads on: a causal model's real positions cannot see
it. For a model that is not causal the rows are grouped by length, so that no
batch has padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuitkit.cautions import caution
from circuitkit.errors import TaskError
from circuitkit.functional.metrics import METRICS, Metric
from circuitkit.tasks import rows as checked
from circuitkit.tasks.base import Batch, Task, Vocabulary
from circuitkit.tasks.columns import column, read_columns, schema_columns
from circuitkit.tasks.spans import span_ids
from circuitkit.tasks.text import answer_ids, encode, pad_right, show_tokens


def from_tokens(
    clean: Any,
    corrupt: Any,
    right: Any,
    wrong: Any = None,
    *,
    lengths: Any = None,
    positions: Any = None,
    target: Any = None,
    metric: str | Metric = "logit-diff",
    name: str = "own",
    vocab: Vocabulary | None = None,
    known: Sequence[str] | None = None,
    spans: Any = None,
) -> Task:
    """A task from token ids.

    Args:
        clean: inputs that show the behaviour, ``[n, pos]``, padded on the right with anything; for a recurrent network
            that reads numbers, these as a tensor ``[n, pos, size]``.
        corrupt: inputs of the same lengths that do not.
        right: ids counted as right: ``[n]``, ``[n, k]`` or ``[n, answer, k]`` (lists may be ragged, -1 is
            unused); None for a metric that needs none.
        wrong: ids counted as wrong, in the same forms.
        lengths: real tokens in each row; default: all.
        positions: where the answer is read, ``[n]`` or ``[n, answer]``; default: the last real token.
        target: numbers that a numerical output should equal: ``[n]``, ``[n, answer]`` or
            ``[n, answer, vocab]``.
        metric: a registered name, or a `Metric`.
        name: what the task is called.
        vocab: the model, to check ids and lengths against what it can read.
        known: names of the edges of the known circuit.
        spans: a schema: for each span, by name and in order, the index of its first token in every row; see
            `circuitkit.tasks.spans`.

    Raises:
        TaskError: if the behaviour is not well stated; the message names the row.
        UnknownName: for a metric that is not registered.

    >>> task = from_tokens([[1, 2], [3, 4]], [[1, 5], [3, 5]], right=[7, 8], wrong=[8, 7])
    >>> task, task.batches[0].right.shape
    (Task(own, 2 pairs, logit-diff), torch.Size([2, 1, 1]))
    """
    measure = METRICS[metric] if isinstance(metric, str) else metric
    batch = _batch(vocab, clean, corrupt, lengths, positions, right, wrong, target)
    names: tuple[str, ...] = ()
    if spans is not None:
        names, ids = span_ids(spans, batch.lengths, batch.clean.shape[1])
        batch = replace(batch, spans=ids)
    _check_differs(batch)
    checked.check_needs(measure, batch)
    checked.check_overlap(batch)
    ragged = len(batch.lengths.unique()) > 1
    parts = (batch,) if checked.is_causal(vocab) or not ragged else _by_length(batch)
    return Task(name, parts, measure, tuple(known) if known is not None else None, names)


def from_pairs(
    model: Vocabulary,
    clean: Sequence[str],
    corrupt: Sequence[str],
    right: Any,
    wrong: Any = None,
    *,
    metric: str | Metric = "logit-diff",
    name: str = "own",
    prepend_bos: bool | None = None,
    known: Sequence[str] | None = None,
    spans: Any = None,
) -> Task:
    """A task from pairs of texts; the answer is the token that follows.

    Args:
        model: whose tokenizer is used.
        clean: texts that show the behaviour.
        corrupt: texts of as many tokens that do not.
        right: for each row the right answer or a list of them, with its leading space; one string serves all
            rows.
        wrong: the wrong answers, likewise.
        metric: a registered name, or a `Metric`.
        name: what the task is called.
        prepend_bos: True puts a BOS token first, False leaves it out, None does what the tokenizer does.
        known: names of the edges of the known circuit.
        spans: a schema, as for `from_tokens`; indices count tokens, a BOS included.

    Raises:
        TaskError: if the behaviour is not well stated; the message names the row.
        UnknownName: for a metric that is not registered.
    """
    clean, corrupt = _texts(clean, "clean"), _texts(corrupt, "corrupt")
    if len(clean) != len(corrupt):
        raise TaskError(f"got {len(clean)} clean and {len(corrupt)} corrupt texts, expected as many of each")
    inputs, others = (
        encode(model, clean, prepend_bos=prepend_bos),
        encode(model, corrupt, prepend_bos=prepend_bos),
    )
    for row, (a, b) in enumerate(zip(inputs, others, strict=True)):
        if len(a) != len(b):
            raise TaskError(
                f"row {row}: clean has {len(a)} tokens and corrupt {len(b)}, expected as many: "
                f"clean {show_tokens(model, a)}, corrupt {show_tokens(model, b)}"
            )
    tokens, lengths = pad_right(inputs)
    return from_tokens(
        tokens,
        pad_right(others)[0],
        _answer_rows(model, clean, right, "right"),
        _answer_rows(model, clean, wrong, "wrong"),
        lengths=lengths,
        metric=metric,
        name=name,
        vocab=model,
        known=known,
        spans=spans,
    )


def from_csv(
    model: Vocabulary,
    path: str | Path,
    *,
    clean: str = "clean",
    corrupt: str = "corrupt",
    right: str = "right",
    wrong: str | None = "wrong",
    separator: str | None = None,
    metric: str | Metric = "logit-diff",
    name: str | None = None,
    prepend_bos: bool | None = None,
    spans: Sequence[str] = (),
    corrupt_path: str | Path | None = None,
) -> Task:
    """A task from a CSV file (UTF-8, with a header), one pair per row.

    Args:
        model: whose tokenizer is used.
        path: the file.
        clean: name of the column of clean texts.
        corrupt: name of the column of corrupt texts.
        right: name of the column of right answers, each with its leading space.
        wrong: name of the column of wrong answers; may be missing if the metric needs none.
        separator: what stands between several answers in one cell; None: a cell is one answer.
        metric: a registered name, or a `Metric`.
        name: what the task is called; default: the file's name.
        prepend_bos: True puts a BOS token first, False leaves it out, None does what the tokenizer does.
        spans: names of columns, in the order of the prompt, with the index of each span's first token; a column
            ``length`` is checked if there is one.
        corrupt_path: the file with the corrupt texts, row by row, if it is another one.

    Raises:
        FormatError: if the file is missing or not such a table.
        TaskError: if a column is missing, or the behaviour is not well stated; the message names the row.
    """
    columns = read_columns(path)
    others = columns if corrupt_path is None else read_columns(corrupt_path)
    measure = METRICS[metric] if isinstance(metric, str) else metric
    if wrong not in columns and "wrong" not in measure.needs:
        wrong = None
    chosen: dict[str, list[str] | None] = {}
    for role, name_of in {"clean": clean, "right": right, "wrong": wrong}.items():
        chosen[role] = None if name_of is None else column(columns, name_of, path)
    chosen["corrupt"] = column(others, corrupt, path if corrupt_path is None else corrupt_path)
    for role in ("right", "wrong"):
        cells = chosen[role]
        if separator is not None and cells is not None:
            chosen[role] = [cell.split(separator) for cell in cells]  # type: ignore[misc]
    return from_pairs(
        model,
        chosen["clean"] or [],
        chosen["corrupt"] or [],
        chosen["right"],
        chosen["wrong"],
        metric=measure,
        name=name or Path(path).stem,
        prepend_bos=prepend_bos,
        spans=schema_columns(columns, others, spans, path) if spans else None,
    )


def _batch(
    vocab: Vocabulary | None,
    clean: Any,
    corrupt: Any,
    lengths: Any,
    positions: Any,
    right: Any,
    wrong: Any,
    target: Any,
) -> Batch:
    inputs, others = checked.input_rows(clean, "clean"), checked.input_rows(corrupt, "corrupt")
    if inputs.shape != others.shape:
        raise TaskError(f"clean is {tuple(inputs.shape)} and corrupt {tuple(others.shape)}, expected the same shape")
    real = checked.real_lengths(lengths, inputs)
    where = checked.answer_positions(positions, real)
    inputs, others = (
        checked.inputs(inputs, real, vocab, "clean"),
        checked.inputs(others, real, vocab, "corrupt"),
    )
    size = checked.output_size(vocab)
    return Batch(
        clean=inputs,
        corrupt=others.to(inputs.device),
        lengths=real,
        positions=where,
        right=checked.answers(right, where, size, "right"),
        wrong=checked.answers(wrong, where, size, "wrong"),
        target=checked.numbers(target, where),
    )


def _texts(texts: Any, what: str) -> list[str]:
    rows = [texts] if isinstance(texts, str) else list(texts)
    if not rows:
        raise TaskError(f"{what} is empty, expected at least one pair")
    return rows


def _answer_rows(model: Vocabulary, contexts: list[str], answers: Any, what: str) -> list[list[int]] | None:
    if answers is None:
        return None
    rows = [answers] * len(contexts) if isinstance(answers, str) else list(answers)
    if len(rows) != len(contexts):
        raise TaskError(f"got {len(contexts)} pairs and {len(rows)} rows of {what} answers, expected as many")
    per_row = [[row] if isinstance(row, str) else list(row) for row in rows]
    owner = [i for i, row in enumerate(per_row) for _ in row]
    flat = [answer for row in per_row for answer in row]
    ids = iter(answer_ids(model, [contexts[i] for i in owner], flat, rows=owner))
    return [[next(ids) for _ in row] for row in per_row]


def _check_differs(batch: Batch) -> None:
    same = (batch.clean == batch.corrupt).flatten(1).all(1).nonzero().flatten().tolist()
    if len(same) == len(batch):
        raise TaskError(
            "clean and corrupt are the same in every row, so nothing can be scored; change the corrupt inputs"
        )
    if same:
        some = ", ".join(map(str, same[:8])) + (", ..." if len(same) > 8 else "")
        caution(f"clean and corrupt are the same in {len(same)} of {len(batch)} rows ({some}); they score 0")


def _by_length(batch: Batch) -> tuple[Batch, ...]:
    parts = []
    for length in sorted(set(batch.lengths.tolist())):
        rows = batch.rows((batch.lengths == length).nonzero().flatten())
        spans = None if rows.spans is None else rows.spans[:, :length]
        parts.append(replace(rows, clean=rows.clean[:, :length], corrupt=rows.corrupt[:, :length], spans=spans))
    return tuple(parts)
