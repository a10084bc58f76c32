"""Words and sounds as ids of a network that reads letters and then gives sounds, one at a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from circuitkit.errors import TaskError
from circuitkit.tasks.base import Task, Vocabulary
from circuitkit.tasks.own import from_tokens
from circuitkit.tasks.text import pad_right

NEEDED = ("graphemes", "phonemes", "first_phoneme")
END, START = "</s>", "<s>"


def spelled(model: Vocabulary, word: str, sounds: Sequence[str] = ()) -> list[int]:
    """Ids of the letters, the end of the word, the start of the sounds, and the sounds that were given already."""
    letters, phonemes = model.card["graphemes"], model.card["phonemes"]
    said = [phonemes.index(sound) + model.card["first_phoneme"] for sound in (START, *sounds)]
    return [*(letters.index(letter) for letter in (*word, END)), *said]


@dataclass(frozen=True)
class SoundPair:
    """Two words, the sounds that are given already, and the next sound: of the clean word, and of the corrupt one."""

    clean: str
    corrupt: str
    given: tuple[str, ...]
    right: str
    wrong: str


def next_sounds(model: Vocabulary, name: str, pairs: Sequence[SoundPair]) -> Task:
    """A task that asks for the next sound."""
    sound = model.card["phonemes"].index
    clean, lengths = pad_right([spelled(model, pair.clean, pair.given) for pair in pairs])
    corrupt, _ = pad_right([spelled(model, pair.corrupt, pair.given) for pair in pairs])
    right, wrong = [sound(pair.right) for pair in pairs], [sound(pair.wrong) for pair in pairs]
    return from_tokens(clean, corrupt, right, wrong, lengths=lengths, name=name, vocab=model)


def check_spells(model: Vocabulary) -> None:
    """Raises TaskError for a network that does not read letters and give sounds."""
    if missing := [key for key in NEEDED if key not in model.card]:
        raise TaskError(
            f"{model.name!r} does not turn letters into sounds, its card lacks {missing[0]!r}: use 'g2p/gru'"
        )
