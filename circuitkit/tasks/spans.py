"""Which span of the prompt each token belongs to: from a schema of first tokens, or a span for every position.

A schema has one column per span, in the order of the spans in the prompt, with the index of the span's first token in
each row (a BOS at 0 counts). Spans tile the prompt: each ends where the next begins, the last one at the row's end; a
span that begins where the next one does is empty in that row. This is the form of the files of Haklay et al. 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.errors import OptionError, TaskError
from circuitkit.tasks.base import Batch, Task

LENGTH = "length"  # a column of this name gives the tokens of each row, for a check
BOS = "BOS"


def span_ids(
    schema: Any, lengths: Int[Tensor, " batch"], width: int
) -> tuple[tuple[str, ...], Int[Tensor, "batch pos"]]:
    """Names of the spans, and the number of each position's span; -1 behind the end of a row.

    Args:
        schema: columns by name (a dict or a DataFrame): for every row the index of the span's first token; and perhaps
            ``length``, which must be the number of tokens.
        lengths: real tokens in each row.
        width: positions of the result.

    If the first span begins at 1 in every row, position 0 (a BOS) becomes a span of its own, ``BOS``.

    Raises:
        TaskError: if the spans do not tile a prompt, naming the row.

    >>> span_ids({"who": [0, 0], "did": [1, 2]}, torch.tensor([3, 3]), 3)
    (('who', 'did'), tensor([[0, 1, 1],
            [0, 0, 1]]))
    """
    names = [name for name in schema if name != LENGTH]
    if not names or not all(isinstance(name, str) for name in names):
        raise TaskError(f"got the spans {names}, expected columns by name, one for each span")
    starts = torch.stack([_column(name, schema[name], len(lengths)) for name in names], 1).to(lengths.device)
    if LENGTH in schema:
        _check_lengths(_column(LENGTH, schema[LENGTH], len(lengths)).to(lengths.device), lengths)
    if bool((starts[:, 0] == 1).all()):
        if BOS in names:
            raise TaskError(f"position 0 is in no span, and {BOS!r} begins elsewhere; let the first span begin at 0")
        names, starts = [BOS, *names], torch.cat((torch.zeros_like(starts[:, :1]), starts), 1)
    _check_tiles(names, starts, lengths)
    where = torch.arange(width, device=lengths.device)
    ids = (starts[:, :, None] <= where).sum(1) - 1
    return tuple(names), ids.masked_fill(where >= lengths[:, None], -1)


def by_position(task: Task, *, from_end: bool = False) -> Task:
    """The task with every position as a span of its own, counted from the first token or back from the last.

    >>> from circuitkit.tasks.own import from_tokens
    >>> by_position(from_tokens([[1, 2]], [[1, 3]], right=[4], wrong=[5]), from_end=True).spans
    ('-2', '-1')
    """
    longest = max(int(batch.lengths.max()) for batch in task.batches)
    batches = []
    for batch in task.batches:
        where = torch.arange(batch.clean.shape[1], device=batch.clean.device).expand_as(batch.clean)
        padding = where >= batch.lengths[:, None]
        ids = where + longest - batch.lengths[:, None] if from_end else where
        batches.append(replace(batch, spans=ids.masked_fill(padding, -1)))
    names = tuple(str(i - longest if from_end else i) for i in range(longest))
    return replace(task, batches=tuple(batches), spans=names)


def with_spans(task: Task, spans: str = "auto") -> Task:
    """The task with spans: those of its schema, or a span for each position.

    Args:
        spans: ``auto`` takes the schema, or positions where all prompts have as many tokens; ``start`` and ``end`` take
            positions, counted from the first token or back from the last.

    Raises:
        OptionError: for another word.
        TaskError: if prompts differ in length and nothing says which positions belong together.
    """
    if spans not in ("auto", "start", "end"):
        raise OptionError(f"got spans = {spans!r}, expected 'auto', 'start' or 'end'; a schema belongs to the task")
    if spans in ("start", "end"):
        return by_position(task, from_end=spans == "end")
    if task.spans:
        return task
    lengths = torch.cat([batch.lengths.cpu() for batch in task.batches])
    if bool((lengths != lengths[0]).any()):
        raise TaskError(
            f"the prompts of task {task.name!r} have {int(lengths.min())} to {int(lengths.max())} tokens and no schema "
            "says which positions belong together; make the task with spans=, or use spans='end' (or 'start') to count "
            "positions from the end (or the start)"
        )
    return by_position(task)


def fitted_to(task: Task, names: Sequence[str]) -> Task:
    """The task with its positions numbered by spans of the given names, as a graph has them.

    Raises:
        TaskError: if neither its schema nor its positions have these names.
    """
    made = (lambda: task, lambda: by_position(task), lambda: by_position(task, from_end=True))
    for make in made:
        mine = make()
        if mine.spans and set(mine.spans) <= set(names):
            number = torch.tensor([*(names.index(name) for name in mine.spans), -1])
            batches = [replace(b, spans=number.to(spans_of(b).device)[spans_of(b)]) for b in mine.batches]
            return replace(mine, batches=tuple(batches), spans=tuple(names))
    raise TaskError(
        f"this circuit has the spans {', '.join(names)}, and task {task.name!r} "
        + (f"has {', '.join(task.spans)}" if task.spans else "has no schema of spans or longer prompts")
        + "; make the task with the same schema"
    )


def answer_spans(task: Task) -> set[int]:
    """Numbers of the spans in which any answer is read."""
    return {int(i) for batch in task.batches for i in spans_of(batch).gather(1, batch.positions).unique()}


def spans_of(batch: Batch) -> Int[Tensor, "batch pos"]:
    """The spans of a batch of a task that has some."""
    if batch.spans is None:
        raise TaskError("this task names spans but does not say where they are; make it with spans=")
    return batch.spans


def _column(name: str, values: Any, rows: int) -> Int[Tensor, " batch"]:
    found: list[int] = []
    for row, value in enumerate(values):
        try:
            whole = int(value)
            exact = whole == float(value)
        except (TypeError, ValueError):
            exact = False
        if not exact:
            raise TaskError(f"row {row}: span {name!r} begins at {value!r}, expected the index of a token")
        found.append(whole)
    if len(found) != rows:
        raise TaskError(f"span {name!r} has {len(found)} rows, the task has {rows}; give one index for each pair")
    return torch.tensor(found, dtype=torch.long)


def _check_lengths(said: Int[Tensor, " batch"], lengths: Int[Tensor, " batch"]) -> None:
    bad = (said != lengths).nonzero().flatten().tolist()
    if bad:
        row = bad[0]
        raise TaskError(
            f"row {row}: the schema says {int(said[row])} tokens, the prompt has {int(lengths[row])}; a BOS counts, so "
            "prepend_bos= may be other than it was when the schema was made"
        )


def _check_tiles(names: list[str], starts: Int[Tensor, "batch span"], lengths: Int[Tensor, " batch"]) -> None:
    for row, (first, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if first[0] != 0:
            raise TaskError(
                f"row {row}: the first span, {names[0]!r}, begins at {first[0]}, expected 0 (or 1 in every row, behind "
                "a BOS); every position belongs to a span"
            )
        for name, here, there in zip(names, first, [*first[1:], length], strict=True):
            if not here <= there:
                after = names[names.index(name) + 1] if name != names[-1] else "the prompt's end"
                raise TaskError(
                    f"row {row}: span {name!r} begins at {here}, behind {after!r} at {there}; expected spans in the "
                    f"order of the columns, within {length} tokens"
                )
