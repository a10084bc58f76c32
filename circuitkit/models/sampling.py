"""Texts that a language model writes itself: drawn token by token, many at once, on the cache of keys and values.

    next ~ softmax(logits / temperature)         temperature 0: the likeliest

Each draw turns one uniform number of a generator of its own into a token: the first whose cumulative probability
exceeds it. Row i of a batch uses the same numbers however many rows follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import quiet
from circuitkit.shapes import Tokens

Next = Callable[[Tokens], Float[Tensor, "batch vocab"]]
CACHE_ROUNDING = 1e-2  # of the largest logit; half-precision models round differently with a cache


def sample(model: Model, prompts: Tokens, n: int, *, temperature: float = 1.0, seed: int = 0) -> Tokens:
    """Prompts with ``n`` tokens more, each drawn from what the model expects next.

    The module runs as it is, without dictionaries that are spliced into the model. Where it is a Hugging Face module
    behind a bridge, each step runs the newest token only; the same tokens come out without that cache.

    Args:
        model: a transformer that predicts the next token.
        prompts: of one length, without padding; a column of ``tokenizer.bos_token_id`` for texts from their beginning.
        n: how many tokens are added.
        temperature: 1 for the model's own distribution, 0 for the likeliest token.
        seed: of the draws; your random state is neither used nor changed.

    Raises:
        OptionError: for an empty prompt, a text longer than the model reads, or a temperature that is no number of at
            least 0.
        UnsupportedModel: for a model that does not predict the next token, or logits that are not finite.

    >>> import circuitkit as ck
    >>> model = ck.load("stories260k")
    >>> model.tokenizer.decode(sample(model, torch.tensor([[1]]), 8, temperature=0)[0, 1:])
    'Once upon a time, there was a'
    """
    _check(model, prompts, n, temperature)
    draws = torch.rand(len(prompts), n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = prompts.to(model.device)
    with torch.no_grad(), quiet(model.module):
        following = _cached(model) or _whole(model)
        for step in range(n):
            logits = at_least_float32(following(tokens))
            if not logits.isfinite().all():
                raise UnsupportedModel(f"{model.name} gives logits that are NaN or infinite; check its weights")
            tokens = torch.cat([tokens, _chosen(logits, draws[:, step].to(logits.device), temperature)], 1)
    return tokens.to(prompts.device)


def _chosen(
    logits: Float[Tensor, "batch vocab"], draws: Float[Tensor, " batch"], temperature: float
) -> Int[Tensor, "batch 1"]:
    """The first token whose cumulative probability exceeds the draw."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    below = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # The last sum may be a rounding below 1, and so may be the draw's place.
    return torch.searchsorted(below, draws[:, None] * below[:, -1:], right=True).clamp(max=logits.shape[1] - 1)


def _whole(model: Model) -> Next:
    """Logits behind the last token, from a run over all of them."""

    def following(tokens: Tokens) -> Float[Tensor, "batch vocab"]:
        out = model.module(tokens)
        return (out if isinstance(out, Tensor) else out.logits)[:, -1]

    return following


def _cached(model: Model) -> Next | None:
    """The same from the newest token and what the module kept of the earlier ones; None if it keeps nothing usable."""
    inner = getattr(model.module, "original_model", None)
    if not isinstance(inner, nn.Module) or not hasattr(inner, "config"):
        return None
    probe = torch.arange(3, device=model.device)[None] % model.d_vocab
    try:
        on_cache = _on_cache(inner)
        on_cache(probe[:, :2])
        cached, whole = on_cache(probe), _whole(model)(probe)
    except (AttributeError, TypeError, RuntimeError):
        return None  # what a family's attention cannot do with a cache shows as one of these
    gap = (cached - whole).abs().max()
    return _on_cache(inner) if gap <= CACHE_ROUNDING * whole.abs().max() else None


def _on_cache(inner: nn.Module) -> Next:
    kept: list[Any] = [None]

    def following(tokens: Tokens) -> Float[Tensor, "batch vocab"]:
        new = tokens if kept[0] is None else tokens[:, -1:]
        out = inner(input_ids=new, past_key_values=kept[0], use_cache=True)
        kept[0] = out.past_key_values
        return out.logits[:, -1]

    return following


def _check(model: Model, prompts: Tokens, n: int, temperature: float) -> None:
    if model.family == "recurrent" or not model.causal:
        raise UnsupportedModel(
            f"{model.name} does not predict each next token of a text from those before it; only causal transformers "
            "are sampled from"
        )
    if prompts.numel() == 0 or n < 0:
        raise OptionError(
            f"got prompts of shape {list(prompts.shape)} and n = {n}; expected tokens, and n of 0 or more"
        )
    if prompts.shape[1] + n > model.n_ctx:
        raise OptionError(f"got {prompts.shape[1]} tokens and n = {n}, and {model.name} reads at most {model.n_ctx}")
    if not 0 <= temperature < math.inf:
        raise OptionError(f"got temperature = {temperature}, expected a number of at least 0")
