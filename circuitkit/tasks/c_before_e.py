"""Soft and hard c: an S before e and i, a K before a, o and u."""

from __future__ import annotations

from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import choose, generator
from circuitkit.tasks.spelling import SoundPair, check_spells, next_sounds

RESTS = (
    "nt", "ll", "de", "te", "rt", "lt", "st", "nter", "llar", "rtain", "rn", "ne", "re", "der", "dar", "sk", "p", "se",
    "nsor", "ntral", "mber", "ment", "nder", "ster", "ta", "ndy",
)  # fmt: skip
SOFT, HARD = ("S", "ei"), ("K", "aou")


@task("c-before-e")
def c_before_e(model: Vocabulary, *, n: int = 64, seed: int = 0) -> Task:
    """``cell`` against ``call``: the first sound is S where e or i follows the c, and K where a, o or u does.

    Some of the words do not exist (``colt`` does, ``cilt`` does not); the rule holds for them as well. The soft c is
    in the clean word of about half of the pairs, and in the corrupt word of the others.

    Args:
        model: a network that reads letters and gives sounds: ``g2p/gru``.
        n: how many pairs.
        seed: seed of the generator that draws them.

    Raises:
        TaskError: if the network is no such network, or there are fewer than n pairs.
    """
    check_spells(model)
    rows = [
        SoundPair(f"c{vowel}{rest}", f"c{other}{rest}", (), right, wrong)
        for (right, vowels), (wrong, others) in ((SOFT, HARD), (HARD, SOFT))
        for rest in RESTS
        for vowel in vowels
        for other in others
    ]
    return next_sounds(model, "c-before-e", choose(rows, n, generator(seed)))
