"""How a dictionary is trained, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from circuitkit.dictionaries.losses import PENALTIES
from circuitkit.dictionaries.sparse_coder import ACTIVATIONS
from circuitkit.errors import OptionError


@dataclass(frozen=True)
class Recipe:
    """How a dictionary is trained.

    Args:
        n_latents: how many latents (of each layer, in a cross-layer transcoder).
        activation: as for `circuitkit.dictionaries.sparse_coder.SparseCoder`.
        k: active latents, for ``topk`` and ``batchtopk``.
        sparsity: weight of the penalty of the other activations; see `circuitkit.dictionaries.losses`.
        penalty: of ``jumprelu``: ``"step"`` counts active latents, ``"tanh"`` counts them softly.
        skip: whether a linear map leads past the latents (one site written only).
        steps: how many.
        lr: highest learning rate of Adam.
        warm_up: share of the steps in which the rate rises to ``lr``; it then falls to 0 along a cosine.
        dead_after: steps without being active after which a latent counts as dead; dead latents of ``topk`` and
            ``batchtopk`` get a loss of their own, those of the others are started anew on badly explained inputs.
        seed: of everything random.

    Raises:
        OptionError: for an option out of range.

    >>> Recipe(64, "topk", k=4).steps
    3000
    """

    n_latents: int
    activation: str = "relu"
    k: int | None = None
    sparsity: float = 0.5
    penalty: str = "step"
    skip: bool = False
    steps: int = 3000
    lr: float = 2e-3
    warm_up: float = 0.05
    dead_after: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise OptionError(f"got activation = {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if self.penalty not in PENALTIES:
            raise OptionError(f"got penalty = {self.penalty!r}, expected one of {', '.join(PENALTIES)}")
        for name in ("n_latents", "steps", "dead_after"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise OptionError(f"got {name} = {value!r}, expected a whole number of at least 1")
        if not 0 <= self.sparsity < math.inf or not 0 < self.lr < math.inf or not 0 <= self.warm_up < 1:
            raise OptionError(
                f"got sparsity = {self.sparsity!r}, lr = {self.lr!r}, warm_up = {self.warm_up!r}; expected sparsity of "
                "at least 0, lr above 0 and a share for warm_up"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step: up in a line, then down along a cosine to 0."""
        rise = max(1.0, self.warm_up * self.steps)
        if step < rise:
            return self.lr * (step + 1) / (rise + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, self.steps - rise)))
