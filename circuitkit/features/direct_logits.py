"""Which logits a latent moves directly: its decoder through the final norm's gain and the unembedding.

    e[i, t] = sum over written sites  part(W_dec[i]) W_U[:, t],   less the mean over t

``part`` is the linear part of the final norm with its scale left out; a site of heads goes through W_O first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.features.inputs import unembedding
from circuitkit.features.places import attention_sites
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model

CHUNK = 256  # latents at a time
STREAM = ("resid-pre", "resid-post", "attn-out", "mlp-out", "z")

Ranked = list[list[tuple[int, float]]]


def strongest_logits(
    model: Model, dictionary: Dictionary, latents: Int[Tensor, " latent"], k: int
) -> tuple[Ranked, Ranked]:
    """For each latent the k tokens that it raises most and the k that it lowers most, with the effect of activation 1.

    Empty where the dictionary writes nothing to the stream, or the model has no stream. Raises UnsupportedModel if the
    unembedding is of no known form.
    """
    if model.family != "transformer" or any(site.kind not in STREAM for site in dictionary.writes):
        return [[] for _ in latents], [[] for _ in latents]
    vectors, (weight, _) = stream_vectors(model, dictionary, latents), unembedding(model)
    norm, raised, lowered = model.wiring.final_norm, Ranked(), Ranked()
    for some in vectors.to(weight).split(CHUNK):
        effects = (some if norm is None else norm.part(some)) @ weight
        effects = effects - effects.mean(1, keepdim=True)
        for found, largest in ((raised, True), (lowered, False)):
            best = effects.topk(min(k, effects.shape[1]), 1, largest=largest)
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found += [list(zip(tokens, values, strict=True)) for tokens, values in rows]
    return raised, lowered


def stream_vectors(model: Model, dictionary: Dictionary, latents: Int[Tensor, " latent"]) -> Float[Tensor, "latent d"]:
    """What each latent adds to the stream at all written sites together, at activation 1."""
    decoders = at_least_float32(dictionary.coder.W_dec.detach())[:, latents.to(dictionary.coder.W_dec.device)]
    parts = [_written(model, site, rows) for site, rows in zip(dictionary.writes, decoders, strict=True)]
    return torch.stack(parts).sum(0)


def _written(model: Model, site: Site, rows: Float[Tensor, "latent width"]) -> Float[Tensor, "latent d"]:
    found = attention_sites(model.wiring, site.layer) if site.kind == "z" else None
    if found is None or found[1].weight is None:
        return rows
    out = rows @ found[1].weight.flatten(0, 1).to(rows)
    return out if found[1].post_norm is None else found[1].post_norm.part(out)
