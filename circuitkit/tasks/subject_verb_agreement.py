"""Subject-verb agreement: a verb that agrees with the number of its subject."""

from __future__ import annotations

import torch

from circuitkit.errors import TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import distinct, generator, pick
from circuitkit.tasks.own import from_pairs
from circuitkit.tasks.text import single_token_words

NOUNS = {
    "teacher": "teachers", "doctor": "doctors", "friend": "friends", "brother": "brothers",
    "farmer": "farmers", "lawyer": "lawyers", "student": "students", "driver": "drivers", "artist": "artists",
    "writer": "writers", "neighbor": "neighbors", "player": "players", "singer": "singers", "guest": "guests",
    "soldier": "soldiers", "king": "kings", "girl": "girls", "boy": "boys", "author": "authors",
    "guard": "guards", "worker": "workers",
}  # fmt: skip
OTHERS = {
    "car": "cars", "house": "houses", "tree": "trees", "table": "tables", "door": "doors", "tower": "towers",
    "bridge": "bridges", "window": "windows", "truck": "trucks", "building": "buildings", "ship": "ships",
    "wall": "walls",
}  # fmt: skip
VERBS = {"is": "are", "was": "were", "has": "have", "does": "do"}
OPENINGS = ("The", "I know that the", "Nobody said that the", "People think the", "In this town the")
PLACES = ("near", "behind", "beside", "in front of", "next to")


@task("subject-verb-agreement")
def subject_verb_agreement(model: Vocabulary, *, n: int = 64, seed: int = 0, attractor: bool = True) -> Task:
    """``The teachers near the car``: are, were, have, do against is, was, has, does.

    The corrupt subject has the other number. The metric is the mean logit of the agreeing forms minus that of
    the others. Half of the clean subjects, on average, are plural, and the second noun's number is drawn
    independently of the subject's.

    Args:
        model: a model whose tokenizer has nouns and their plurals as single tokens.
        n: how many pairs.
        seed: seed of the generator that draws them.
        attractor: whether another noun stands between subject and verb.

    Raises:
        TaskError: if too few nouns or no verbs fit the tokenizer.
    """
    nouns = _both_numbers(model, NOUNS, 4, "nouns")
    others = [word for pair in _both_numbers(model, OTHERS, 4, "nouns") for word in pair]
    verbs = _both_numbers(model, VERBS, 1, "verbs")

    def draw(rng: torch.Generator) -> tuple[str, tuple[str, str], bool, str]:
        phrase = f" {pick(PLACES, rng)} the {pick(others, rng)}" if attractor else ""
        return pick(OPENINGS, rng), pick(nouns, rng), bool(torch.randint(2, (1,), generator=rng)), phrase

    clean, corrupt, right, wrong = [], [], [], []
    forms = [[f" {pair[number]}" for pair in verbs] for number in (0, 1)]
    for opening, noun, plural, phrase in distinct(draw, n, generator(seed)):
        clean.append(f"{opening} {noun[plural]}{phrase}")
        corrupt.append(f"{opening} {noun[not plural]}{phrase}")
        right.append(forms[plural])
        wrong.append(forms[not plural])
    return from_pairs(model, clean, corrupt, right, wrong, name="subject-verb-agreement")


def _both_numbers(model: Vocabulary, words: dict[str, str], least: int, what: str) -> list[tuple[str, str]]:
    """Pairs of singular and plural that are both one token."""
    fit = single_token_words(model, [*words, *words.values()], least=0, what=what)
    pairs = [pair for pair in words.items() if set(pair) <= set(fit)]
    if len(pairs) < least:
        raise TaskError(
            f"only {len(pairs)} of {len(words)} {what} are one token in both numbers for {model.name!r}, "
            f"expected at least {least}; this task needs a larger vocabulary of whole words (GPT-2's fits)"
        )
    return pairs
