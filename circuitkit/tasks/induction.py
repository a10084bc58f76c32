"""Repeated random tokens: what followed a token the first time follows it again."""

from __future__ import annotations

import torch

from circuitkit.errors import OptionError, TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import distinct, generator, pick, sample
from circuitkit.tasks.own import from_tokens
from circuitkit.tasks.text import bos_ids


@task("induction")
def induction(model: Vocabulary, *, n: int = 64, seed: int = 0, length: int | None = None) -> Task:
    """Random tokens ``.. A B .. D C ..`` and then the same again up to ``A``: B follows.

    In the corrupt input A and D are exchanged in the first copy: ``.. D B .. A C ..``, after which ``.. A``
    calls for C. So the tokens to copy from, and the token that asks, are the same in both; what differs is
    which token stood before B and before C, the news that a previous-token head brings to the keys of an
    induction head.

    Args:
        model: any model; special tokens are never drawn, and a tokenizer's BOS comes first.
        n: how many pairs.
        seed: seed of the generator that draws them.
        length: tokens in the first copy, all different; default: 16, or less where the context or vocabulary
            is small.

    Raises:
        OptionError: if length is below 5.
        TaskError: if the context or the vocabulary is too small.
    """
    bos, ids = bos_ids(model), _drawable(model)
    most = min(len(ids), (model.n_ctx - len(bos)) // 2)
    size = min(16, most) if length is None else length
    if length is not None and length < 5:
        raise OptionError(f"got length = {length}, expected at least 5 tokens to repeat")
    if size > most or size < 5:
        raise TaskError(
            f"{model.name!r} has a context of {model.n_ctx} and {len(ids)} ids to draw from, expected at "
            f"least {2 * max(size, 5) + len(bos)} and {max(size, 5)}; choose another length or model"
        )

    def draw(rng: torch.Generator) -> tuple[tuple[int, ...], int, int]:
        asked = int(torch.randint(size - 1, (1,), generator=rng))
        other = pick([i for i in range(size - 1) if abs(i - asked) > 1], rng)
        return tuple(sample(ids, size, rng)), asked, other

    clean, corrupt, right, wrong, lengths = [], [], [], [], []
    for first, asked, other in distinct(draw, n, generator(seed)):
        moved = list(first)
        moved[asked], moved[other] = moved[other], moved[asked]
        padding = [0] * (size - asked - 1)
        clean.append([*bos, *first, *first[: asked + 1], *padding])
        corrupt.append([*bos, *moved, *first[: asked + 1], *padding])
        right.append(first[asked + 1])
        wrong.append(first[other + 1])
        lengths.append(len(bos) + size + asked + 1)
    return from_tokens(clean, corrupt, right, wrong, lengths=lengths, name="induction", vocab=model)


def _drawable(model: Vocabulary) -> list[int]:
    """Ids of ordinary tokens: within the model and, if there is a tokenizer, within it and not special."""
    if model.tokenizer is None:
        return list(range(model.d_vocab))
    special = set(model.tokenizer.all_special_ids)
    return [i for i in range(min(model.d_vocab, len(model.tokenizer))) if i not in special]
