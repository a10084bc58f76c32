"""Methods that explain prompts through the latents of dictionaries, by the names that users type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.registry import Registry

if TYPE_CHECKING:
    from circuitkit.models.hooked import Model


class FeatureMethod(Protocol):
    """``(model, dictionaries, tokens, *, <options>) -> result``; keyword-only arguments are what a user can set.

    ``tokens`` are those of one prompt. The result is a `circuitkit.features.graph.FeatureGraph`, or has one as
    ``.graph``.
    """

    def __call__(self, model: Model, dictionaries: Sequence[Dictionary], tokens: Tensor, **options: Any) -> Any:
        """Explain one prompt."""


FEATURE_METHODS: Registry[FeatureMethod] = Registry("feature-method", "circuitkit.features")


def feature_method(name: str) -> Any:
    """Register a method under the name that users type."""
    return FEATURE_METHODS.add(name)
