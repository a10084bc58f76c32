"""Greater than (Hanna et al. 2023): a year after another year."""

from __future__ import annotations

import torch

from circuitkit.errors import TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import choose, generator
from circuitkit.tasks.own import from_tokens
from circuitkit.tasks.text import answer_ids, encode, pad_right, single_token_words

TEMPLATE = "The {noun} lasted from the year {year} to the year {century}"
NOUNS = (
    "war", "siege", "journey", "project", "reign", "famine", "strike", "treaty", "voyage", "trial", "drought",
    "marriage", "campaign", "festival", "alliance", "contract", "crisis", "construction", "study", "mission",
    "search", "debate",
)  # fmt: skip
CENTURIES = tuple(str(century) for century in range(11, 20))
ENDINGS = tuple(f"{year:02d}" for year in range(100))


@task("greater-than")
def greater_than(model: Vocabulary, *, n: int = 64, seed: int = 0) -> Task:
    """``The war lasted from the year 1742 to the year 17``: 43 to 99 against 00 to 42.

    The corrupt year ends in 01, so that nearly every ending is later. The metric is the difference in
    probability between the two sets, as in the paper. Only years that the tokenizer splits into century and
    ending are used: GPT-2 reads `` 1800`` and `` 1914`` as one token.

    Args:
        model: a model whose tokenizer splits years in this way.
        n: how many pairs.
        seed: seed of the generator that draws them.

    Raises:
        TaskError: if the tokenizer writes years otherwise, or fewer than n pairs exist.
    """
    nouns = list(single_token_words(model, NOUNS, least=2, what="nouns"))
    years = [(century, ending) for century in CENTURIES for ending in _split_endings(model, century)]
    split = set(years)
    years = [(century, ending) for century, ending in years if (century, "01") in split and "02" <= ending <= "98"]
    if not years:
        raise TaskError(
            f"{model.name!r} does not write a year as two tokens of two digits, century and ending, as GPT-2"
            " does; this task cannot be stated for it"
        )
    chosen = choose([(noun, *year) for noun in nouns for year in years], n, generator(seed))
    endings = torch.tensor(_ending_ids(model, TEMPLATE.format(noun=nouns[0], year="1742", century="17")))
    texts = [
        [TEMPLATE.format(noun=noun, year=century + (ending or own), century=century) for noun, century, own in chosen]
        for ending in ("", "01")
    ]
    clean, lengths = pad_right(encode(model, texts[0]))
    numbers = torch.tensor([int(ending) for _, _, ending in chosen])[:, None]
    later = torch.arange(100) > numbers
    return from_tokens(
        clean,
        pad_right(encode(model, texts[1]))[0],
        endings.expand(n, -1).masked_fill(~later, -1),
        endings.expand(n, -1).masked_fill(later, -1),
        lengths=lengths,
        metric="prob-diff",
        name="greater-than",
        vocab=model,
    )


def _split_endings(model: Vocabulary, century: str) -> list[str]:
    """Endings with which the century's years are two tokens, the first being the century's own."""
    prefix, *years = encode(model, [f"the year {century}", *(f"the year {century}{ending}" for ending in ENDINGS)])
    return [e for e, ids in zip(ENDINGS, years, strict=True) if ids[:-1] == prefix]


def _ending_ids(model: Vocabulary, context: str) -> list[int]:
    try:
        return answer_ids(model, [context] * len(ENDINGS), ENDINGS)
    except TaskError as error:
        raise TaskError(f"{model.name!r} does not write two digits as one token after a century: {error}") from error
