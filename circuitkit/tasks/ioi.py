"""Indirect object identification (Wang et al. 2022): of two names, the one that is not the giver."""

from __future__ import annotations

from typing import Literal

import torch

from circuitkit.errors import OptionError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import distinct, generator, pick, sample
from circuitkit.tasks.own import from_pairs
from circuitkit.tasks.text import single_token_words

TEMPLATES = (
    "When {a} and {b} arrived at the {place}, {s} gave a {thing} to",
    "After {a} and {b} had left the {place}, {s} handed a {thing} to",
    "While {a} and {b} were walking to the {place}, {s} showed a {thing} to",
    "On Sunday {a} and {b} met near the {place}. Before dinner {s} brought a {thing} to",
    "Yesterday {a} and {b} worked at the {place}. In the evening {s} passed a {thing} to",
    "The {place} was closed, so {a} and {b} went home. There {s} offered a {thing} to",
    "In the spring {a} and {b} had lunch at the {place}, and then {s} sent a {thing} to",
    "Because {a} and {b} both liked the {place}, {s} promised a {thing} to",
)
NAMES = (
    "Mary", "John", "Tom", "James", "Sarah", "Michael", "David", "Robert", "Paul", "Mark", "Laura", "Kevin",
    "Susan", "Peter", "Anna", "Daniel", "Emily", "Jack", "Alice", "George", "Henry", "Lisa", "Martin",
    "Rachel", "Simon", "Julia", "Steve", "Kate", "Alex", "Adam", "Brian", "Frank", "Helen", "Jane", "Karen",
    "Linda", "Nick", "Oscar", "Ruth", "Sam", "Tim", "Victor",
)  # fmt: skip
PLACES = ("store", "garden", "school", "library", "office", "station", "museum", "market", "beach", "park")
THINGS = ("book", "drink", "letter", "ring", "ball", "key", "gift", "map", "phone", "flower", "card", "coat")


@task("ioi")
def ioi(
    model: Vocabulary,
    *,
    n: int = 64,
    seed: int = 0,
    corrupt: Literal["giver", "names", "exchanged"] = "giver",
) -> Task:
    """``When A and B arrived .., B gave a book to``: " A" against " B"; either name may come first.

    Corrupt inputs: ``giver`` puts a third name in place of the giver, so that no name is repeated; ``names``
    replaces all three by three unrelated names (the ABC distribution of Wang et al.); ``exchanged`` makes A
    the giver, so that B becomes right.

    Args:
        model: a model whose tokenizer has names as single tokens.
        n: how many pairs.
        seed: seed of the generator that draws them.
        corrupt: ``giver``, ``names`` or ``exchanged``.

    Raises:
        OptionError: for another value of corrupt.
        TaskError: if too few names, places or things are one token.
    """
    if corrupt not in ("giver", "names", "exchanged"):
        raise OptionError(f"got corrupt = {corrupt!r}, expected 'giver', 'names' or 'exchanged'")
    names = list(single_token_words(model, NAMES, least=8, what="names"))
    places = list(single_token_words(model, PLACES, least=2, what="places"))
    things = list(single_token_words(model, THINGS, least=2, what="things"))

    def draw(rng: torch.Generator) -> tuple[str, tuple[str, ...], bool, str, str]:
        first = bool(torch.randint(2, (1,), generator=rng))
        return pick(TEMPLATES, rng), tuple(sample(names, 5, rng)), first, pick(places, rng), pick(things, rng)

    clean, changed, right, wrong = [], [], [], []
    for template, (io, s, *others), first, place, thing in distinct(draw, n, generator(seed)):
        a, b = (io, s) if first else (s, io)
        words = {"a": a, "b": b, "s": s, "place": place, "thing": thing}
        other = {
            "giver": {"s": others[0]},
            "names": dict(zip("abs", others, strict=True)),
            "exchanged": {"s": io},
        }[corrupt]
        clean.append(template.format(**words))
        changed.append(template.format(**{**words, **other}))
        right.append(f" {io}")
        wrong.append(f" {s}")
    return from_pairs(model, clean, changed, right, wrong, name="ioi")
