"""Explore the graphs of several prompts at once: every round of rows is one sweep for all of them."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.features.explore import (
    CHUNKS,
    FEWEST,
    Explored,
    Request,
    Table,
    add_constants,
    check_sums,
    rows_at_once,
    rows_of,
)
from circuitkit.features.local import LocalModel
from circuitkit.features.pack import sweep_together
from circuitkit.features.sweep import Effects

Exploration = Generator[Request, Explored, Explored]
TOGETHER = 64  # tokens of prompts that run together
SWEPT = 10  # tokens of the longest prompts that are swept together: longer ones fill a processor by themselves
LEAST = 4  # prompts that are swept together: for fewer, putting them side by side costs more than it saves
SHORTEST = 0.75  # length of the shortest of these, as a share of the longest


def buckets(lengths: Sequence[int], keys: Sequence[Hashable]) -> list[list[int]]:
    """Which prompts go together: of one key, of few tokens in all, and of lengths not far from the longest.

    >>> buckets([8, 8, 200, 8, 9], [0, 0, 0, 1, 0])
    [[0, 1, 4], [3], [2]]
    """
    made: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        for some in made:
            near = lengths[some[0]] >= SHORTEST * lengths[i]
            if keys[some[0]] == keys[i] and near and (len(some) + 1) * lengths[i] <= TOGETHER:
                some.append(i)
                break
        else:
            made.append([i])
    return made


def explore_together(
    locals_: Sequence[LocalModel], explorations: Sequence[Exploration], budget: int | None = None
) -> list[Explored]:
    """Rows of each prompt's graph, short prompts in one sweep; see `circuitkit.features.explore.exploration`.

    Args:
        locals_: the local replacement model of each prompt.
        explorations: what is asked of each.
        budget: bytes that one sweep may take.
    """
    if 1 < len(locals_) < LEAST or (len(locals_) > 1 and max(len(x.tokens) for x in locals_) > SWEPT):
        alone = zip(locals_, explorations, strict=True)
        return [explore_together([local], [asking], budget)[0] for local, asking in alone]
    found: dict[int, Explored] = {}
    requests = {i: next(asking) for i, asking in enumerate(explorations)}
    while requests:
        who = list(requests)
        tables, outs = [requests[i][0] for i in who], [requests[i][1] for i in who]
        answers, requests = rows_together([locals_[i] for i in who], tables, outs, budget), {}
        for i, answer in zip(who, answers, strict=True):
            try:
                requests[i] = explorations[i].send(answer)
            except StopIteration as done:
                found[i] = done.value
    return [found[i] for i in range(len(explorations))]


def rows_together(
    locals_: Sequence[LocalModel], tables: Sequence[Table], outs: Sequence[Effects], budget: int | None = None
) -> list[Explored]:
    """Rows of some targets of several prompts, in chunks that fit a budget, each row tested.

    Args:
        locals_: the local replacement model of each prompt.
        tables: the targets in each.
        outs: where rows go, zeros, one column for each source or more.
        budget: bytes that one sweep may take.

    Raises:
        UnsupportedModel: if a row does not add up to its target.
    """
    if len(locals_) == 1:
        return [rows_of(locals_[0], tables[0], budget, outs[0])]
    most = max(len(table.numbers) for table in tables)
    fit = min(rows_at_once(local, budget) for local in locals_) // len(locals_)
    at_once = min(max(1, fit), max(FEWEST, -(-most // CHUNKS)))
    totals = [out.new_zeros(len(table.numbers)) for table, out in zip(tables, outs, strict=True)]
    # Positions rise, so that a chunk's last one is not far behind its others, in no prompt.
    orders = [table.positions.argsort(stable=True).tensor_split(-(-most // at_once)) for table in tables]
    for some in zip(*orders, strict=True) if most else ():
        _chunk(locals_, tables, outs, totals, some)
    for local, table, out, total in zip(locals_, tables, outs, totals, strict=True):
        check_sums(local, table, out, total)
    return [Explored(table.numbers, out, total) for table, out, total in zip(tables, outs, totals, strict=True)]


def _chunk(
    locals_: Sequence[LocalModel],
    tables: Sequence[Table],
    outs: Sequence[Effects],
    totals: Sequence[Tensor],
    some: Sequence[Int[Tensor, " target"]],
) -> None:
    chunks = []
    for table, rows in zip(tables, some, strict=True):
        mask = torch.zeros(len(table.numbers), dtype=torch.bool, device=rows.device)
        mask[rows] = True
        chunks.append(table.take(mask))
    places = [which.sort().values for which in some]
    sweep_together(locals_, [chunk.reads for chunk in chunks], outs, places)
    for local, chunk, which, out, total in zip(locals_, chunks, places, outs, totals, strict=True):
        add_constants(local, chunk, out, which)
        total[which] = torch.cat([total[:0], *(reads.values for reads in chunk.reads)])
