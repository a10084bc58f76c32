"""De-embedding: which tokens would excite a latent, read off the weights.

    score(t) = W_E[t] . r                r: what the latent reads from the stream, also through a chain of heads

r holds the gain and centring of the norms on the way, not their scale (`circuitkit.features.weight_vectors`), so scores
are in units of the latent's pre-activation times one positive factor for each norm.

Wrong for latents that live on what layers below write: only the direct way from the embedding, or that through the
heads named, is in it; learned positions are not.
Cost: one product of the token table with a vector.
Reference: Dunefsky, Chlenski, Nanda 2024, arXiv:2406.11944.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.inputs import position_vectors
from circuitkit.features.weight_vectors import Heads, check_reader, read_vectors
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model

PROBES = 8  # tokens on which the table is compared with the first stream


@dataclass(frozen=True, eq=False)
class Deembedding:
    """What each token would add to a latent.

    Args:
        latent: its name, such as ``m2.f7``.
        scores: of every token id.
        tokenizer: that of the model, or None.
    """

    latent: str
    scores: Float[Tensor, " vocab"]
    tokenizer: Any = None

    def __repr__(self) -> str:
        return f"Deembedding({self.latent}: {', '.join(repr(text) for _, text, _ in self.top(5))})"

    def top(self, n: int = 10) -> list[tuple[int, str, float]]:
        """Token id, text (the id's digits without a tokenizer) and score of the ``n`` highest, highest first."""
        ids = self.scores.argsort(descending=True, stable=True)[:n].tolist()
        return [(i, self._text(i), float(self.scores[i])) for i in ids]

    def _text(self, token: int) -> str:
        return str(token) if self.tokenizer is None else str(self.tokenizer.convert_ids_to_tokens(token))


@torch.no_grad()
def deembedding(model: Model, dictionary: Dictionary, latent: int, through: Heads = ()) -> Deembedding:
    """Which tokens would excite a latent of a transcoder.

    Args:
        model: a transformer whose first stream is made of its token table.
        dictionary: a transcoder of that model.
        latent: number of the latent.
        through: heads ``(layer, head)`` between the tokens and the latent, lowest first; () for the direct way.

    Raises:
        OptionError: if the dictionary, the latent or a head does not fit.
        UnsupportedModel: if tokens do not enter the stream as a multiple of one table.

    >>> from circuitkit.testing import tiny_model
    >>> from circuitkit.dictionaries.base import Site
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> coder = SparseCoder(8, 4, 8).double()
    >>> coder.W_enc.data[:, 2] = tiny_model().module.embed.W_E[7]                 # a latent for token 7
    >>> deembedding(tiny_model(), Dictionary(coder, Site("mlp-in", 0), (Site("mlp-out", 0),)), 2).top(1)[0][1]
    '7'
    """
    check_reader(model, dictionary)
    n = dictionary.coder.n_latents
    if not 0 <= latent < n:
        raise OptionError(f"got latent {latent} of {dictionary.read}, expected 0 to {n - 1}")
    vector = read_vectors(model, dictionary, [latent], through)[0]
    scores = token_vectors(model).to(vector) @ vector
    return Deembedding(f"m{dictionary.read.layer}.f{latent}", scores, model.tokenizer)


def token_vectors(model: Model) -> Float[Tensor, "vocab d"]:
    """What each token puts into the first stream.

    Raises:
        UnsupportedModel: if that is not a multiple of one table.
    """
    embed: Any = getattr(model.module, "embed", None)
    inner = getattr(embed, "original_component", None)
    table = getattr(embed, "W_E", None) if inner is None else getattr(inner, "weight", None)
    tokens = torch.arange(min(PROBES, model.n_ctx, model.d_vocab), device=model.device)
    x = at_least_float32(model.record(tokens[None]).inputs[0])[0]
    x = x - position_vectors(model, tokens, x)
    if isinstance(table, Tensor) and table.dim() == 2 and table.shape[1] == x.shape[1]:
        found = at_least_float32(table.detach())
        probe = found[tokens].to(x)
        # Some models multiply the table by a constant, the square root of the width.
        scale = float((x * probe).sum() / probe.square().sum())
        if float((x - scale * probe).abs().max()) <= 1e-2 * float(x.abs().max()):
            return scale * found
    raise UnsupportedModel(f"the first stream of {model.name} is not a multiple of its token table")
