"""Prompts and targets as texts: encoded by the model's tokenizer, and remembered token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.errors import OptionError, TaskError
from circuitkit.features.contrast import Contrast
from circuitkit.features.targets import Target
from circuitkit.models.hooked import Model
from circuitkit.tasks.text import answer_ids, encode


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt.

    Args:
        model: whose tokenizer reads it.
        tokens: its ids.
        text: as it was given, or as it is decoded; "" without a tokenizer.
    """

    model: Model
    tokens: Int[Tensor, " pos"]
    text: str

    @classmethod
    def of(cls, model: Model, prompt: Int[Tensor, " pos"] | str) -> Text:
        """A prompt given as ids or as a text. Raises OptionError for a text where there is no tokenizer."""
        if isinstance(prompt, str):
            _check_tokenizer(model, prompt)
            return cls(model, torch.tensor(encode(model, [prompt])[0]), prompt)
        known = model.tokenizer is not None and prompt.dim() == 1
        text = model.tokenizer.decode(prompt.tolist(), skip_special_tokens=True) if known else ""
        return cls(model, prompt, text)

    @property
    def of_each(self) -> tuple[str, ...]:
        """The text of each token, a space where the tokenizer marks one; nothing without a tokenizer."""
        if self.model.tokenizer is None:
            return ()
        pieces = self.model.tokenizer.convert_ids_to_tokens(self.tokens.tolist())
        return tuple(_spaced(str(piece)) for piece in pieces)

    def of_ids(self, ids: Sequence[int]) -> dict[int, str]:
        """The texts of token ids; nothing without a tokenizer."""
        if self.model.tokenizer is None:
            return {}
        return dict(
            zip(ids, map(_spaced, map(str, self.model.tokenizer.convert_ids_to_tokens(list(ids)))), strict=True)
        )

    def targets(self, wanted: Sequence[Target | Contrast | str] | None) -> list[Target | Contrast] | None:
        """Targets with their texts read. Raises OptionError for a text that is not one token after this prompt."""
        return None if wanted is None else [self._target(target) for target in wanted]

    def _target(self, target: Target | Contrast | str) -> Target | Contrast:
        if isinstance(target, Contrast):
            return replace(target, right=self._id(target.right), wrong=self._id(target.wrong))
        return self._id(target) if isinstance(target, str) else target

    def _id(self, target: int | str) -> int:
        if isinstance(target, int):
            return target
        _check_tokenizer(self.model, target)
        try:
            return answer_ids(self.model, [self.text], [target])[0]
        except TaskError as error:
            raise OptionError(f"got {target!r} as a target, expected one token: {error}") from error


def _check_tokenizer(model: Model, text: str) -> None:
    if model.tokenizer is None:
        raise OptionError(f"got the text {text!r}, and {model.name} has no tokenizer; give token ids instead")


def _spaced(piece: str) -> str:
    """A tokenizer's piece with its marks of space and line as these."""
    return piece.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
