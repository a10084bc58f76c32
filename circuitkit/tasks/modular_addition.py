"""Addition modulo p: the own task of the trained clock and pizza models."""

from __future__ import annotations

from typing import Literal

import torch

from circuitkit.errors import OptionError, TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import choose, generator
from circuitkit.tasks.own import from_tokens


@task("modular-addition")
def modular_addition(
    model: Vocabulary,
    *,
    n: int = 64,
    seed: int = 0,
    p: int | None = None,
    replace: Literal["both", "first", "second"] = "both",
) -> Task:
    """``a, b``: (a + b) mod p is read at b; the corrupt input has other addends with another sum, the wrong
    answer.

    Args:
        model: a model of two numbers; ids 0 to p - 1 are the numbers.
        n: how many pairs; every clean (a, b) occurs once.
        seed: seed of the generator that draws them.
        p: the modulus; default: the size of the vocabulary.
        replace: which addends the corrupt input replaces.

    Raises:
        OptionError: if p does not fit the vocabulary, or replace is none of the three.
        TaskError: if the model reads text or fewer than two tokens, or there are fewer than n pairs.
    """
    if model.tokenizer is not None or model.n_ctx < 2:
        raise TaskError(f"{model.name!r} does not add numbers; use a modular addition model such as 'modadd/two_layer'")
    modulus = model.d_vocab if p is None else p
    if not 3 <= modulus <= model.d_vocab:
        raise OptionError(f"got p = {p}, expected between 3 and the {model.d_vocab} ids of {model.name!r}")
    if replace not in ("both", "first", "second"):
        raise OptionError(f"got replace = {replace!r}, expected 'both', 'first' or 'second'")
    rng = generator(seed)
    clean = choose([(a, b) for a in range(modulus) for b in range(modulus)], n, rng)
    corrupt = [_other(pair, modulus, replace, rng) for pair in clean]
    right, wrong = ([(a + b) % modulus for a, b in pairs] for pairs in (clean, corrupt))
    return from_tokens(clean, corrupt, right, wrong, name="modular-addition", vocab=model)


def _other(pair: tuple[int, int], p: int, replace: str, rng: torch.Generator) -> tuple[int, int]:
    first, second = pair
    while True:
        a, b = torch.randint(1, p, (2,), generator=rng).tolist()
        a, b = (0 if replace == "second" else a), (0 if replace == "first" else b)
        if (a + b) % p:
            return (first + a) % p, (second + b) % p
