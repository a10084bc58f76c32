"""Both ends of a model as data: what positions add to the first stream, and the map from the last norm to logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import UnsupportedModel
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model


def position_vectors(model: Model, tokens: Int[Tensor, " pos"], x: Float[Tensor, "pos d"]) -> Float[Tensor, "pos d"]:
    """Learned position vectors, if the first stream is token vectors plus these; else zeros.

    Where they cannot be told apart, token nodes hold both.
    """
    module: Any = model.module
    words, places = (
        _table(getattr(module, name, None), key) for name, key in (("embed", "W_E"), ("pos_embed", "W_pos"))
    )
    if words is None or places is None or len(places) < len(tokens) or places.shape[1] != x.shape[1]:
        return torch.zeros_like(x)
    found = places[: len(tokens)].to(x)
    rest = x - found - words[tokens].to(x)
    fits = float(rest.abs().max()) <= 1e-2 * float(x.abs().max())
    return found if fits else torch.zeros_like(x)


def _table(module: Any, key: str) -> Tensor | None:
    """A table of vectors, by TransformerLens's name or inside a bridge."""
    if module is None:
        return None
    inner = getattr(module, "original_component", module)
    found = getattr(inner, "weight", None) if inner is not module else getattr(module, key, None)
    return found.detach() if isinstance(found, Tensor) and found.dim() == 2 else None


def unembedding(model: Model) -> tuple[Float[Tensor, "d vocab"], Float[Tensor, " vocab"]]:
    """Weight and bias of the map from the final norm's output to logits (before a soft cap, if there is one).

    Raises:
        UnsupportedModel: if logits are not that map of the normed stream.
    """
    module: Any = getattr(model.module, "unembed", None)
    inner = getattr(module, "original_component", None)
    weight = getattr(module, "W_U", None) if inner is None else inner.weight.T
    bias = getattr(module, "b_U", None) if inner is None else getattr(inner, "bias", None)
    if weight is None or (model.wiring.normed is not None and model.wiring.final_norm is None and _has_norm(model)):
        raise UnsupportedModel(f"the unembedding or the final norm of {model.name} is of no known form")
    weight = at_least_float32(weight.detach())
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else at_least_float32(bias.detach())


def _has_norm(model: Model) -> bool:
    assert model.wiring.normed is not None
    return not isinstance(model.wiring.normed.module, torch.nn.Identity)


def soft_cap(model: Model) -> float | None:
    """The bound that logits are squeezed under, or None."""
    module: Any = model.module
    config = getattr(getattr(module, "original_model", None), "config", None)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(
        getattr(module, "cfg", None), "output_logits_soft_cap", None
    )
    return float(cap) if cap and cap > 0 else None
