"""From texts to token ids: what precedes a text, what one token an answer is, and which words fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.errors import TaskError
from circuitkit.shapes import Tokens
from circuitkit.tasks.base import Vocabulary


def encode(model: Vocabulary, texts: Sequence[str], *, prepend_bos: bool | None = None) -> list[list[int]]:
    """Token ids of each text, without padding, as the model is meant to read them.

    Special tokens that the tokenizer puts before a text are kept (Llama's ``<s>``; GPT-2 has none); those it
    puts after a text are dropped, because the answer is what follows. There is never a second BOS.

    Args:
        model: whose tokenizer is used.
        texts: the texts.
        prepend_bos: True puts the tokenizer's BOS first, False leaves it out, None does what the tokenizer
            does.

    Raises:
        TaskError: if the model has no tokenizer, a row is not a text or is empty, or there is no BOS to put
            first.
    """
    tokenizer = _tokenizer(model)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TaskError(f"row {row}: got {type(text).__name__} {text!r}, expected a text")
        if not text:
            raise TaskError(f"row {row}: the text is empty; give at least one word")
    if not len(texts):
        return []
    prefix = _prefix(tokenizer, prepend_bos)
    rows = _plain(tokenizer, texts)
    return [prefix + (ids[1:] if prefix and ids[:1] == [tokenizer.bos_token_id] else ids) for ids in rows]


def bos_ids(model: Vocabulary) -> list[int]:
    """Special tokens that the tokenizer puts before every text; none where there is no tokenizer."""
    return [] if model.tokenizer is None else _prefix(model.tokenizer, None)


def answer_ids(
    model: Vocabulary, contexts: Sequence[str], answers: Sequence[str], *, rows: Sequence[int] | None = None
) -> list[int]:
    """The one token that each answer is when it follows its context; ``rows`` are their numbers for messages.

    An answer is encoded as the continuation of its text, because many tokenizers treat the start of a text
    specially; where appending it would change the text's own tokens, it is encoded alone. Either way the
    token, decoded after the context, must spell exactly the answer.

    Raises:
        TaskError: if an answer is not one token; the message names the row and the tokens that came out.
    """
    tokenizer = _tokenizer(model)
    rows = range(len(answers)) if rows is None else rows
    for row, answer in zip(rows, answers, strict=True):
        if not isinstance(answer, str) or not answer:
            raise TaskError(f"row {row}: got {answer!r} as an answer, expected a text of one token")
    if not len(answers):
        return []
    before = _plain(tokenizer, list(contexts))
    joined = _plain(tokenizer, [c + a for c, a in zip(contexts, answers, strict=True)])
    alone = _plain(tokenizer, list(answers))
    return [_one_token(tokenizer, *parts) for parts in zip(rows, answers, before, joined, alone, strict=True)]


def single_token_words(
    model: Vocabulary, words: Sequence[str], *, least: int, what: str, context: str = "It was"
) -> dict[str, int]:
    """Those of the words that are one token after a text and a space, each with its id.

    Raises:
        TaskError: if fewer than ``least`` of them fit the model's tokenizer and vocabulary.
    """
    tokenizer = _tokenizer(model)
    before = _plain(tokenizer, [context])[0]
    joined = _plain(tokenizer, [f"{context} {word}" for word in words])
    fit = {
        word: ids[-1]
        for word, ids in zip(words, joined, strict=True)
        if ids[:-1] == before and ids[-1] < model.d_vocab and ids[-1] != tokenizer.unk_token_id
    }
    if len(fit) < least:
        raise TaskError(
            f"only {len(fit)} of {len(words)} {what} are one token for {model.name!r}, expected at least "
            f"{least}; this task needs a larger vocabulary of whole words (GPT-2's fits)"
        )
    return fit


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tokens, Int[Tensor, " batch"]]:
    """Rows as one matrix, padded on the right with id 0, and their lengths.

    >>> pad_right([[5, 6], [7]])
    (tensor([[5, 6],
            [7, 0]]), tensor([2, 1]))
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    width = int(lengths.max()) if len(rows) else 0
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens, lengths


def show_tokens(model: Vocabulary, ids: Sequence[int]) -> str:
    """Token strings for a message."""
    return repr(model.tokenizer.convert_ids_to_tokens(list(ids)))


def _tokenizer(model: Vocabulary) -> Any:
    if model.tokenizer is None:
        raise TaskError(f"{model.name!r} has no tokenizer; state the task in token ids with Task.from_tokens")
    return model.tokenizer


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _prefix(tokenizer: Any, prepend_bos: bool | None) -> list[int]:
    # Found by experiment: tokenizers announce their template in too many different ways.
    full, plain = list(tokenizer("a")["input_ids"]), _plain(tokenizer, ["a"])[0]
    starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    prefix, bos = full[: next(starts, 0)], tokenizer.bos_token_id
    if prepend_bos is False:
        return [i for i in prefix if i != bos]
    if prepend_bos and bos is None:
        raise TaskError("prepend_bos=True, but this tokenizer has no BOS token; use prepend_bos=None")
    return [bos, *prefix] if prepend_bos and bos not in prefix else prefix


def _one_token(tokenizer: Any, row: int, answer: str, before: list[int], joined: list[int], alone: list[int]) -> int:
    continues = joined[: len(before)] == before
    token = joined[len(before) :] if continues else alone
    # A SentencePiece tokenizer may put a space of its own before an answer encoded alone.
    if len(token) == 1 and (continues or _decode(tokenizer, before + token) == _decode(tokenizer, before) + answer):
        return token[0]
    hint = "" if answer.startswith(" ") else "; an answer that begins a new word needs its leading space"
    raise TaskError(
        f"row {row}: the answer {answer!r} is not one token here, it came out as "
        f"{tokenizer.convert_ids_to_tokens(token)}{hint}"
    )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
