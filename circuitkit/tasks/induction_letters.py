"""The own task of the trained two-layer attention-only model: eight letters, the last of them seen before.

Known circuit: a0.h0 looks one position back and writes, at B, that A came before; a1.h0 asks from the last A for that
mark, finds B and copies it. By default a pair differs at one position only, from which a1.h0 takes neither its query
nor the letter it copies. So three edges in a row carry all of the difference, and are the ``contrast``:
``input->a0.h0<v>`` (which letter came before), ``a0.h0->a1.h0<k>`` (the mark, as a key) and ``a1.h0->logits`` (the
copy). The edges that bring the question and the letter, ``input->a1.h0<q>`` and ``input->a1.h0<v>``, carry the same
in both inputs: they score 0 here and count only where an edge is replaced by a mean or by zero. With them the circuit
is the ``mechanism`` (measured: with every other edge at its mean per position, accuracy 0.98; the three alone, 0.03).
a0.h0 finds the previous position by position alone, so its query and key are needed under zero ablation only
(accuracy 0.81 with them, 0.02 without).

Wrong answer: with ``broken``, A itself, what a head says that finds the letter and forgets the step to its successor.
With ``moved``, A changes places with another letter D followed by C, and the wrong answer is C. The three edges are
bottlenecks in series: with ``moved`` their exact scores agree to 1 % and their order is chance. With ``broken``,
``a0.h0->a1.h0<k>`` was first for 40 of 40 seeds (n = 64), sometimes by as little as 0.1 % before ``input->a0.h0<v>``.
"""

from __future__ import annotations

from typing import Literal

import torch

from circuitkit.errors import OptionError, TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import distinct, generator, pick, sample
from circuitkit.tasks.own import from_tokens

LENGTH = 8
CONTRAST = ("input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits")
MECHANISM = (*CONTRAST, "input->a1.h0<q>", "input->a1.h0<v>")


@task("induction-letters")
def induction_letters(
    model: Vocabulary,
    *,
    n: int = 64,
    seed: int = 0,
    corrupt: Literal["broken", "moved"] = "broken",
    known: Literal["contrast", "mechanism"] = "contrast",
) -> Task:
    """``.. A B .. A``: B follows. In the corrupt input another letter stands where A first stood.

    The head of this file says which edges are known, why, and what the wrong answers mean.

    Args:
        model: ``induction/trained`` or its damaged control, or any model over letters with a context of 8.
        n: how many pairs.
        seed: seed of the generator that draws them.
        corrupt: ``broken`` or ``moved``.
        known: which known circuit the task carries.

    Raises:
        OptionError: for another value of corrupt or known.
        TaskError: if the model has a tokenizer, fewer than 12 ids, or a context that is not 8.
    """
    if corrupt not in ("broken", "moved") or known not in ("contrast", "mechanism"):
        raise OptionError(
            f"got corrupt={corrupt!r} and known={known!r}, expected 'broken' or 'moved', and 'contrast' or 'mechanism'"
        )
    if model.tokenizer is not None or model.n_ctx != LENGTH or model.d_vocab < LENGTH + 4:
        raise TaskError(
            f"{model.name!r} does not read eight letters; use the model 'induction/trained', or the task 'induction'"
        )

    clean, changed, right, wrong = [], [], [], []
    for letters, asked, other in distinct(lambda rng: _draw(model.d_vocab, rng), n, generator(seed)):
        # The eighth letter drawn is the one that takes A's place.
        first, fresh = list(letters[:-1]), letters[-1]
        moved = list(first)
        moved[asked] = fresh if corrupt == "broken" else first[other]
        if corrupt == "moved":
            moved[other] = first[asked]
        clean.append([*first, first[asked]])
        changed.append([*moved, first[asked]])
        right.append(first[asked + 1])
        wrong.append(first[asked] if corrupt == "broken" else first[other + 1])
    circuit = CONTRAST if known == "contrast" else MECHANISM
    return from_tokens(clean, changed, right, wrong, name="induction-letters", vocab=model, known=circuit)


def _draw(d_vocab: int, rng: torch.Generator) -> tuple[tuple[int, ...], int, int]:
    """Eight different letters, where the last one is to stand first, and another position."""
    # Not next to each other, else exchanging the two would also change what follows them.
    asked = int(torch.randint(LENGTH - 2, (1,), generator=rng))
    other = pick([i for i in range(LENGTH - 2) if abs(i - asked) > 1], rng)
    return tuple(sample(range(d_vocab), LENGTH, rng)), asked, other
