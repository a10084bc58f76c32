"""Closing a bracket: the next character of a title depends on a kind of bracket several characters back."""

from __future__ import annotations

from circuitkit.errors import TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import choose, generator
from circuitkit.tasks.own import from_tokens

TITLES = (
    "My dog at the beach", "The view from my window", "A fox in the snow", "Sunset over the lake", "My first painting",
    "The moon last night", "New York in the rain", "A very old tree", "The cat and the box", "My new desk",
)  # fmt: skip
REMARKS = (
    "OC", "GIF", "Fixed", "1080p", "Spoilers", "crosspost", "1920x1080", "2560x1440", "3840x2160", "album in comments",
)  # fmt: skip
BRACKETS = ("()", "[]")
PAD, START = 0, "<s>"


@task("next-character")
def next_character(model: Vocabulary, *, n: int = 64, seed: int = 0) -> Task:
    """``A fox in the snow (GIF`` against ``A fox in the snow [GIF``: the round bracket is closed, or the square one.

    The two titles differ in the bracket alone, 2 to 17 characters before the end. Windows are filled up on the left,
    as in training; a title that is too long loses its beginning.

    Args:
        model: a network that predicts characters from a window: ``charlm/lstm``.
        n: how many pairs.
        seed: seed of the generator that draws them.

    Raises:
        TaskError: if the network is no such network, or there are fewer than n pairs.
    """
    ids = model.card.get("characters", {})
    if START not in ids or "window" not in model.card:
        raise TaskError(f"{model.name!r} does not predict characters from a window: use 'charlm/lstm'")
    rows = [(title, remark, *kinds) for title in TITLES for remark in REMARKS for kinds in (BRACKETS, BRACKETS[::-1])]
    chosen = choose(rows, n, generator(seed))
    clean, corrupt = ([_window(model, f"{row[0]} {row[k][0]}{row[1]}") for row in chosen] for k in (2, 3))
    right, wrong = ([ids[row[k][1]] for row in chosen] for k in (2, 3))
    return from_tokens(clean, corrupt, right, wrong, name="next-character", vocab=model)


def _window(model: Vocabulary, text: str) -> list[int]:
    tokens = [model.card["characters"][character] for character in (START, *text)][-model.card["window"] :]
    return [PAD] * (model.card["window"] - len(tokens)) + tokens
