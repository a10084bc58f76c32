"""Whether a model's attention uses the patterns that it shows: where it does not, they can be read but not replaced."""

from __future__ import annotations

from functools import partial

import torch

from circuitkit.errors import OptionError
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import Hook, hooked
from circuitkit.models.transformer import probe_tokens


def check_patterns(model: Model) -> None:
    """Refuse a model in which replacing attention patterns does nothing.

    Some bridges show patterns beside an attention that is computed in another way (GPT-J): an edit would be lost
    without a word.

    Raises:
        OptionError: naming the model.
    """
    tokens = probe_tokens(model.d_vocab, model.module)[:, : min(5, model.n_ctx)]
    swap: list[Hook] = [(port, partial(torch.flip, dims=(-1,))) for port in model.wiring.patterns]
    with torch.no_grad(), model.quiet():
        whole = model.module(tokens.to(model.device))
        with hooked(swap):
            swapped = model.module(tokens.to(model.device))
    before, after = (x if isinstance(x, torch.Tensor) else x.logits for x in (whole, swapped))
    if swap and torch.equal(before, after):
        raise OptionError(
            f"replacing the attention patterns of {model.name} changes nothing: its attention is computed in another "
            "way, so they can be neither patched nor held; patch q, k, v or heads, or intervene without frozen and "
            "constrained"
        )
