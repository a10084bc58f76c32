"""Compiled programs, whose circuit is known because a compiler wrote it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from circuitkit.errors import OptionError, TaskError
from circuitkit.tasks.base import Batch, Task, Vocabulary, task
from circuitkit.tasks.draw import choose, generator, pick
from circuitkit.tasks.own import from_tokens

NEEDED = ("components", "examples", "input_tokens", "output_values", "output_variable")
INPUT_WRITES = frozenset({"tokens", "indices", "one"})
HEAD_READS = {"<q>": "reads_query", "<k>": "reads_key", "<v>": "reads_value"}


@dataclass(frozen=True)
class _Row:
    """One pair: ids of both inputs, and their outputs at the clean input's positions (None: not defined)."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    output: tuple[Any, ...]
    corrupt_output: tuple[Any, ...]


@task("tracr")
def tracr(
    model: Vocabulary, *, n: int = 64, seed: int = 0, corrupt: Literal["same-length", "shorter"] | None = None
) -> Task:
    """The program of a ``tracr/<program>`` model, read at every position after BOS, with its known circuit.

    Inputs are the examples stored beside the weights; a pair is two of them with different outputs. Right is
    the program's output on the clean input; wrong is its output on the corrupt one, or another seeded value
    where the two agree. Programs with numbers as output are judged by the squared error. These models are not
    causal: one batch per length.

    Known circuit: an edge u -> v wherever a variable that u writes is one that v reads. Variables that the
    pair does not change (``one``, ``indices``, anything computed from the length) give edges of the circuit
    that score 0 here.

    Args:
        model: a model whose card has components, examples and names of tokens.
        n: how many pairs.
        seed: seed of the generator that draws them.
        corrupt: ``same-length``, or ``shorter``: a shorter input filled up with PAD, which also changes what
            depends on the length (PAD is inert in hist, reverse, length, frac_prevs and pair_balance; in
            sort_unique it is a value, and the program's output is not defined). Default: same-length, unless
            no two inputs of one length have different outputs, as in ``length``.

    Raises:
        OptionError: for another value of corrupt.
        TaskError: if the model is no compiled program, or fewer than n pairs exist.
    """
    card = model.card
    if missing := [key for key in NEEDED if key not in card]:
        raise TaskError(
            f"{model.name!r} is no compiled program, its card lacks {', '.join(missing)}; use 'tracr/hist' or"
            " another of the zoo's"
        )
    if corrupt not in (None, "same-length", "shorter"):
        raise OptionError(f"got corrupt = {corrupt!r}, expected 'same-length', 'shorter' or None")
    rng = generator(seed)
    rows = _pairs(card, shorter=corrupt == "shorter")
    if not rows and corrupt is None:
        rows = _pairs(card, shorter=True)
    chosen = choose(rows, n, rng)
    batches: list[Batch] = []
    for length in sorted({len(row.clean) for row in chosen}):
        group = [row for row in chosen if len(row.clean) == length]
        positions = [list(range(1, length))] * len(group)
        answers = _answers(card, group, rng)
        part = from_tokens(
            [row.clean for row in group],
            [row.corrupt for row in group],
            positions=positions,
            vocab=model,
            **answers,
        )
        batches += part.batches
    return Task("tracr", tuple(batches), part.metric, known_edges(card))


def known_edges(card: dict[str, Any]) -> tuple[str, ...]:
    """The edges along which a compiled program's variables travel.

    >>> mlp = {"component": "L0MLP", "reads": ["tokens"], "writes": ["y"]}
    >>> known_edges({"components": [mlp], "output_variable": "y"})
    ('input->m0', 'm0->logits')
    """
    writers: list[tuple[str, int, frozenset[str]]] = [("input", -1, INPUT_WRITES)]
    readers: list[tuple[str, int, frozenset[str]]] = []
    for part in card["components"]:
        name, stage = _component(part["component"])
        writers.append((name, stage, frozenset(part["writes"])))
        slots = {"": "reads"} if "reads" in part else HEAD_READS
        readers += [(name + slot, stage, frozenset(part[key])) for slot, key in slots.items()]
    last = max(stage for _, stage, _ in writers) + 1
    readers.append(("logits", last, frozenset({card["output_variable"]})))
    return tuple(
        f"{source}->{reader}"
        for source, written_at, written in writers
        for reader, read_at, read in readers
        if written_at < read_at and written & read
    )


def _component(name: str) -> tuple[str, int]:
    """``L0H1`` as a0.h1 at stage 0; ``L0MLP`` as m0 at stage 1."""
    match = re.fullmatch(r"L(\d+)(?:H(\d+)|MLP)", name)
    if match is None:
        raise TaskError(f"the card names a component {name!r}, expected L0H0 or L0MLP")
    layer, head = match.groups()
    return (f"m{layer}", 2 * int(layer) + 1) if head is None else (f"a{layer}.h{head}", 2 * int(layer))


def _pairs(card: dict[str, Any], *, shorter: bool) -> list[_Row]:
    """Every ordered pair of different stored inputs whose outputs differ somewhere."""
    ids = card["input_tokens"]
    if shorter and "PAD" not in ids:
        raise TaskError("corrupt='shorter' fills up with PAD, and this program has no PAD token; use 'same-length'")
    outputs = {tuple(ids[str(t)] for t in example["input"]): example["output"][1:] for example in card["examples"]}
    rows = []
    for clean, output in outputs.items():
        for other, other_output in outputs.items():
            gap = len(clean) - len(other)
            if gap < 0 or (gap > 0) != shorter:
                continue
            aligned = (*other_output, *[None] * gap)
            if any(b is not None and _differ(a, b) for a, b in zip(output, aligned, strict=True)):
                rows.append(_Row(clean, (*other, *[ids.get("PAD", 0)] * gap), tuple(output), aligned))
    return rows


def _differ(a: Any, b: Any) -> bool:
    # Stored numerical outputs carry rounding errors of the compiled model.
    return abs(a - b) > 1e-4 if isinstance(a, float) and isinstance(b, float) else a != b


def _answers(card: dict[str, Any], rows: list[_Row], rng: torch.Generator) -> dict[str, Any]:
    if not isinstance(card["output_values"], dict):
        return {"right": None, "target": [list(row.output) for row in rows], "metric": "squared-error"}
    index = {str(value): int(i) for i, value in card["output_values"].items()}
    right = [[[index[str(value)]] for value in row.output] for row in rows]
    wrong = []
    for row in rows:
        pairs = zip(row.output, row.corrupt_output, strict=True)
        wrong.append([[_wrong(index, str(a), None if b is None else str(b), rng)] for a, b in pairs])
    return {"right": right, "wrong": wrong, "metric": "logit-diff"}


def _wrong(index: dict[str, int], right: str, corrupt: str | None, rng: torch.Generator) -> int:
    if corrupt is not None and corrupt != right:
        return index[corrupt]
    return pick([i for value, i in index.items() if value != right], rng)
