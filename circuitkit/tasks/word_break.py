"""Thai word breaks: whether a character begins a word, which its neighbours decide, for Thai writes no spaces."""

from __future__ import annotations

from typing import Literal

from circuitkit.errors import OptionError, TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import choose, generator
from circuitkit.tasks.own import from_tokens
from circuitkit.tasks.text import pad_right

FIRST = "มา ตา นา หา ยา ปลา ว่า ป่า ฟ้า ค่า หมา ม้า ห้า ผ้า ราคา เวลา".split()
SECOND = "กิน บ้าน คน น้ำ มาก ดี ทำ นี้ ของ พูด ที่ จะ ต้อง ขึ้น ลง หนู สวย".split()
LEADING_VOWEL = "เ"  # written before the consonant that it follows in speech: no word begins behind it
CLASSES = "BIES"
# Words, second words, and the final consonant that takes the place of the second word's first character.
FINALS = """
มา: กิน/ร ลง/ง ลง/ย สวย/ย หนู/ง หนู/น หนู/ล
ตา: ของ/ง คน/ม คน/ว หนู/ด หนู/ม หนู/ล หนู/ว
นา: กิน/ย คน/น คน/บ คน/ร สวย/ง หนู/ด หนู/ม
หา: กิน/ย คน/ย ลง/ง ลง/ว สวย/ว หนู/ด หนู/น
ยา: คน/ว ลง/ว สวย/ม หนู/ด หนู/ต หนู/ย หนู/ว
ปลา: คน/ด คน/บ คน/ร ลง/ง ลง/ม หนู/ต หนู/ร
ว่า: คน/ย หนู/ด หนู/บ หนู/ย หนู/ร หนู/ล หนู/ว
ป่า: กิน/ร คน/ง คน/ม สวย/ย หนู/ง หนู/ด หนู/ล
ฟ้า: กิน/ร คน/ม ลง/ย สวย/ง หนู/ง หนู/บ หนู/ย
ค่า: คน/ง คน/ม ลง/ร ลง/ว สวย/ง หนู/ย หนู/ร
หมา: กิน/ร คน/ย คน/ร ลง/ด ลง/ย ลง/ร หนู/ก
ม้า: ลง/ด ลง/ร สวย/ง สวย/ว หนู/ย หนู/ล หนู/ว
ห้า: กิน/ย ลง/ม ลง/ย ลง/ร ลง/ว หนู/น หนู/ม
ผ้า: กิน/ย คน/ง คน/ม คน/ว ลง/ย สวย/ง หนู/ม
ราคา: คน/ง คน/น คน/ร ลง/ด ลง/ย หนู/ด หนู/ร
เวลา: ลง/ง สวย/ง หนู/ง หนู/บ หนู/ม หนู/ร หนู/ว
"""


@task("word-break")
def word_break(model: Vocabulary, *, n: int = 64, seed: int = 0, read: Literal["begin", "end"] = "begin") -> Task:
    """Two words such as ``มา|กิน``: whether the second begins a word (B), or whether the first ends one (E).

    ``begin`` is read at the first character of the second word. The corrupt text has a leading vowel before it
    (``มเกิน``), behind which no word can begin: it is inside a word (I), the wrong answer. ``end`` is read at the last
    character of the first word. In the corrupt text a final consonant follows (``มายิน``), so that it is inside a word:
    only a network that reads backward too can tell. Words are such that both Thai networks are right.

    Args:
        model: a network that tells B, I, E and S for Thai characters, such as ``word-breaks/thai_h27``.
        n: how many pairs.
        seed: seed of the generator that draws them.
        read: ``begin`` or ``end``.

    Raises:
        OptionError: if ``read`` is neither.
        TaskError: if the network is no such network, or there are fewer than n pairs.
    """
    ids = model.card.get("characters", {})
    if model.card.get("classes") != CLASSES or LEADING_VOWEL not in ids:
        raise TaskError(f"{model.name!r} does not mark word breaks in Thai: use 'word-breaks/thai_h27'")
    if read not in ("begin", "end"):
        raise OptionError(f"got read = {read!r}, expected 'begin' (of the second word) or 'end' (of the first)")
    texts = choose(_beginnings() if read == "begin" else _ends(), n, generator(seed))
    clean, lengths = pad_right([[ids[c] for c in text] for text, _, _ in texts])
    corrupt, _ = pad_right([[ids[c] for c in text] for _, text, _ in texts])
    return from_tokens(
        clean,
        corrupt,
        [CLASSES.index("B" if read == "begin" else "E")] * n,
        [CLASSES.index("I")] * n,
        lengths=lengths,
        positions=[where for *_, where in texts],
        name="word-break",
        vocab=model,
    )


def _beginnings() -> list[tuple[str, str, int]]:
    """Clean text, corrupt text, and where the answer is read: the character before it is another."""
    return [(a + b, a[:-1] + LEADING_VOWEL + b, len(a)) for a in FIRST for b in SECOND]


def _ends() -> list[tuple[str, str, int]]:
    """The same where the character after it is another."""
    found = []
    for line in FINALS.split("\n")[1:-1]:
        first, _, others = line.partition(": ")
        for second, final in (pair.split("/") for pair in others.split()):
            found.append((first + second, first + final + second[1:], len(first) - 1))
    return found
