"""Docstring completion (Heimersheim and Janiak 2023): the next argument to be documented."""

from __future__ import annotations

from typing import Literal

import torch

from circuitkit.errors import OptionError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import distinct, generator, pick, sample
from circuitkit.tasks.own import from_pairs
from circuitkit.tasks.text import single_token_words

TEMPLATE = '''def {f}(self, {a}, {b}, {c}, {d}, {e}, {g}):
    """{s} {t}

    :param {c}: {u} {v}
    :param {d}: {w} {x}
    :param'''
ARGUMENTS = (
    "files", "size", "path", "name", "value", "key", "line", "page", "color", "image", "table", "index",
    "state", "user", "token", "model", "code", "port", "host", "mode", "time", "date", "level", "label",
    "field", "group", "item", "offset", "frame", "order", "event", "score", "width", "depth", "shape", "node",
    "task", "role", "text", "type", "range", "count",
)  # fmt: skip
WORDS = (
    "river", "garden", "paper", "music", "stone", "winter", "bread", "cloud", "horse", "silver", "street",
    "water", "bird", "forest", "market", "summer", "kitchen", "mountain", "engine", "window", "letter",
    "cotton", "island", "village",
)  # fmt: skip
FUNCTIONS = ("load", "send", "check", "find", "open", "read", "close", "build", "start", "stop", "merge")


@task("docstring")
def docstring(
    model: Vocabulary,
    *,
    n: int = 64,
    seed: int = 0,
    corrupt: Literal["signature", "both"] = "signature",
) -> Task:
    """After two of a function's six arguments are documented in order: the next against the five others.

    Corrupt inputs: ``signature`` gives the function six other arguments, so that nothing tells which comes
    next and the docstring stays; ``both`` also documents two of those new arguments.

    Args:
        model: a model whose tokenizer has argument names as single tokens.
        n: how many pairs.
        seed: seed of the generator that draws them.
        corrupt: ``signature`` or ``both``.

    Raises:
        OptionError: for another value of corrupt.
        TaskError: if too few words are one token.
    """
    if corrupt not in ("signature", "both"):
        raise OptionError(f"got corrupt = {corrupt!r}, expected 'signature' or 'both'")
    arguments = list(single_token_words(model, ARGUMENTS, least=14, what="argument names"))
    words = list(single_token_words(model, WORDS, least=8, what="words"))
    functions = list(single_token_words(model, FUNCTIONS, least=2, what="function names"))

    def draw(rng: torch.Generator) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        return pick(functions, rng), tuple(sample(arguments, 12, rng)), tuple(sample(words, 6, rng))

    clean, changed, right, wrong = [], [], [], []
    for function, names, filler in distinct(draw, n, generator(seed)):
        text = {"f": function, **dict(zip("stuvwx", filler, strict=True))}
        own, other = dict(zip("abcdeg", names[:6], strict=True)), dict(zip("abcdeg", names[6:], strict=True))
        clean.append(TEMPLATE.format(**text, **own))
        if corrupt == "both":
            changed.append(TEMPLATE.format(**text, **other))
        else:
            signature, body = (TEMPLATE.format(**text, **part).split("\n", 1) for part in (other, own))
            changed.append(f"{signature[0]}\n{body[1]}")
        right.append(f" {own['e']}")
        wrong.append([f" {name}" for letter, name in own.items() if letter != "e"])
    return from_pairs(model, clean, changed, right, wrong, name="docstring")
